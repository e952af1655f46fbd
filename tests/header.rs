//! `include/flea.h` is what src/ffi says: generated, committed, compared. `FLEA_BLESS=1` rewrites it (make header).

use std::path::Path;

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/ffi/types.rs"))
        .with_src(root.join("src/ffi/calls.rs"))
        .with_src(root.join("src/ffi/kv.rs"))
        .generate()
        .expect("the C ABI can be read");
    let mut text = Vec::new();
    bindings.write(&mut text);
    let text = String::from_utf8(text).expect("UTF-8");
    // "# Safety" sections are Rust's way to say it; the C reader finds the same in the sentences above them.
    let mut header = String::new();
    let mut skipping = false;
    for line in text.lines() {
        if line.starts_with("// # Safety") {
            skipping = true;
            while header.ends_with("//\n") {
                header.truncate(header.len() - 3);
            }
        }
        skipping &= line.starts_with("//");
        if !skipping {
            header.push_str(line);
            header.push('\n');
        }
    }
    header
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/flea.h");
    let generated = generated();
    if std::env::var_os("FLEA_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("write include/flea.h");
    }
    let committed = std::fs::read_to_string(&path).expect("include/flea.h");
    assert!(
        committed == generated,
        "include/flea.h is stale: run `make header` and commit it"
    );
}

#[test]
fn the_header_has_these_calls_and_no_others() {
    let header = generated();
    let mut calls: Vec<&str> = header
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '('))
        .filter_map(|word| word.split_once('(').map(|(name, _)| name))
        .filter(|name| name.starts_with("flea_"))
        .collect();
    calls.sort_unstable();
    let expected = [
        "flea_abi_version",
        "flea_acquire",
        "flea_acquire_ranges",
        "flea_hint",
        "flea_hint_ranges",
        "flea_kv_bound",
        "flea_kv_calibrate",
        "flea_kv_close",
        "flea_kv_decode",
        "flea_kv_encode",
        "flea_kv_frame_info",
        "flea_kv_open",
        "flea_last_errno",
        "flea_last_error",
        "flea_layer_of",
        "flea_model_close",
        "flea_model_gpu",
        "flea_model_info",
        "flea_model_open",
        "flea_model_tensor",
        "flea_model_tensor_at",
        "flea_read_rows",
        "flea_release",
        "flea_release_after",
        "flea_release_ranges",
        "flea_stats",
        "flea_status_name",
    ];
    assert_eq!(calls, expected);
}

#[test]
fn the_header_names_every_status_with_its_number() {
    let header = generated();
    for kind in flea::ErrorKind::ALL {
        let define = format!("#define FLEA_E_{} {}", kind.name(), kind.status());
        assert!(header.contains(&define), "missing: {define}");
    }
}

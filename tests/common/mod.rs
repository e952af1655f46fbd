//! What the integration tests share: the program under test, synthetic models, and a way to skip that is seen.

#![allow(dead_code)]

use flea::model::{Layer, Use};
use nix::fcntl::{Flock, FlockArg};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program under test.
pub fn flea() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLEA_") {
            command.env_remove(name);
        }
    }
    // A profile that somebody measured on this machine must not steer a test.
    command.env("FLEA_PROFILE", "none");
    command
}

/// Says why a test did not run. CI fails on every reason that is not in .ci/allowed-skips.txt.
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
    eprintln!("SKIP: {reason}");
}

/// Where test models are kept between runs.
pub fn models() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models");
    std::fs::create_dir_all(&directory).expect("a directory for test models");
    directory
}

/// A synthetic model, made once per set of arguments.
pub fn synth(name: &str, arguments: &[&str]) -> PathBuf {
    let key = arguments
        .iter()
        .flat_map(|argument| argument.bytes())
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let path = models().join(format!("{name}-{key:016x}.gguf"));
    // Tests run at the same time and may want the same model. It is made once and never replaced: a daemon that has opened
    // the one would notice the other.
    let lock = std::fs::File::create(models().join("lock")).expect("a lock file");
    let _locked = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .expect("a lock");
    if path.exists() {
        return path;
    }
    // Under a name of its own first: an interrupted run leaves no half a model behind.
    let temporary = models().join(format!(
        "{name}-{key:016x}-{}-{:?}.gguf",
        std::process::id(),
        std::thread::current().id()
    ));
    let output = flea()
        .arg("synth")
        .args(arguments)
        .arg("-o")
        .arg(&temporary)
        .output()
        .expect("flea runs");
    assert!(
        output.status.success(),
        "flea synth {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&temporary, &path).expect("rename");
    path
}

/// A model small enough for a matrix of runs: 6 layers, rows of 256 (the k-quants want that), 800 tokens.
pub fn tiny(arch: &str, dtype: &str) -> PathBuf {
    let mut arguments = vec![
        "--arch",
        arch,
        "--layers",
        "6",
        "--embd",
        "256",
        "--ffn",
        "512",
        "--heads",
        "4",
        "--kv-heads",
        "2",
    ];
    arguments.extend(["--vocab", "800", "--type", dtype, "--seed", "7"]);
    if arch == "mixtral" || arch == "qwen3moe" {
        arguments.extend(["--experts", "4", "--experts-used", "2"]);
    }
    synth(&format!("{arch}-{dtype}"), &arguments)
}

/// A llama of so many layers of about 0.8 MB, and a head: small enough for debug builds, large enough for 4 KiB pages to matter.
pub fn small_llama(name: &str, layers: &str, extra: &[&str]) -> PathBuf {
    let mut arguments = vec!["--arch", "llama", "--layers", layers, "--type", "q8_0"];
    arguments.extend(["--embd", "256", "--ffn", "704", "--vocab", "2048"]);
    arguments.extend(["--heads", "4", "--kv-heads", "2"]);
    arguments.extend(extra);
    synth(name, &arguments)
}

/// Ten layers of 8 MB whose rows are no multiple of 512, so that in VRAM zeros stand behind every matrix; and a head.
pub fn padded_model() -> PathBuf {
    let arguments = "--arch llama --layers 10 --embd 768 --ffn 2400 --heads 12 --kv-heads 4 --vocab 3000 --type q8_0";
    synth("cuda", &arguments.split(' ').collect::<Vec<_>>())
}

/// A model of 16-bit weights, whose tensors are no whole tiles of a compressed file.
pub fn tiled_model() -> PathBuf {
    let arguments = "--arch llama --layers 8 --embd 576 --ffn 1600 --heads 9 --kv-heads 3 --vocab 2000 --type bf16";
    synth("cuda-packed", &arguments.split(' ').collect::<Vec<_>>())
}

/// [`tiled_model`], compressed.
pub fn compressed(directory: &Path) -> PathBuf {
    let path = directory.join("model.fleapack");
    let mut command = flea();
    command.args(["pack", "--compress"]).arg(tiled_model());
    let said = output(command.arg("-o").arg(&path));
    assert!(said.status.success(), "{}", text(&said));
    path
}

/// All that a program said, and how it ended.
pub fn text(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(stdout),
        String::from_utf8_lossy(stderr)
    )
}

/// Compares every byte of a layer with the model's one file. The layer is held: its bytes lie where `address` says, and stay.
#[allow(unsafe_code)]
pub fn check_layer(layer: &Layer, path: &Path, address: impl Fn(u32, u64) -> *const u8) {
    let file = std::fs::File::open(path).expect("open");
    for Use { extent, .. } in &layer.uses {
        let mut expected = vec![0u8; extent.len_bytes as usize];
        file.read_exact_at(&mut expected, extent.offset_bytes)
            .expect("read");
        let address = address(extent.shard_index, extent.offset_bytes);
        // SAFETY: the caller holds the layer, so its bytes are mapped and stay.
        let streamed = unsafe { std::slice::from_raw_parts(address, expected.len()) };
        assert!(
            streamed == expected,
            "layer {}: bytes at {} differ from the file",
            layer.label,
            extent.offset_bytes
        );
    }
}

/// Runs the program and gives what it said.
pub fn output(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs the program with --json and reads its one object. Panics, with all it said, unless it succeeded.
pub fn json(command: &mut Command) -> serde_json::Value {
    let output = output(command);
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{stderr}",
        output.status
    );
    assert_eq!(
        stdout.trim_end().lines().count(),
        1,
        "one object on one line and nothing else:\n{stdout}"
    );
    serde_json::from_str(stdout.trim()).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

/// A number of a JSON object.
pub fn number(value: &serde_json::Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} is missing in {value}"))
}

//! The units of systemd/: well-formed, hardened, and good for a real systemd.

mod common;

use common::skip;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Exposure that systemd-analyze may find at most, in tenths: 1.5 on systemd 252, and room for a stricter one.
const EXPOSURE_MOST: &str = "20";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Why the units cannot be looked at here.
fn lacks_systemd() -> bool {
    let lacks = Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err();
    if lacks {
        skip("no systemd-analyze");
    }
    lacks
}

/// The units as they are installed, with flead where the test has it: systemd asks that it exists.
fn installed(directory: &Path) -> [PathBuf; 2] {
    let service =
        std::fs::read_to_string(root().join("systemd/flead.service")).expect("the service");
    assert!(
        service.contains("ExecStart=/usr/local/bin/flead\n"),
        "make install looks for this"
    );
    let service = service.replace("/usr/local/bin/flead", env!("CARGO_BIN_EXE_flead"));
    let paths = [
        directory.join("flead.service"),
        directory.join("flead.socket"),
    ];
    std::fs::write(&paths[0], service).expect("write");
    std::fs::copy(root().join("systemd/flead.socket"), &paths[1]).expect("copy");
    paths
}

#[test]
fn the_units_are_well_formed() {
    if lacks_systemd() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let verify = |paths: &[PathBuf]| {
        Command::new("systemd-analyze")
            .args(["verify", "--recursive-errors=yes", "--man=no"])
            .args(paths)
            .output()
            .expect("systemd-analyze runs")
    };
    let paths = installed(directory.path());
    let good = verify(&paths);
    assert!(
        good.status.success() && said(&good).is_empty(),
        "{}",
        said(&good)
    );
    // With the drop-in for GPUs as well.
    let drop_in = directory.path().join("flead.service.d");
    std::fs::create_dir(&drop_in).expect("a directory");
    std::fs::copy(
        root().join("systemd/examples/gpu.conf"),
        drop_in.join("gpu.conf"),
    )
    .expect("copy");
    let gpu = verify(&paths);
    assert!(
        gpu.status.success() && said(&gpu).is_empty(),
        "{}",
        said(&gpu)
    );
    // And it would have said so: a key that does not exist.
    let broken = std::fs::read_to_string(&paths[0]).expect("read") + "\n[Service]\nNoSuchKey=1\n";
    std::fs::write(&paths[0], broken).expect("write");
    assert!(said(&verify(&paths)).contains("NoSuchKey"));
}

#[test]
fn the_service_is_hardened() {
    if lacks_systemd() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let paths = installed(directory.path());
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager"])
        .arg(format!("--threshold={EXPOSURE_MOST}"))
        .arg(&paths[0])
        .output()
        .expect("systemd-analyze runs");
    assert!(output.status.success(), "{}", said(&output));
}

/// PID 1 of namespaces of its own: starts, becomes ready, answers, survives a watchdog kill, reloads, stops, starts on
/// the first connection. tests/systemd/promises.sh has the list.
#[test]
fn a_real_systemd_runs_it() {
    if lacks_systemd() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return skip("not root: no namespaces for a systemd of the test's own");
    }
    let directory = tempfile::tempdir().expect("a directory");
    for part in ["bin", "models"] {
        std::fs::create_dir(directory.path().join(part)).expect("a directory");
    }
    for (name, program) in [
        ("flead", env!("CARGO_BIN_EXE_flead")),
        ("flea-ctl", env!("CARGO_BIN_EXE_flea-ctl")),
    ] {
        std::fs::copy(program, directory.path().join("bin").join(name)).expect("copy");
    }
    // The user flea must be able to go in.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open).expect("chmod");
    let model = common::synth(
        "systemd",
        &[
            "--arch",
            "llama",
            "--layers",
            "4",
            "--embd",
            "256",
            "--ffn",
            "512",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--vocab",
            "512",
            "--type",
            "q8_0",
        ],
    );
    std::fs::copy(model, directory.path().join("models/m.gguf")).expect("copy");
    let output = Command::new(root().join("tests/systemd/pid1.sh"))
        .arg(directory.path())
        .output()
        .expect("the script runs");
    let said = said(&output);
    println!("{said}");
    match output.status.code() {
        Some(77) => skip("no namespaces or no cgroup2 for a systemd of the test's own"),
        Some(0) => assert_eq!(
            said.lines().filter(|line| line.starts_with("ok: ")).count(),
            11,
            "{said}"
        ),
        _ => panic!("{said}"),
    }
}

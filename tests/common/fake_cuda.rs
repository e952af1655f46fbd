//! The fake libcuda of tests/fake-cuda, compiled once, for programs that the tests start.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The directory in which the library lies, under both names it is looked for by.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-cuda/libcuda.c");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("fake-cuda-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for the fake libcuda");
        let library = directory.join("libcuda.so");
        let status = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"])
            .args(["-fPIC", "-shared", "-pthread", "-Wl,-soname,libcuda.so"])
            .arg("-o")
            .arg(&library)
            .arg(source)
            .status()
            .expect("a C compiler");
        assert!(status.success(), "the fake libcuda compiles");
        std::fs::copy(&library, directory.join("libcuda.so.1")).expect("copy");
        directory
    })
}

/// Gives a program the fake GPU, in the state that the variables say.
pub fn with_gpu<'a>(command: &'a mut Command, state: &[(&str, &str)]) -> &'a mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FAKE_CUDA_") {
            command.env_remove(name);
        }
    }
    command.env("LD_LIBRARY_PATH", directory());
    command.envs(state.iter().copied())
}

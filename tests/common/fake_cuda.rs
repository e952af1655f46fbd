//! The fake libcuda of tests/fake-cuda, compiled once, for programs that the tests start and for the test itself.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

#[path = "../fake-cuda/compile.rs"]
mod compile;

/// The directory in which the library lies, under both names it is looked for by.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("fake-cuda-{}", std::process::id()));
        let library = compile::compile(&directory);
        std::fs::copy(&library, directory.join("libcuda.so.1")).expect("copy");
        directory
    })
}

/// A directory with the fake libcufile in it, too.
pub fn directory_with_cufile() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = directory().with_extension("cufile");
        compile::compile_cufile(&directory);
        std::fs::copy(
            self::directory().join("libcuda.so"),
            directory.join("libcuda.so"),
        )
        .expect("copy");
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

/// Loads the fake driver into this process, under the name that is looked for first.
#[allow(unsafe_code)]
pub fn load_here() {
    let path = directory().join("libcuda.so");
    let name = std::ffi::CString::new(path.to_str().expect("a path")).expect("a path");
    // SAFETY: our own library, whose initialisers do nothing.
    let handle = unsafe { nix::libc::dlopen(name.as_ptr(), nix::libc::RTLD_NOW) };
    assert!(!handle.is_null());
}

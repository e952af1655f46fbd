//! The fake libcuda of tests/fake-cuda, compiled once, for programs that the tests start and for the test itself.

#![allow(dead_code)]

use std::ffi::{CStr, CString, c_void};
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

/// `flea bench stream` on the fake GPUs; `arguments` name which.
pub fn stream(model: &Path, arguments: &str, state: &[(&str, &str)]) -> Command {
    let mut command = crate::common::flea();
    command.args(["bench", "stream"]).arg(model).arg("--json");
    command.args(arguments.split_whitespace());
    with_gpu(&mut command, state);
    command
}

/// [`stream`] on the first GPU.
pub fn stream_on_gpu_0(model: &Path, arguments: &str, state: &[(&str, &str)]) -> Command {
    stream(model, &format!("--gpu 0 {arguments}"), state)
}

/// The fake driver, loaded into this process under the name that is looked for first, and its calls.
pub struct Driver(*mut c_void);

#[allow(unsafe_code)]
impl Driver {
    pub fn load() -> Self {
        let path = directory().join("libcuda.so");
        let name = CString::new(path.to_str().expect("a path")).expect("a path");
        // SAFETY: our own library, whose initialisers do nothing.
        let library = unsafe { nix::libc::dlopen(name.as_ptr(), nix::libc::RTLD_NOW) };
        assert!(!library.is_null());
        Self(library)
    }

    /// A function of the driver, as a pointer to cast.
    pub fn find(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the library is loaded and stays so.
        let found = unsafe { nix::libc::dlsym(self.0, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    }
}

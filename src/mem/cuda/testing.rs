//! The fake libcuda for unit tests: compiled once per run, and loaded before anybody looks for a driver.
#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::Context;

#[path = "../../../tests/fake-cuda/compile.rs"]
mod compile;

/// A context on the fake GPU.
pub(crate) fn fake_gpu() -> Arc<Context> {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let process = std::process::id();
        let directory = std::env::temp_dir().join(format!("flea-fake-cuda-{process}"));
        let path = compile::compile(&directory);
        load(&path);
        path
    });
    Context::new(0).expect("the fake GPU")
}

fn load(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().expect("a path")).expect("a path");
    // SAFETY: our own library, whose initialisers do nothing; it stays loaded, and the bindings find it by its name.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null(), "the fake libcuda loads");
    std::fs::remove_file(path).expect("loaded, so its file is not needed");
    let _ = path.parent().map(std::fs::remove_dir);
}

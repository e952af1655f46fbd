//! The fake libcuda for unit tests: compiled once per run, and loaded before anybody looks for a driver.
#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use super::Context;

/// A context on the fake GPU.
pub(crate) fn fake_gpu() -> Arc<Context> {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = compile();
        load(&path);
        path
    });
    Context::new(0).expect("the fake GPU")
}

/// Compiles the library. Its name inside is the first that the bindings ask for, so that a driver of this machine does not
/// come before it.
fn compile() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-cuda/libcuda.c");
    let directory = std::env::temp_dir().join(format!("flea-fake-cuda-{}", std::process::id()));
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
    library
}

fn load(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().expect("a path")).expect("a path");
    // SAFETY: our own library, whose initialisers do nothing; it stays loaded, and the bindings find it by its name.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null(), "the fake libcuda loads");
    std::fs::remove_file(path).expect("loaded, so its file is not needed");
    let _ = path.parent().map(std::fs::remove_dir);
}

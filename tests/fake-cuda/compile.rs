//! Compiles the fake libcuda: for unit tests (src/mem/cuda/testing.rs) and for programs that tests start
//! (tests/common/fake_cuda.rs), which both include this file.

use std::path::{Path, PathBuf};
use std::process::Command;

/// For both languages; warnings are errors.
const COMMON: [&str; 6] = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread"];
/// As tests/kernels.rs compiles the kernels, and without what would need the C++ library at run time.
const KERNELS: [&str; 7] = [
    "-std=c++17",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-Wno-unused-function",
];

/// Compiles the fake libcufile into `directory`.
#[allow(dead_code)]
pub(crate) fn compile_cufile(directory: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-cuda/libcufile.c");
    std::fs::create_dir_all(directory).expect("a directory for the fake libcufile");
    let mut linker = Command::new("cc");
    linker
        .args(COMMON)
        .args(["-std=gnu11", "-shared", "-Wl,-soname,libcufile.so.0"]);
    linker
        .arg(source)
        .arg("-o")
        .arg(directory.join("libcufile.so.0"));
    run(&mut linker);
}

/// Compiles the library into `directory`, which is made. Its name inside is the first that the bindings ask for, so that a
/// driver of this machine does not come before it.
pub(crate) fn compile(directory: &Path) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-cuda");
    std::fs::create_dir_all(directory).expect("a directory for the fake libcuda");
    let (library, kernels) = (directory.join("libcuda.so"), directory.join("kernels.o"));
    let mut compiler = Command::new(std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned()));
    compiler.args(COMMON).args(KERNELS).arg("-c");
    compiler
        .arg(sources.join("kernels.cpp"))
        .arg("-o")
        .arg(&kernels);
    run(&mut compiler);
    let mut linker = Command::new("cc");
    linker
        .args(COMMON)
        .args(["-std=gnu11", "-shared", "-Wl,-soname,libcuda.so"]);
    linker
        .arg(sources.join("libcuda.c"))
        .arg(&kernels)
        .arg("-o")
        .arg(&library);
    run(&mut linker);
    std::fs::remove_file(kernels).expect("linked, so it is not needed");
    library
}

fn run(compiler: &mut Command) {
    let output = compiler.output().expect("a compiler for C and C++");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler:?}: {said}");
}

//! Build script: the C library's soname, and (feature `run`) the ggml device compiled into the program.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libflea.so.0");
}

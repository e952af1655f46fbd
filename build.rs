//! Build script: compiles the ggml device into the program (feature `run`).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "run")]
    device::compile();
}

/// The ggml device FLEA for `flea run`: the source that also makes libggml-flea.so, against the headers of exactly the
/// ggml that is linked.
#[cfg(feature = "run")]
mod device {
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    const SOURCE: &str = "ffi-examples/ggml-flea";

    pub fn compile() {
        let llama = llama_source();
        let private = llama.join("ggml/src");
        for header in ["ggml-backend-impl.h", "ggml-impl.h"] {
            assert!(
                private.join(header).is_file(),
                "llama-cpp-sys-2 has no {header} in {}: its layout has changed, look again at build.rs",
                private.display()
            );
        }
        // For tests that compile against the very ggml that is linked.
        println!("cargo:rustc-env=TEST_LLAMA_SOURCE={}", llama.display());
        println!(
            "cargo:rustc-env=TEST_LLAMA_LIBS={}",
            llama_libraries().display()
        );
        println!("cargo:rerun-if-changed={SOURCE}");
        println!("cargo:rerun-if-changed=include/flea.h");
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .files(sources(Path::new(SOURCE)))
            .include("include")
            .include(SOURCE)
            // As system headers: ggml's own have unused functions and parameters.
            .flag("-isystem")
            .flag(llama.join("ggml/include"))
            .flag("-isystem")
            .flag(private)
            .warnings(true)
            .extra_warnings(true)
            .compile("ggml_flea");
        // llama.cpp's loader reads through src/host/file.rs.
        println!("cargo:rustc-link-arg=-Wl,--wrap=fread");
    }

    fn sources(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder)
            .unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
        let mut files: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "cpp"))
            .collect();
        files.sort();
        assert!(!files.is_empty(), "no .cpp file in {}", folder.display());
        files
    }

    /// Where llama-cpp-sys-2 has put ggml's static libraries.
    fn llama_libraries() -> PathBuf {
        PathBuf::from(env::var_os("DEP_LLAMA_ROOT").unwrap_or_default()).join("lib")
    }

    /// Where llama-cpp-sys-2 keeps llama.cpp. It does not say so itself, but its cmake does: the headers a device needs
    /// are in the sources and are not installed.
    fn llama_source() -> PathBuf {
        let root = env::var_os("DEP_LLAMA_ROOT").expect(
            "llama-cpp-sys-2 sets DEP_LLAMA_ROOT for build scripts of crates that depend on it",
        );
        let cache = Path::new(&root).join("build/CMakeCache.txt");
        let text = fs::read_to_string(&cache)
            .unwrap_or_else(|error| panic!("read {}: {error}", cache.display()));
        text.lines()
            .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
            .map(PathBuf::from)
            .unwrap_or_else(|| panic!("no CMAKE_HOME_DIRECTORY in {}", cache.display()))
    }
}

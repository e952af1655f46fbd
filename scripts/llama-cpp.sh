#!/usr/bin/env bash
# Gets stock, unmodified llama.cpp and builds the programs the tests compare flea with. Prints the directory on stdout:
#
#   DIR/src         the source (make ggml-flea LLAMA_CPP=DIR/src)
#   DIR/build/bin   llama-completion, llama-perplexity, llama-bench, llama-server, llama-quantize, llama-gguf-split
#
# The source is the one inside the source package of llama-cpp-python on PyPI, because llama-cpp-sys-2's own copy comes
# without the programs. The two copies are a few weeks apart (ggml 0.25.3 here, 0.26.0 there): compare a stock program
# with itself, with and without flea, where every bit has to agree.
# Built for this machine's CPU, with OpenMP; built again when the CPU is another one (a cache that was carried to another
# machine). A quick no-op when all is there.
set -euo pipefail

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
targets=(llama-completion llama-perplexity llama-bench llama-server llama-quantize llama-gguf-split)
options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_OPENMP=ON
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF)

dir=$("$(dirname "$0")/cache-dir.sh")/llama.cpp-$version
mkdir -p "$dir"
stamp=$dir/build/flea-stamp
wanted="$version ${targets[*]} ${options[*]} $(grep -m2 -E '^(model name|flags)' /proc/cpuinfo | sha256sum | cut -c1-16)"

is_complete() { [[ -f $stamp && $(<"$stamp") = "$wanted" ]]; }

build() {
  local log=$dir/build.log
  : >"$log"
  if [[ ! -f $dir/src/CMakeLists.txt ]]; then
    echo "llama.cpp: fetching the source package" >&2
    local download=$dir/download
    rm -rf "$download" "$dir/src"
    mkdir -p "$download/unpacked"
    # pip runs the package's own metadata step here, nothing is compiled.
    python3 -m pip download -q --no-deps --no-binary=:all: -d "$download" "llama-cpp-python==$version" >>"$log" 2>&1
    local package=$download/llama_cpp_python-$version.tar.gz
    echo "$sha256  $package" | sha256sum --check --quiet >&2
    tar -xzf "$package" -C "$download/unpacked" --strip-components=1
    mv "$download/unpacked/vendor/llama.cpp" "$dir/src"
    rm -rf "$download"
  fi
  # It names a submodule index that is not in the package; Ninja would run CMake again for ever.
  rm -f "$dir/src/.git"
  echo "llama.cpp: building (minutes, once per machine; log: $log)" >&2
  cmake -G Ninja -S "$dir/src" -B "$dir/build" "${options[@]}" >>"$log" 2>&1
  cmake --build "$dir/build" --target "${targets[@]}" >>"$log" 2>&1
  printf '%s' "$wanted" >"$stamp"
}

if ! is_complete; then
  exec 9>"$dir/lock"
  flock 9
  if ! is_complete; then
    # Objects compiled for another CPU must not be linked with ours.
    [[ ! -f $stamp ]] || rm -rf "$dir/build"
    trap 'echo "llama.cpp: failed, the end of $dir/build.log:" >&2; tail -n 20 "$dir/build.log" >&2' EXIT
    build 9>&-
    trap - EXIT
  fi
fi
printf '%s\n' "$dir"

#!/usr/bin/env bash
# make test: every test. Builds what the tests compare with and tells them where it is:
#
#   FLEA_TEST_BIN         the release `flea` as it is installed: llama.cpp in it, no fault injection
#   FLEA_TEST_LLAMA_CPP   directory of stock llama.cpp: src, build/bin
#   FLEA_TEST_GGML_FLEA   libggml-flea.so, built for exactly that llama.cpp
#   FLEA_TEST_EXAMPLES    directory of the C and C++ hosts
#   FLEA_TEST_HOSTS       directory of the tests' own llama.cpp host, llama-logits
#
# A test that lacks what it needs prints "SKIP: reason" and passes; .ci/run fails on a skip that is not in
# .ci/allowed-skips.txt. What all tests printed is kept in target/test-output.log.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

scripts/setup.sh
llama=$(scripts/llama-cpp.sh)

# Kept under a name of its own: the tests below build the program again, with fault injection.
cargo build --release --locked
mkdir -p "$target/test-bin"
cp "$target/release/flea" "$target/test-bin/flea"
make --no-print-directory ggml-flea LLAMA_CPP="$llama/src" CUDA=1
make --no-print-directory examples CUDA=1
cmake -S tests/hosts -B "$target/hosts/build" -DLLAMA_CPP="$llama/src" -DLLAMA_CPP_LIBS="$llama/build/bin" -DOUTPUT_DIR="$target/hosts"
cmake --build "$target/hosts/build"

export FLEA_TEST_BIN=$target/test-bin/flea
export FLEA_TEST_LLAMA_CPP=$llama FLEA_TEST_GGML_FLEA=$target/ggml-flea/libggml-flea.so FLEA_TEST_EXAMPLES=$target/examples FLEA_TEST_HOSTS=$target/hosts
# Idle OpenMP threads of llama.cpp spin by default and would starve the tests beside them.
export OMP_WAIT_POLICY=passive

log=$target/test-output.log
: >"$log"
run() { # Output of passing tests is wanted too: it holds the reasons of what was skipped.
  cargo test --locked --no-fail-fast "$@" -- --show-output 2>&1 | tee -a "$log"
}
# The rooms with debug assertions and overflow checks; then everything as it is shipped, plus fault injection.
result=0
run --no-default-features --features cli,cuda,faults --lib || result=$?
run --release --all-features --lib host:: || result=$?
run --release --all-features --bins --test '*' || result=$?
run --release --all-features --doc || result=$?
exit "$result"

#!/usr/bin/env bash
# Runs the C and C++ hosts of ffi-examples on the model in assets/ with AddressSanitizer, its leak check and UBSan; and the C
# example of the README as it is printed there. (valgrind knows neither AVX-512 nor moved mappings.)
#
# A checksum of every layer must be the same in C and C++, streamed and resident.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
model=assets/fable.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make --no-print-directory examples >/dev/null
cmake -S ffi-examples -B "$target/examples-asan" -DFLEA_SANITIZE=ON -DFLEA_INCLUDE="$target/capi/include" \
  -DFLEA_LIB="$target/capi/lib/libflea.so" >/dev/null
cmake --build "$target/examples-asan"

layers() { grep '^layer' "$1"; }
"$target/examples/stream" "$model" 110% 2 >"$work/resident"
for host in stream stream_cpp; do
  "$target/examples-asan/$host" "$model" 50% 3 >"$work/$host"
  cmp <(layers "$work/resident") <(layers "$work/$host")
  echo "$host: $(layers "$work/$host" | wc -l) layers, the same streamed as resident; ASan and UBSan have nothing to say"
done
for codec in tq:4 tq-ec:3.5 tcq:2 q8_0; do
  "$target/examples-asan/kv" "$codec" 128
done
awk '/^```c$/ { on = 1; next } /^```$/ { on = 0 } on' README.md >"$work/readme.c"
cc -std=c11 -Wall -Wextra -Werror -I "$target/capi/include" "$work/readme.c" -o "$work/readme" -L "$target/capi/lib" -lflea \
  -Wl,-rpath,"$target/capi/lib"
"$work/readme" "$model"
echo "README: its C example of $(wc -l <"$work/readme.c") lines compiles and runs"

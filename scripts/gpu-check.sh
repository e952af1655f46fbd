#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one report that names GPU, driver and link.
#
#   scripts/gpu-check.sh bundle [LLAMA.CPP]  where cargo is: puts what is needed into target/gpu-check
#   target/gpu-check/gpu-check.sh [OUT]      on the machine with the GPU: no cargo, no network
#
# LLAMA.CPP is the source of a stock llama.cpp (default: the one of scripts/llama-cpp.sh, where it has been fetched); the ggml that
# flea is linked with brings its own. What needs no compiler runs on every machine with a GPU; ggml-cuda is built where cmake
# and nvcc are.
#
# What it does there: the kernels of kernels/flea.fatbin against their references, byte for byte, by a runner of their own and as
# flea calls them; the same under compute-sanitizer where that is installed; rates of the kernels beside copies; streaming
# into VRAM from memory, from the drive, from both, compressed, and by GPUDirect Storage, with every byte compared; ggml-cuda
# with weights streamed, which must give the tokens that it gives with all of them in VRAM, and how fast, beside llama.cpp's -ngl.
# OUT (default: gpu-report) gets report.json and report.md; models are written to GPU_CHECK_DIR (default: OUT/models), which
# should be on the drive that is meant. GPU_CHECK_MODEL is the size of the largest (default 8GiB), GPU_CHECK_HALVES of the one that
# is compressed (2GiB), GPU_CHECK_KERNELS what the kernels work on (512MiB); GPU_CHECK_PROBE are words for flea probe (--sustain
# 5s), for a try that has to be shorter.
#
# A step that is done is not done again: where the time is up (GPU_CHECK_SECONDS, default 540) it ends with exit code 75, and
# the next call goes on from there. Builds go on where they were. What cannot be done there (no nvcc, no compute-sanitizer, ...)
# is no failure: the report names it, and why.
set -euo pipefail
began=$SECONDS
here=$(cd "$(dirname "$0")" && pwd)

# test_program NAME FEATURES: compiles an integration test and prints where it is.
test_program() {
  local program
  program=$(cargo test --release --locked --no-default-features --features "$2" --test "$1" --no-run --message-format=json |
    sed -n 's/.*"kind":\["test"\].*"name":"'"$1"'".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
  [[ -x $program ]] || { echo "gpu-check: cargo did not say where the test program $1 is" >&2; exit 1; }
  printf '%s\n' "$program"
}

# sources FOLDER NAME: what a build of llama.cpp needs of its source, in one file.
sources() {
  local parts=() part
  for part in CMakeLists.txt LICENSE cmake common ggml include src tools vendor; do
    [[ -e $1/$part ]] && parts+=("$part")
  done
  tar -C "$1" -czf "$folder/$2.tar.gz" "${parts[@]}"
}

bundle() {
  cd "$here/.."
  local target folder features llama own program
  target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
  folder=$target/gpu-check
  features=${GPU_CHECK_FEATURES:-cli,cuda,run}
  mkdir -p "$folder"
  program=$(test_program kernels cli)
  cp "$program" "$folder/kernels-test"
  program=$(test_program gpu_kernels cli,cuda)
  cp "$program" "$folder/gpu-kernels-test"
  cargo build --release --locked --no-default-features --features "$features" --bin flea
  cp "$target/release/flea" "$folder/flea"
  # Symbols are half of them, and the way to the other machine may be narrow.
  strip "$folder/flea" "$folder/kernels-test" "$folder/gpu-kernels-test"
  cp kernels/flea.fatbin scripts/gpu-check.sh "$folder/"
  # Linked here, so that the other machine needs no compiler: of the system it uses libc, libstdc++ is in it.
  "${CXX:-g++}" -std=c++17 -O2 -static-libstdc++ -static-libgcc kernels/check/device.cpp -o "$folder/device" -ldl
  # The ggml that flea is linked with: ggml-cuda has to be of the same version.
  own=$(cargo metadata --format-version 1 --locked --features run |
    grep -o '"manifest_path":"[^"]*/llama-cpp-sys-2-[^"]*/Cargo.toml"' | head -n 1 | sed 's/.*:"//; s/"$//' || true)
  [[ -n $own ]] && sources "$(dirname "$own")/llama.cpp" ggml
  llama=${1:-$(scripts/cache-dir.sh)/llama.cpp-0.3.36/src}
  if [[ -f $llama/CMakeLists.txt ]]; then
    sources "$llama" llama.cpp
  else
    echo "gpu-check: no llama.cpp in $llama: nothing is compared with -ngl (scripts/llama-cpp.sh fetches one)" >&2
  fi
  echo "gpu-check: $(du -sh "$folder" | cut -f1) in $folder; copy it to the machine with the GPU and run gpu-check.sh there"
}

if [[ ${1:-} = bundle ]]; then
  bundle "${@:2}"
  exit 0
fi

out=${1:-gpu-report}
mkdir -p "$out/steps" "$out/results"
out=$(realpath "$out")
models=${GPU_CHECK_DIR:-$out/models}
size=${GPU_CHECK_MODEL:-8GiB}
kernels_size=${GPU_CHECK_KERNELS:-512MiB}
[[ $kernels_size =~ ^[0-9]+MiB$ ]] || { echo "gpu-check: GPU_CHECK_KERNELS=$kernels_size: write it in MiB, as 512MiB" >&2; exit 2; }
mkdir -p "$models"
: >"$out/not-run"
export FLEA_PROFILE=$out/profile
mkdir -p "$FLEA_PROFILE"
limit=${GPU_CHECK_SECONDS:-540}
flea=$here/flea

left() { echo $((limit - (SECONDS - began))); }

# enough NAME SECONDS: goes on only where there is time for it.
enough() {
  if (($(left) < $2)); then
    echo "gpu-check: $(left) s are left and $1 needs $2: call again to go on" >&2
    exit 75
  fi
  echo "gpu-check: $1"
}

# step NAME SECONDS COMMAND...: runs it once; SECONDS is what it needs. Its output is kept, and how it ended.
step() {
  local name=$1 needed=$2 status=0
  shift 2
  [[ -f $out/steps/$name.status ]] && return 0
  enough "$name" "$needed"
  timeout "$(left)" "$@" >"$out/steps/$name.log" 2>&1 || status=$?
  # Cut off by the clock, it has shown nothing: the next call does it again.
  ((status == 124)) && { echo "gpu-check: $name ran out of time: call again" >&2; exit 75; }
  echo "$status" >"$out/steps/$name.status"
}
# missing NAME WHY: that step is not run on this machine. Told anew by every call.
missing() {
  echo "gpu-check: $1 is not run: $2" >&2
  printf '%s|%s\n' "$1" "$2" >>"$out/not-run"
}

status() { cat "$out/steps/$1.status" 2>/dev/null || echo none; }
passed() { [[ $(status "$1") = 0 ]]; }

# answer NAME SECONDS COMMAND...: as step, for a command whose stdout is one JSON object.
answer() {
  local name=$1 needed=$2
  shift 2
  step "$name" "$needed" answered "$out/results/$name.json" "$@"
}
cat >"$out/answered" <<'RUN'
#!/usr/bin/env bash
# answered FILE COMMAND...: stdout goes to the file.
set -euo pipefail
file=$1
shift
exec "$@" >"$file"
RUN
chmod +x "$out/answered"
PATH=$out:$PATH

# number NAME KEY [N]: the N-th number (default: the last) of that key in the answer of a step.
number() {
  local found
  found=$(grep -o "\"$2\":-\?[0-9.e+-]*" "$out/results/$1.json" 2>/dev/null | sed 's/.*://' || true)
  [[ -n $found ]] || return 0
  if [[ -n ${3:-} ]]; then sed -n "$3p" <<<"$found"; else tail -n 1 <<<"$found"; fi
}

# pass NAME KEY: that number of the last walk over all layers in the answer of a step.
pass() {
  sed 's/.*"passes":\[\([^]]*\)\].*/\1/' "$out/results/$1.json" 2>/dev/null | grep -o "\"$2\":[0-9.e+-]*" | tail -n 1 | sed 's/.*://' || true
}

for part in device flea flea.fatbin; do
  [[ -e $here/$part ]] || { echo "gpu-check: $here has no $part: run gpu-check.sh where \`gpu-check.sh bundle\` has put it" >&2; exit 2; }
done
if ! "$here/device" info >"$out/info.json" 2>"$out/info.err"; then
  cat "$out/info.err" >&2
  echo "gpu-check: no GPU that can be used" >&2
  exit 3
fi
link=unknown
driver=unknown
if command -v nvidia-smi >/dev/null; then
  link=$(nvidia-smi --id=0 --query-gpu=pcie.link.gen.max,pcie.link.width.max --format=csv,noheader | sed 's/ *, */ x/; s/^/PCIe /') || link=unknown
  driver=$(nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader) || driver=unknown
else
  missing nvidia-smi 'nvidia-smi is not installed: which driver and link these are is unknown'
fi

# ---- kernels ----------------------------------------------------------------------------------------------------

runner=(env "FLEA_FATBIN=$here/flea.fatbin" "FLEA_KERNELS_ON=$here/device")
sanitizer=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | head -n 1 || true)
if [[ -x $here/kernels-test ]]; then
  step kernels 200 "${runner[@]}" "$here/kernels-test" --skip fatbin --skip the_runner_for_gpus --test-threads 4
  if [[ -n $sanitizer ]]; then
    printf '#!/usr/bin/env bash\nset -euo pipefail\nexec %q --error-exitcode 9 %q "$@"\n' "$sanitizer" "$here/device" >"$out/sanitized"
    chmod +x "$out/sanitized"
    step sanitizer 300 "${runner[@]}" FLEA_KERNELS_ON="$out/sanitized" "$here/kernels-test" --test-threads 4 every_length quantised checksums
  else
    missing sanitizer 'compute-sanitizer is not installed; it comes with the CUDA toolkit'
  fi
  step rates 90 "${runner[@]}" "FLEA_KERNELS_REPORT=$out/rates.json" "FLEA_KERNELS_MIB=${kernels_size%MiB}" "$here/kernels-test" \
    --ignored rates_beside_a_copy
else
  missing kernels 'the bundle has no kernels-test'
fi
if [[ -x $here/gpu-kernels-test ]]; then
  step as-called 60 env FLEA_TEST_GPU=0 "$here/gpu-kernels-test" --test-threads 1 sums_of quantised_types packed_weights spans_are
else
  missing as-called 'the bundle has no gpu-kernels-test'
fi
answer bench-kernels 60 "$flea" bench kernels --gpu 0 --size "$kernels_size" --json

# ---- streaming --------------------------------------------------------------------------------------------------

model=$models/model.gguf
halves=$models/halves.gguf
coded=$models/halves.fleapack
step model 240 "$flea" synth -o "$model" --size "$size" --type q8_0
# Its default, a minute of reading on, is too much of the time there is.
read -r -a probe_words <<<"${GPU_CHECK_PROBE:---sustain 5s}"
answer probe 120 "$flea" probe "$models" --json "${probe_words[@]}"
stream=("$flea" bench stream "$model" --json)
into=("${stream[@]}" --gpu 0 --vram 25%)
answer drive-to-memory 120 "${stream[@]}" --memory 20% --passes 3
answer memory-to-vram 120 "${into[@]}" --memory 120% --passes 6
answer drive-to-vram 120 "${into[@]}" --memory 20% --passes 3
answer mixed 120 "${into[@]}" --memory 45% --passes 4
answer mixed-planned 30 "$flea" plan "$model" --vram 25% --memory 45% --json
answer every-byte 180 "${into[@]}" --memory 45% --passes 1 --verify
answer gds 60 "$flea" bench gds "$model" --gpu 0 --json
answer gds-stream 120 "${stream[@]}" --gpu 0 --vram 40% --reader gds --passes 3 --verify
step halves 120 "$flea" synth -o "$halves" --size "${GPU_CHECK_HALVES:-2GiB}" --type bf16
step pack 240 "$flea" pack --compress "$halves" -o "$coded" --force
answer packed 120 "$flea" bench stream "$coded" --gpu 0 --vram 50% --memory 120% --passes 5 --verify --json
answer not-packed 120 "$flea" bench stream "$halves" --gpu 0 --vram 50% --memory 120% --passes 5 --json

# ---- ggml-cuda --------------------------------------------------------------------------------------------------

nvcc=$(command -v nvcc || compgen -G '/usr/local/cuda*/bin/nvcc' | head -n 1 || true)

# unpacked NAME: the source of a bundle, in the report's folder.
unpacked() {
  [[ -f $out/$1-src/complete ]] && return
  rm -rf "$out/$1-src"
  mkdir -p "$out/$1-src"
  tar -xzf "$here/$1.tar.gz" -C "$out/$1-src"
  touch "$out/$1-src/complete"
}

# compiled NAME SECONDS FOLDER TARGETS: a build that goes on where the clock cut it off.
compiled() {
  local name=$1 folder=$3
  shift 3
  [[ -f $out/steps/$name.status ]] && return 0
  enough "$name" 30
  unpacked "${folder%%/*}"
  local source=$out/${folder%%/*}-src
  [[ $folder = */* ]] && source=$source/${folder#*/}
  local build=$out/$name-build status=0
  {
    [[ -f $build/CMakeCache.txt ]] ||
      timeout "$(left)" cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=ON -DGGML_NATIVE=ON \
        -DCMAKE_CUDA_COMPILER="$nvcc" -DCMAKE_CUDA_ARCHITECTURES=native -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF || { status=$?; rm -f "$build/CMakeCache.txt"; }
    ((status == 0)) && { timeout "$(left)" cmake --build "$build" -j "$(nproc)" --target "$@" || status=$?; }
  } >>"$out/steps/$name.log" 2>&1
  ((status == 124)) && { echo "gpu-check: $name is not built yet: call again" >&2; exit 75; }
  echo "$status" >"$out/steps/$name.status"
}

# generate NAME VRAM: tokens with weights in VRAM up to that, and their rate. Nothing but VRAM differs.
generate() {
  answer "$1" 120 "$flea" run "$model" --gpu 0 --vram "$2" --memory 110% --ggml-cuda "$cuda" -p 'One two three' -n 32 --json
}

# builds NAME SOURCE: whether ggml-cuda can be built here for that step; says why not.
builds() {
  local why=
  if [[ -z $nvcc ]]; then
    why='nvcc is not installed; it comes with the CUDA toolkit'
  elif ! command -v cmake >/dev/null; then
    why='cmake is not installed'
  elif [[ ! -f $here/$2.tar.gz ]]; then
    why="the bundle has no $2.tar.gz"
  else
    return 0
  fi
  missing "$1" "$why"
  return 1
}

# No pipe into grep -q, which may end before the program does.
can_run=$("$flea" run --help 2>/dev/null || true)
if [[ $can_run != *--ggml-cuda* ]]; then
  missing tokens 'this flea is built without the features run and cuda'
elif builds tokens ggml; then
  compiled ggml-cuda 30 ggml/ggml ggml-cuda
  cuda=$(find "$out/ggml-cuda-build" -name 'libggml-cuda.so*' -type f 2>/dev/null | head -n 1 || true)
  if [[ -n $cuda ]]; then
    for vram in 100 75 50 25; do generate "tokens-$vram" "$vram%"; done
  else
    missing tokens 'ggml-cuda was not built: see steps/ggml-cuda.log'
  fi
fi
if builds ngl llama.cpp; then
  compiled llama-bench 30 llama.cpp llama-bench
  bench=$(find "$out/llama-bench-build" -name llama-bench -type f 2>/dev/null | head -n 1 || true)
  layers=$("$flea" inspect "$model" --json 2>/dev/null | grep -o '"block_count":[0-9]*' | sed 's/.*://' | head -n 1 || true)
  if [[ -n $bench && -n $layers ]]; then
    for part in 75 50 25; do
      step "ngl-$part" 120 "$bench" -m "$model" -p 0 -n 16 -r 2 -ngl $((layers * part / 100)) -o json
    done
  else
    missing ngl 'llama-bench was not built, or the model has no layers: see steps/llama-bench.log'
  fi
fi

# ---- the report -------------------------------------------------------------------------------------------------

verdict() { # verdict STEP
  case $(status "$1") in
    0) echo passed ;;
    none) echo 'not run' ;;
    *) echo failed ;;
  esac
}

# told NAME: tokens and logits of a step that generates.
told() { grep -o '"logits_hash":"[^"]*"\|"token_ids":\[[^]]*\]' "$out/results/$1.json" 2>/dev/null || true; }

# same_tokens: whether every share of weights in VRAM gave the tokens, and the very logits, that all of them gave.

same_tokens() {
  local whole vram
  whole=$(told tokens-100)
  [[ -n $whole ]] || return 2
  for vram in 75 50 25; do
    passed "tokens-$vram" || return 2
    [[ $(told "tokens-$vram") = "$whole" ]] || return 1
  done
}

# shown NAME VALUE LEAST MOST: a figure beside what it should be. Fields: name, value, least, most, verdict.
shown() {
  [[ -n $2 ]] || return 0
  awk -v name="$1" -v value="$2" -v least="$3" -v most="$4" 'BEGIN {
    fine = value >= least && (most == "" || value <= most)
    printf "%s|%.4g|%s|%s|%s\n", name, value, least, most, fine ? "yes" : "no" }'
}
ratio() { [[ -n $1 && -n $2 ]] && awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.6g", a / b }'; return 0; }

figures() {
  local link_rate ram_rate vram_rate kernel
  link_rate=$(number bench-kernels pinned_to_device_gb_per_second)
  ram_rate=$(ratio "$(pass drive-to-memory bytes_read)" "$(pass drive-to-memory seconds)")
  vram_rate=$(ratio "$(pass drive-to-vram bytes_read)" "$(pass drive-to-vram seconds)")
  shown 'memory to VRAM, of pinned H2D' "$(ratio "$(pass memory-to-vram h2d_gb_per_second)" "$link_rate")" 0.95 ''
  shown 'drive to VRAM, of drive to memory' "$(ratio "$vram_rate" "$ram_rate")" 0.95 ''
  shown 'mixed, seconds of a pass, of those planned' "$(ratio "$(pass mixed seconds)" "$(number mixed-planned seconds_per_pass)")" 0.95 1.05
  kernel=$(grep -o '"of_copy":[0-9.]*' "$out/results/bench-kernels.json" 2>/dev/null | sed 's/.*://' | head -n 11 | sort -g | head -n 1 || true)
  shown 'slowest of verify and dequantise, of a copy' "$kernel" 0.85 ''
  shown 'unpacked weights, of pinned H2D' "$(number bench-kernels of_link)" 1 ''
  shown 'packed model into VRAM, time of the same not packed' \
    "$(ratio "$(pass packed seconds)" "$(pass not-packed seconds)")" 0 1
}
figures >"$out/figures" 2>/dev/null || true

steps=()
for file in "$out"/steps/*.status; do steps+=("$(basename "$file" .status)"); done
rates=null
[[ -s $out/rates.json ]] && rates=$(cat "$out/rates.json")
tokens='not run'
if same_tokens; then tokens=identical; elif (($? == 1)); then tokens=different; fi

{
  printf '{"info":%s,"driver":"%s","link":"%s","kernels":"%s","sanitizer":"%s","tokens":"%s","rates":%s,"figures":[' "$(cat "$out/info.json")" "$driver" \
    "$link" "$(verdict kernels)" "$(verdict sanitizer)" "$tokens" "$rates"
  separator=
  while IFS='|' read -r name value least most fine; do
    printf '%s{"name":"%s","value":%s,"least":%s,"most":%s,"fine":"%s"}' "$separator" "$name" "$value" "$least" "${most:-null}" "$fine"
    separator=,
  done <"$out/figures"
  printf '],"not_run":{'
  separator=
  while IFS='|' read -r name why; do
    printf '%s"%s":"%s"' "$separator" "$name" "$why"
    separator=,
  done <"$out/not-run"
  printf '},"steps":{'
  separator=
  for name in "${steps[@]}"; do
    result=null
    passed "$name" && [[ -s $out/results/$name.json ]] && result=$(cat "$out/results/$name.json")
    printf '%s"%s":{"verdict":"%s","result":%s}' "$separator" "$name" "$(verdict "$name")" "$result"
    separator=,
  done
  printf '}}\n'
} >"$out/report.json"
{
  echo '# flea on a GPU'
  echo
  sed 's/[{}"]//g; s/,/, /g; s/:/: /g' "$out/info.json"
  echo "Driver $driver, link $link."
  echo
  echo "* kernels, byte for byte what the references say: $(verdict kernels) ($(grep -c '^test .* ok$' "$out/steps/kernels.log" || true) tests); as flea calls them: $(verdict as-called)"
  echo "* compute-sanitizer: $(verdict sanitizer)"
  echo "* every byte in VRAM that of the file: $(verdict every-byte); of a compressed one: $(verdict packed)"
  echo "* GPUDirect Storage: $(grep -o '"gds":[a-z]*,"reason":[^}]*"' "$out/results/gds.json" 2>/dev/null | sed 's/"gds"://; s/,"gpu".*//' || echo 'not run')"
  echo "* tokens with 75, 50 and 25 % of the weights in VRAM, against all of them: $tokens"
  if [[ -s $out/figures ]]; then
    printf '\n| figure | value | should be | is |\n|---|---|---|---|\n'
    while IFS='|' read -r name value least most fine; do
      echo "| $name | $value | ${least}${most:+ to $most}$([[ -z $most ]] && echo ' or more') | $fine |"
    done <"$out/figures"
  fi
  if [[ -s $out/not-run ]]; then
    printf '\nNot run on this machine:\n\n'
    sed 's/^\([^|]*\)|/* \1: /' "$out/not-run"
  fi
  printf '\n| step | ended | what it said |\n|---|---|---|\n'
  for name in "${steps[@]}"; do
    why=
    passed "$name" || why=$(tail -n 1 "$out/steps/$name.log" | tr '|' ' ' | cut -c 1-300)
    echo "| $name | $(verdict "$name") | $why |"
  done
  if compgen -G "$out/results/tokens-*.json" >/dev/null; then
    printf '\n| weights in VRAM | flea, tokens/s | llama.cpp -ngl, tokens/s |\n|---|---|---|\n'
    for part in 100 75 50 25; do
      echo "| $part % | $(number "tokens-$part" tokens_per_second 1) | $(grep -o '"avg_ts": *[0-9.]*' "$out/steps/ngl-$part.log" 2>/dev/null | sed 's/.*: *//' | head -n 1) |"
    done
  fi
  if [[ $rates != null ]]; then
    printf '\nA copy on the device moves %s GB/s (read and written), pinned memory to the device %s GB/s.\n\n' \
      "$(sed 's/.*"copy_traffic_gb_per_second":\([0-9.]*\).*/\1/' <<<"$rates")" \
      "$(sed 's/.*"pinned_to_device_gb_per_second":\([0-9.]*\).*/\1/' <<<"$rates")"
    echo '| kernel | read and written, GB/s | result, GB/s | of the copy |'
    echo '|---|---|---|---|'
    # One row of the JSON a line; the order of its fields is the program's.
    tr '{' '\n' <<<"$rates" | sed -n 's/.*"name":"\([^"]*\)","traffic_gb_per_second":\([0-9.]*\),"result_gb_per_second":\([0-9.]*\),"of_copy":\([0-9.]*\).*/| \1 | \2 | \3 | \4 |/p'
  fi
} >"$out/report.md"
cat "$out/report.md"
# What could not be run is no failure; what failed, or gave other tokens, is.
for name in "${steps[@]}"; do
  [[ $(verdict "$name") = failed ]] && exit 1
done
[[ $tokens != different ]]

#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one report that names GPU, driver and link.
#
#   scripts/gpu-check.sh bundle             where cargo is: puts what is needed into target/gpu-check
#   target/gpu-check/gpu-check.sh [OUT]     on the machine with the GPU: no cargo, no network, no CUDA toolkit
#
# What it does there: the kernels of kernels/flea.fatbin against their references, byte for byte; the same under
# compute-sanitizer where that is installed; their rates beside copies in the same run. OUT (default: gpu-report) gets
# report.json and report.md. A step that is done is not done again: where the time is up (GPU_CHECK_SECONDS, default 540) it
# ends with exit code 75, and the next call goes on from there.
set -euo pipefail
began=$SECONDS
here=$(cd "$(dirname "$0")" && pwd)

bundle() {
  cd "$here/.."
  local target folder program
  target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
  folder=$target/gpu-check
  mkdir -p "$folder"
  program=$(cargo test --release --locked --no-default-features --features cli --test kernels --no-run --message-format=json |
    sed -n 's/.*"kind":\["test"\].*"name":"kernels".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
  [[ -x $program ]] || { echo "gpu-check: cargo did not say where the test program is" >&2; exit 1; }
  cp "$program" "$folder/kernels-test"
  cp kernels/flea.fatbin scripts/gpu-check.sh "$folder/"
  # Linked here, so that the other machine needs no compiler: of the system it uses libc, libstdc++ is in it.
  "${CXX:-g++}" -std=c++17 -O2 -static-libstdc++ -static-libgcc kernels/check/device.cpp -o "$folder/device" -ldl
  echo "gpu-check: $(du -sh "$folder" | cut -f1) in $folder; copy it to the machine with the GPU and run gpu-check.sh there"
}

if [[ ${1:-} = bundle ]]; then
  bundle
  exit 0
fi

out=${1:-gpu-report}
mkdir -p "$out/steps"
out=$(realpath "$out")
export FLEA_FATBIN=$here/flea.fatbin FLEA_KERNELS_ON=$here/device
limit=${GPU_CHECK_SECONDS:-540}

left() { echo $((limit - (SECONDS - began))); }

# step NAME SECONDS COMMAND...: runs it once; SECONDS is what it needs. Its output is kept, and how it ended.
step() {
  local name=$1 needed=$2 status=0
  shift 2
  [[ -f $out/steps/$name.status ]] && return 0
  if (($(left) < needed)); then
    echo "gpu-check: $(left) s are left and $name needs $needed: call again to go on" >&2
    exit 75
  fi
  echo "gpu-check: $name"
  timeout "$(left)" "$@" >"$out/steps/$name.log" 2>&1 || status=$?
  # Cut off by the clock, it has shown nothing: the next call does it again.
  ((status == 124)) && { echo "gpu-check: $name ran out of time: call again" >&2; exit 75; }
  echo "$status" >"$out/steps/$name.status"
}
status() { cat "$out/steps/$1.status" 2>/dev/null || echo none; }

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
fi

same=("$here/kernels-test" --skip fatbin --skip the_runner_for_gpus --test-threads 4)
step kernels 200 "${same[@]}"
sanitizer=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | head -n 1 || true)
if [[ -n $sanitizer ]]; then
  printf '#!/usr/bin/env bash\nset -euo pipefail\nexec %q --error-exitcode 9 %q "$@"\n' "$sanitizer" "$here/device" >"$out/sanitized"
  chmod +x "$out/sanitized"
  step sanitizer 300 env FLEA_KERNELS_ON="$out/sanitized" "$here/kernels-test" --test-threads 4 every_length quantised checksums
fi
step rates 90 env FLEA_KERNELS_REPORT="$out/rates.json" "$here/kernels-test" --ignored rates_beside_a_copy

verdict() { # verdict STEP
  case $(status "$1") in
    0) echo passed ;;
    none) echo 'not run' ;;
    *) echo failed ;;
  esac
}
rates=null
[[ -s $out/rates.json ]] && rates=$(cat "$out/rates.json")
printf '{"info":%s,"driver":"%s","link":"%s","kernels":"%s","sanitizer":"%s","rates":%s}\n' "$(cat "$out/info.json")" "$driver" "$link" \
  "$(verdict kernels)" "$(verdict sanitizer)" "$rates" >"$out/report.json"
{
  echo '# Kernels on a GPU'
  echo
  sed 's/[{}"]//g; s/,/, /g; s/:/: /g' "$out/info.json"
  echo "Driver $driver, link $link."
  echo
  echo "* byte for byte what the references say: $(verdict kernels) ($(grep -c '^test .* ok$' "$out/steps/kernels.log" || true) tests)"
  echo "* compute-sanitizer: $(verdict sanitizer)"
  echo "* rates: $(verdict rates)"
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
[[ $(verdict kernels) = passed && $(verdict rates) = passed && $(verdict sanitizer) != failed ]]

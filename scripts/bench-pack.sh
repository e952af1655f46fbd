#!/usr/bin/env bash
# A model as it is and as `flea pack` writes it, streamed in turns: whether packing pays, and by how much.
#
#   scripts/bench-pack.sh MODEL.gguf [memory]          default 25%
#
# Needs as much disk as the model below $TMPDIR or /var/tmp, and the built program ($FLEA, default target/release/flea).
set -euo pipefail
model=$(realpath -e "${1:?usage: bench-pack.sh MODEL.gguf [memory]}") memory=${2:-25%} rounds=${ROUNDS:-5}
cd "$(dirname "$0")/.."
flea=$(realpath -m "${FLEA:-${CARGO_TARGET_DIR:-target}/release/flea}")
[[ -x $flea ]] || { echo "bench-pack: $flea is not there: make build, or FLEA=..." >&2; exit 2; }

place=$(mktemp -d "${TMPDIR:-/var/tmp}/flea-pack.XXXXXX")
trap 'rm -rf "$place"' EXIT
trap 'exit 130' INT TERM
"$flea" pack "$model" -o "$place/packed.gguf" >&2
sync

one() { # GB/s of the passes after the first, and bytes of a pass
  "$flea" bench stream "$1" --memory "$memory" --passes 3 --json | python3 -c '
import json, sys
passes = json.load(sys.stdin)["passes"][1:]
read = sum(p["bytes_read"] for p in passes)
print("%.4f %d" % (read / sum(p["seconds"] for p in passes) / 1e9, read / len(passes)))'
}
for _ in $(seq "$rounds"); do
  echo "plain $(one "$model")"
  echo "packed $(one "$place/packed.gguf")"
done | tee "$place/samples" >&2
python3 - "$place/samples" <<'PYTHON'
import statistics, sys
samples = {"plain": [], "packed": []}
for line in open(sys.argv[1]):
    name, rate, read = line.split()
    samples[name].append((float(rate), int(read)))
ratios = [ours[0] / theirs[0] for ours, theirs in zip(samples["packed"], samples["plain"])]
rate = {name: statistics.median(rate for rate, _ in found) for name, found in samples.items()}
read = {name: found[0][1] for name, found in samples.items()}
print("plain %.3f GB/s, packed %.3f GB/s: %.3f (%.3f..%.3f) of it; bytes of a pass %.4f of it"
      % (rate["plain"], rate["packed"], statistics.median(ratios), min(ratios), max(ratios), read["packed"] / read["plain"]))
PYTHON

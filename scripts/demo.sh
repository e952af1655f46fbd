#!/usr/bin/env bash
# make demo: a real model read from the drive while it computes, the same model in memory, and the drive's line rate.
#
# Needs no root. Writes only below target/ and takes its files away again, also when it is interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

model=assets/fable.gguf
prompt='Once upon a time'
target=${CARGO_TARGET_DIR:-target}
flea=$target/release/flea

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[[ -t 1 && -z "${NO_COLOR:-}" ]] || say() { printf '\n%s\n' "$*"; }
figure() { printf '  %-34s %s\n' "$1" "$2"; }
json() { jq -r "$2" "$1"; }

scripts/setup.sh --demo
if [[ ! -x $flea ]]; then
  echo "demo: building flea; llama.cpp is compiled with it, which takes minutes the first time"
fi
cargo build --release --locked --quiet

# Beside the build: /tmp may be memory, which has no line rate to show.
work=$(mktemp -d "$target/demo.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
started=$SECONDS

say "1. $model with half of its weights in memory: flea run --memory 50%"
"$flea" run "$model" -p "$prompt" -n 160 --memory 50%

say "2. The same three times: streamed, resident in flea's pool, and by llama.cpp alone"
run() { # run NAME OPTIONS: what it says on standard error matters only when it fails
  "$flea" run "$model" -p "$prompt" -n 160 --json "${@:2}" >"$work/$1.json" 2>"$work/stderr" || { cat "$work/stderr" >&2; return 1; }
}
run streamed --memory 50%
run resident --memory 110%
run alone --no-stream
s=$work/streamed.json
figure 'model' "$(json "$s" '"\(.model_bytes) bytes, \(.resident_bytes) of them resident"')"
figure 'read from the drive for each token' "$(json "$s" '"\(.streamed_bytes_per_pass) bytes"')"
figure 'read in all' "$(json "$s" '"\(.bytes_read) bytes by \(.reader), \(if .direct_io then "O_DIRECT" else "buffered" end)"')"
figure 'leases, and loads behind them' "$(json "$s" '"\(.acquires), \(.loads)"')"
figure 'tokens per second' "$(for run in streamed resident alone; do json "$work/$run.json" '.tokens_per_second * 10 | round / 10'; done |
  paste -sd ' ' | awk '{ print $1 " streamed, " $2 " resident, " $3 " llama.cpp alone" }')"

# What makes the comparison worth anything: the streamed run streamed, the others did not.
jq -e '.streamed_bytes_per_pass > 0 and .resident_bytes < .model_bytes and .loads > 0' "$s" >/dev/null ||
  { echo "demo: FAILED: the first run did not stream" >&2; exit 1; }
jq -e '.streamed_bytes_per_pass == 0 and .acquires > 0' "$work/resident.json" >/dev/null ||
  { echo "demo: FAILED: the second run was not resident" >&2; exit 1; }
jq -e '.acquires == 0' "$work/alone.json" >/dev/null ||
  { echo "demo: FAILED: the third run used flea's device" >&2; exit 1; }
for other in resident alone; do
  if ! jq -se 'map([.token_ids, .logits_hash]) | .[0] == .[1]' "$s" "$work/$other.json" >/dev/null; then
    echo "demo: FAILED: the streamed run and the $other one differ" >&2
    exit 1
  fi
done
echo "  Identical: the same $(json "$s" '.token_ids | length') tokens, and the same logits bit for bit ($(json "$s" .logits_hash))."

say "3. Line rate: a synthetic model of 1 GiB at a fifth of its size, beside the drive itself"
# 24 layers: large enough each for 2 MiB pages, as the layers of real models are.
"$flea" synth --size 1GiB --layers 24 -o "$work/synthetic.gguf" >/dev/null
# Each twice, in turns, and the better one counts: drives drift within a minute, and what runs beside disturbs.
for turn in 1 2; do
  "$flea" bench raw "$work/synthetic.gguf" --seconds 0.2 --json >"$work/raw$turn.json"
  "$flea" bench stream "$work/synthetic.gguf" --memory 20% --passes 4 --json >"$work/stream$turn.json"
done
best() { jq -se 'map(.gb_per_second) | max' "$work/$1"[12].json; }
figure 'the drive alone (flea bench raw)' "$(printf '%.2f GB/s' "$(best raw)")"
figure 'through flea (flea bench stream)' "$(printf '%.2f GB/s' "$(best stream)")"
figure 'ratio' "$(jq -n "$(best stream) / $(best raw) * 100 | round / 100")"
figure 'processor time per GB' "$(json "$work/stream2.json" '"\(.cpu_seconds_per_gb * 1000 | round) ms"')"
figure 'memory in all, at its highest' "$(json "$work/stream2.json" '"\(.peak_memory_bytes / 1048576 | round) MiB of a model of \(.model_bytes / 1048576 | round) MiB"')"

say "Done in $((SECONDS - started)) seconds. Now with a model of yours:  $flea run MODEL.gguf -p TEXT --memory 4GiB"

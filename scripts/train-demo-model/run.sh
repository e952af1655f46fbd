#!/usr/bin/env bash
# Makes assets/fable.gguf from nothing: writes the stories, trains the tokenizer and the model, exports, checks.
#
#   scripts/train-demo-model/run.sh [OUTPUT.gguf]
#
# About 20 minutes on two idle cores, no GPU. Seeded; resumes where it was stopped. The tools live in a Python environment of
# its own, below the cache directory, with the versions of requirements.txt.
set -euo pipefail
cd "$(dirname "$0")"
output=$(realpath -m "${1:-../../assets/fable.gguf}")
work=$(../cache-dir.sh)/train-demo-model
mkdir -p "$work"
exec 9>"$work/lock"
flock 9

if ! cmp -s requirements.txt "$work/venv/requirements.txt"; then
  rm -rf "$work/venv"
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$work/venv/requirements.txt"
fi
python=$work/venv/bin/python
export PYTHONDONTWRITEBYTECODE=1

"$python" train.py "$work/run"
"$python" export.py "$work/run" "$output.new"
"$python" check.py "$work/run" "$output.new" "$(../llama-cpp.sh)/build/bin"
mv "$output.new" "$output"
(cd "$(dirname "$output")" && sha256sum "$(basename "$output")")

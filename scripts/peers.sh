#!/usr/bin/env bash
# Sets up what `flea bench suite` compares flea with, outside of the checkout:
#
#   stock llama.cpp                          scripts/llama-cpp.sh, built for this machine
#   fastsafetensors, runai-model-streamer    from PyPI, with torch (about 5 GB), in CACHE/peers
#
# A loader that does not install is told and left out; its rows then say that it is missing. With arguments the suite is
# run as well: scripts/peers.sh --quick --out results. A quick no-op when all is there.
set -euo pipefail

here=$(dirname "$0")
cache=$("$here/cache-dir.sh")
python=$cache/peers/bin/python

"$here/llama-cpp.sh" >&2

loads() { # loads MODULE: whether Python can import it
  [[ -x $python ]] && "$python" -c "import torch, $1" >/dev/null 2>&1
}

mkdir -p "$cache"
[[ -x $python ]] || python3 -m venv "$cache/peers"
for package in fastsafetensors runai-model-streamer; do
  module=${package//-/_}
  loads "$module" && continue
  echo "peers: installing $package (and torch) into $cache/peers; log: $cache/peers.log" >&2
  # fastsafetensors does not name torch as what it needs.
  "$python" -m pip install -q torch numpy "$package" >"$cache/peers.log" 2>&1 || true
  loads "$module" || echo "peers: $package does not install here; the suite will say that it is missing" >&2
done

if (($# > 0)); then
  flea=${FLEA_BIN:-$here/../target/release/flea}
  exec "$flea" bench suite "$@"
fi

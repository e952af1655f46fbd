#!/usr/bin/env bash
# Builds kernels/flea.fatbin, the CUDA kernels that flea carries, from kernels/*.cu. cargo never does: it needs no CUDA.
#
#   scripts/build-kernels.sh            builds it anew, and notes in kernels/SHA256SUMS from what
#   scripts/build-kernels.sh --check    builds it elsewhere and compares, byte for byte
#
# The toolkit is CUDA 13.0 from PyPI, at pinned versions, installed once into flea's cache (about 105 MB to fetch). With --check,
# a machine that cannot get it says so and compares the checksums alone.
#
# The fatbin holds PTX for compute capability 8.0 and machine code for the GPUs below. The PTX says that it is of version 7.0
# of the language (CUDA 11.0), not of the 9.0 that this nvcc writes by default: it uses nothing newer, ptxas checks that, and
# drivers refuse PTX that is newer than they are.
set -euo pipefail
cd "$(dirname "$0")/.."

architectures=(80 86 89 90 100 120)
toolkit=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
sources=(crc32c.cu dequantise.cu flea.cu portable.cuh unpack.cu)

check=
case "${1:-}" in
  --check) check=yes ;;
  '') ;;
  *) echo "usage: scripts/build-kernels.sh [--check]" >&2; exit 2 ;;
esac

same_sources() {
  (cd kernels && sha256sum --check --strict --quiet SHA256SUMS)
}

cache=$(scripts/cache-dir.sh)/cuda-13.0
get_toolkit() {
  [[ -f $cache/complete ]] && return
  rm -rf "$cache"
  mkdir -p "$cache"
  echo "build-kernels: installing the CUDA 13.0 compiler into $cache; log: $cache/pip.log" >&2
  python3 -m venv "$cache/python" || return 1
  "$cache/python/bin/pip" install -q --retries 1 --timeout 30 --no-deps "${toolkit[@]}" >"$cache/pip.log" 2>&1 || return 1
  touch "$cache/complete"
}

if ! get_toolkit; then
  if [[ -n $check ]]; then
    same_sources
    echo "build-kernels: the CUDA compiler cannot be had here; kernels/flea.fatbin was built from these sources, says SHA256SUMS"
    exit 0
  fi
  echo "build-kernels: the CUDA compiler cannot be installed, see $cache/pip.log" >&2
  exit 1
fi
bin=$(echo "$cache"/python/lib/python3*/site-packages/nvidia/cu13/bin)
[[ -x $bin/nvcc ]] || { echo "build-kernels: no nvcc in $bin" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kernels"
(cd kernels && cp "${sources[@]}" "$work/kernels")
cd "$work/kernels"
# -fmad=false is a second guard: what must not be fused is written with intrinsics.
"$bin/nvcc" -std=c++17 -O3 -fmad=false -Werror all-warnings -arch=compute_80 -ptx flea.cu -o "$work/flea.ptx"
sed -i 's/^\.version .*/.version 7.0/' "$work/flea.ptx"
images=("--image3=kind=ptx,sm=80,file=$work/flea.ptx")
for architecture in "${architectures[@]}"; do
  "$bin/ptxas" -O3 -arch="sm_$architecture" "$work/flea.ptx" -o "$work/$architecture.cubin"
  images+=("--image3=kind=elf,sm=$architecture,file=$work/$architecture.cubin")
done
"$bin/fatbinary" -64 --create="$work/flea.fatbin" "${images[@]}"
cd - >/dev/null

if [[ -n $check ]]; then
  same_sources
  cmp "$work/flea.fatbin" kernels/flea.fatbin
  echo "build-kernels: kernels/flea.fatbin is what nvcc 13.0.88 makes of kernels/*.cu, byte for byte"
else
  cp "$work/flea.fatbin" kernels/flea.fatbin
  (cd kernels && sha256sum "${sources[@]}" flea.fatbin >SHA256SUMS)
  echo "build-kernels: kernels/flea.fatbin, $(stat -c %s kernels/flea.fatbin) bytes"
fi

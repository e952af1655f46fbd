#!/usr/bin/env bash
# Makes a Debian-like machine with Rust ready to build and test flea. Does nothing, quickly, when everything is there.
#
#   scripts/setup.sh            everything: build, tests, demo
#   scripts/setup.sh --build    what `cargo build` needs
#   scripts/setup.sh --demo     and what `make demo` needs besides
#
# Looks for the tools themselves, not for packages, so it is content on any distribution that has them. What is missing
# is installed with apt-get where that is possible (as root, or with sudo that asks no password); otherwise it is named.
set -euo pipefail

wanted=all
case "${1:-}" in
  --build) wanted=build ;;
  --demo) wanted=demo ;;
  '') ;;
  *) echo "usage: scripts/setup.sh [--build | --demo]" >&2; exit 2 ;;
esac

missing=()
need() { # need PACKAGE PROBE...: the package is missing when the probe fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
has_libclang() {
  [[ -n "${LIBCLANG_PATH:-}" ]] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' || compgen -G '/usr/lib*/libclang.so*' ||
    compgen -G '/usr/lib/*/libclang*.so*'
}
probe() {
  missing=()
  need cmake command -v cmake
  need ninja-build command -v ninja
  need g++ command -v g++
  need pkg-config command -v pkg-config
  need libclang-dev has_libclang
  # hwloc's pkg-config file asks for libudev when it is linked the way hwlocality does.
  need libhwloc-dev pkg-config --atleast-version=2.8 hwloc
  need libudev-dev pkg-config libudev
  [[ $wanted = build ]] && return
  need jq command -v jq
  [[ $wanted = demo ]] && return
  need fio command -v fio
  # The tests of flead's units check them and run them under a real systemd.
  need systemd test -x /lib/systemd/systemd
  need procps command -v pgrep
  # The browser of the dashboard's tests, about 85 MB to fetch and 300 MB installed.
  need chromium command -v chromium
  need chromium-driver command -v chromedriver
  need python3-pip python3 -m pip --version
  need python3-venv python3 -c 'import ensurepip, venv'
}

rust_minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
if ! command -v cargo >/dev/null; then
  echo "setup: no cargo found. Install Rust $rust_minimum or later (rustup, or your distribution's packages) and run this again." >&2
  exit 1
fi
rust=$(rustc --version | cut -d' ' -f2)
if [[ $(printf '%s\n' "$rust_minimum" "${rust%%-*}" | sort -V | head -n1) != "$rust_minimum" ]]; then
  echo "setup: Rust $rust is too old, flea needs $rust_minimum. Try: rustup update" >&2
  exit 1
fi

probe
if ((${#missing[@]} == 0)); then
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=(sudo)
  else
    as_root=(false)
  fi
fi
if [[ ${as_root[0]:-} = false ]] || ! command -v apt-get >/dev/null; then
  echo "setup: missing: ${missing[*]}" >&2
  echo "setup: these are Debian's package names; install them as root, for example: apt-get install ${missing[*]}" >&2
  exit 1
fi

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -q
"${as_root[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
probe
if ((${#missing[@]} > 0)); then
  echo "setup: still missing after the installation: ${missing[*]}" >&2
  exit 1
fi

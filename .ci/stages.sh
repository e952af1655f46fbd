# Sourced by .ci/run: stages with their time, and the checks that are not one command.
# shellcheck shell=bash

stages_passed=0
stage_name=none
stage() { # stage NAME COMMAND...: the first failing stage ends the run
  stage_name=$1
  shift
  local started=$SECONDS
  printf '\n=== %s\n' "$stage_name"
  "$@"
  stages_passed=$((stages_passed + 1))
  printf '=== %s: ok, %d s\n' "$stage_name" $((SECONDS - started))
}
say_where_it_failed() {
  local status=$?
  ((status == 0)) || printf '\n=== %s: FAILED (exit %d)\n' "$stage_name" "$status"
}
trap say_where_it_failed EXIT

finish() {
  # The tests' own closing lines carry the counts; this one is about the stages.
  printf '\nstages: %d passed, 0 failed\n' "$stages_passed"
}

# A clean checkout need not compile llama.cpp again: in CI the target directory is kept outside of it, one per set of
# dependencies. Sources are rebuilt by their time stamps, which a new checkout makes new.
use_cached_target() {
  [[ "${CI:-}" = true && -z "${CARGO_TARGET_DIR:-}" ]] || return 0
  local cache key
  cache=$(scripts/cache-dir.sh)
  key=$( (cat Cargo.lock rust-toolchain* .cargo/config.toml 2>/dev/null; rustc -vV; grep -m1 '^flags' /proc/cpuinfo) | sha256sum | cut -c1-12)
  mkdir -p "$cache"
  # Two runs at once would overwrite each other's programs. The lock falls with this shell; a run that hangs must not
  # hang the next one, which then builds everything in its own checkout.
  exec 8>"$cache/ci.lock"
  if ! flock -w 60 8; then
    printf 'target directory: the checkout has its own, another run holds %s\n' "$cache/ci.lock"
    return 0
  fi
  find "$cache" -maxdepth 1 -name 'ci-target-*' ! -name "ci-target-$key" -exec rm -rf {} +
  export CARGO_TARGET_DIR=$cache/ci-target-$key
  # CMake's directories belong to the checkout that made them; they take seconds.
  rm -rf "$CARGO_TARGET_DIR"/{ggml-flea,examples,examples-asan,hosts}
  printf 'target directory: %s\n' "$CARGO_TARGET_DIR"
}

# The header test has compared it already; this catches a header that was blessed but not committed.
header_is_current() {
  make --no-print-directory header >/dev/null
  git diff --exit-code -- include/flea.h
}

# Every "SKIP: reason" (or "SKIPPED test: reason") of the tests must match a line (an extended regular expression) of the committed list.
no_new_skips() {
  local target log allowed skips
  target=${CARGO_TARGET_DIR:-target}
  log=$target/test-output.log
  allowed=$(grep -v -E '^(#|[[:space:]]*$)' .ci/allowed-skips.txt || true)
  skips=$(grep -o -E '(SKIP: |SKIPPED ).*' "$log" | sort -u || true)
  [[ -z "$skips" ]] && { echo 'nothing was skipped'; return 0; }
  printf '%s\n' "$skips"
  [[ -n "$allowed" ]] && skips=$(grep -v -x -E -f <(printf '%s\n' "$allowed") <<<"$skips" || true)
  [[ -z "$skips" ]] || { printf 'not in .ci/allowed-skips.txt:\n%s\n' "$skips" >&2; return 1; }
}

# What `make install` puts down is complete: the program runs, a C program finds the library by pkg-config and runs.
install_works() {
  local root
  root=$(mktemp -d)
  make --no-print-directory install PREFIX="$root" >/dev/null
  "$root/bin/flea" --version
  "$root/bin/flead" --version
  "$root/bin/flea-ctl" config check "$root/etc/flea/flead.toml"
  grep -qx "ExecStart=$root/bin/flead" "$root/lib/systemd/system/flead.service"
  cat >"$root/hello.c" <<'C'
#include <flea.h>
#include <stdio.h>
int main(void) { return printf("libflea abi %u, %s\n", flea_abi_version(), flea_status_name(FLEA_E_REFUSED)) < 0; }
C
  # shellcheck disable=SC2046
  PKG_CONFIG_PATH=$root/lib/pkgconfig cc -Wall -Wextra -Werror "$root/hello.c" -o "$root/hello" \
    $(PKG_CONFIG_PATH=$root/lib/pkgconfig pkg-config --cflags --libs flea) -Wl,-rpath,"$root/lib"
  "$root/hello"
  rm -rf "$root"
}

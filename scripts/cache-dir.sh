#!/usr/bin/env bash
# Prints the directory in which flea's scripts keep what is slow to make and may be deleted at any time.
set -euo pipefail
printf '%s\n' "${FLEA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flea}"

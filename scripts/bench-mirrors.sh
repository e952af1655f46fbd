#!/usr/bin/env bash
# Copies of a model on several drives, read together: two loop devices, throttled to a given speed, alone and both.
#
#   sudo scripts/bench-mirrors.sh [MB/s of the first] [MB/s of the second]     default 300 600
#
# Needs root (loop devices, mounts, a cgroup that throttles), 5 GB below $TMPDIR or /var/tmp, and the built program
# ($FLEA, default target/release/flea). Everything it makes is taken down again, also after Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
first=${1:-300} second=${2:-600} rounds=${ROUNDS:-3}
flea=$(realpath -m "${FLEA:-${CARGO_TARGET_DIR:-target}/release/flea}")
[[ $EUID == 0 ]] || { echo "bench-mirrors: needs root: loop devices and a cgroup that throttles" >&2; exit 4; }
[[ -x $flea ]] || { echo "bench-mirrors: $flea is not there: make build, or FLEA=..." >&2; exit 2; }

place=$(mktemp -d "${TMPDIR:-/var/tmp}/flea-mirrors.XXXXXX")
group= enabled= devices=()
clean() {
  cd /
  for side in a b; do ! mountpoint -q "$place/$side" || umount "$place/$side"; done
  for device in "${devices[@]}"; do losetup -d "$device"; done
  [[ -z $group ]] || rmdir "$group"
  [[ -z $enabled ]] || echo -io >"$controllers"
  rm -rf "$place"
}
trap clean EXIT
trap 'exit 130' INT TERM

mount_one() { # side: an ext4 of its own on a loop device without a page cache of its own
  local device
  fallocate -l 2400M "$place/$1.img"
  device=$(losetup --find --show --direct-io=on "$place/$1.img")
  devices+=("$device")
  mkfs.ext4 -q -m 0 "$device"
  mkdir "$place/$1"
  mount "$device" "$place/$1"
}
mount_one a
mount_one b
"$flea" synth --arch llama --size 2GiB --type q8_0 -o "$place/a/model.gguf" >/dev/null
cp "$place/a/model.gguf" "$place/b/model.gguf"
sync

# Version 1 of cgroups has a file for the rate, version 2 one for all of it.
if [[ -d /sys/fs/cgroup/blkio ]]; then
  group=/sys/fs/cgroup/blkio/flea-mirrors.$$ file=blkio.throttle.read_bps_device format='%s %s\n'
else
  controllers=/sys/fs/cgroup/cgroup.subtree_control
  if ! grep -qw io $controllers; then
    echo +io >$controllers
    enabled=1
  fi
  group=/sys/fs/cgroup/flea-mirrors.$$ file=io.max format='%s rbps=%s\n'
fi
mkdir "$group"
throttle() { # device, MB/s
  local number
  number=$(lsblk -dno MAJ:MIN "$1" | tr -d ' ')
  # shellcheck disable=SC2059 # the format is one of the two above
  printf "$format" "$number" $(($2 * 1000000)) >"$group/$file"
}
throttle "${devices[0]}" "$first"
throttle "${devices[1]}" "$second"

one() { # GB/s of the passes after the first
  (
    echo $BASHPID >"$group/cgroup.procs"
    exec "$flea" bench stream --memory 20% --passes 3 --json "$@"
  ) | python3 -c '
import json, sys
answer = json.load(sys.stdin)
passes = answer["passes"][1:]
rate = sum(p["bytes_read"] for p in passes) / sum(p["seconds"] for p in passes) / 1e9
shares = [copy["bytes_read"] for copy in answer["mirrors"]]
print("%.4f %.3f" % (rate, shares[0] / sum(shares) if len(shares) > 1 else 1))'
}
for round in $(seq "$rounds"); do
  echo "first $(one "$place/a/model.gguf")"
  echo "second $(one "$place/b/model.gguf")"
  echo "both $(one "$place/a/model.gguf" --mirror "$place/b")"
done | tee "$place/samples" >&2
python3 - "$place/samples" <<'PYTHON'
import statistics, sys
samples = {}
for line in open(sys.argv[1]):
    name, rate, share = line.split()
    samples.setdefault(name, []).append((float(rate), float(share)))
median = {name: statistics.median(rate for rate, _ in found) for name, found in samples.items()}
share = statistics.median(share for _, share in samples["both"])
print("first %.3f GB/s, second %.3f GB/s, both %.3f GB/s: %.2f of their sum, %.0f %% of it from the first"
      % (median["first"], median["second"], median["both"], median["both"] / (median["first"] + median["second"]), 100 * share))
PYTHON

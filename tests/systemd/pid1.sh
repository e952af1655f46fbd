#!/usr/bin/env bash
# flead under a real systemd: PID 1 of its own namespaces, with the units of systemd/ as they are installed.
#
#   tests/systemd/pid1.sh DIRECTORY     DIRECTORY holds bin/flead, bin/flea-ctl and models/, and is seen at /opt/flea
#
# Needs root, for the namespaces and a cgroup. Everything it mounts and starts vanishes with the namespaces. Prints one
# "ok: ..." line per promise that was kept and stops at the first that was not, with flead's log.
set -euo pipefail
cd "$(dirname "$0")/../.."
units=$PWD/systemd
stage=$(realpath "$1")

if [[ "${2:-}" != inside ]]; then
  # A cgroup of its own, so that systemd finds a hierarchy it may rule.
  hierarchy=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
  [[ -n "$hierarchy" ]] || { echo 'no cgroup2 hierarchy is mounted' >&2; exit 77; }
  cgroup=$hierarchy/flea-test-$$
  mkdir "$cgroup"
  clean_up() {
    # Everything in there dies with PID 1, but takes a moment; the cgroups go leaf first.
    for _ in $(seq 50); do
      find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null && break
      sleep 0.1
    done
  }
  trap clean_up EXIT
  echo $$ >"$cgroup/cgroup.procs"
  # Whatever ends this script ends PID 1 and with it everything below.
  setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount --propagation private --mount-proc --uts --ipc --net --cgroup "$0" "$stage" inside &
  main=$!
  echo $$ >"$hierarchy/cgroup.procs"
  status=0
  # PID 1 in there is the child of unshare.
  for _ in $(seq 100); do
    init=$(pgrep -P "$main" || true)
    [[ -n "$init" && -S /proc/$init/root/run/systemd/private ]] && break
    kill -0 "$main" 2>/dev/null || { echo 'the namespaces could not be made' >&2; exit 77; }
    sleep 0.1
  done
  nsenter -t "$init" -m -p -u -i -n -C bash "$PWD/tests/systemd/promises.sh" || status=$?
  kill -KILL "$main" "$init" 2>/dev/null || true
  wait "$main" 2>/dev/null || true
  exit "$status"
fi

# From here on PID 1 of the namespaces.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/etc /run/units /run/opt/flea /run/lib-flea /run/empty
# /etc with the user that sysusers makes, without this machine's own units.
cp -a /etc/passwd /etc/group /etc/shadow /etc/gshadow /etc/nsswitch.conf /etc/ld.so.cache /run/etc/
[[ -d /etc/alternatives ]] && cp -a /etc/alternatives /run/etc/
mount --bind /run/etc /etc
mkdir -p /etc/systemd/system /etc/flea
: >/etc/machine-id
systemd-sysusers "$units/sysusers.d/flea.conf"
mkdir -p /opt
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir /opt/flea
mount --bind "$stage" /opt/flea
mount -t tmpfs -o mode=755 tmpfs /var/lib
systemd-tmpfiles --create "$units/tmpfiles.d/flea.conf"
cp "$units/flead.toml" /etc/flea/flead.toml
cp /opt/flea/models/*.gguf /var/lib/flea/models/

# Of systemd's own units only the targets that ours are ordered by: nothing may touch the machine around us.
mkdir -p /run/units
for unit in sysinit basic sockets paths timers slices local-fs multi-user shutdown umount; do
  cp "/lib/systemd/system/$unit.target" /run/units/
done
sed 's|/usr/local/bin|/opt/flea/bin|' "$units/flead.service" >/run/units/flead.service
cp "$units/flead.socket" /run/units/
mkdir /run/units/flead.service.d
# Only what the test needs to be quick and to see: a short watchdog, a log in a file.
cat >/run/units/flead.service.d/test.conf <<'UNIT'
[Service]
WatchdogSec=2s
StandardOutput=append:/run/flead.log
StandardError=append:/run/flead.log
UNIT
mount --bind /run/units /lib/systemd/system
export container=flea-test
exec /lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=warning --show-status=no

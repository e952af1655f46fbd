#!/usr/bin/env bash
# What flead promises under systemd, one after the other. Runs inside the namespaces that pid1.sh made.
set -euo pipefail

log=/run/flead.log
ctl=/opt/flea/bin/flea-ctl
model=$(ls /var/lib/flea/models/*.gguf)

fail() {
  printf 'FAILED: %s\n' "$*" >&2
  systemctl status --no-pager flead.service flead.socket >&2 || true
  printf -- '--- %s\n' "$log" >&2
  cat "$log" >&2 || true
  exit 1
}
ok() { printf 'ok: %s\n' "$*"; }
property() { systemctl show -P "$1" flead.service; }
is() { [[ "$(property "$1")" == "$2" ]] || fail "$1 is $(property "$1"), not $2 ($3)"; }
# systemctl that cannot hang.
control() { timeout 30 systemctl "$@" || fail "systemctl $*: exit $?"; }
answer() { timeout 30 "$ctl" --json "$@" || fail "flea-ctl $*: exit $?"; }
contains() { [[ "$1" == *"$2"* ]] || fail "'$2' is missing in: $1"; }
wait_for() { # wait_for WHAT COMMAND...
  local what=$1
  shift
  for _ in $(seq 100); do
    "$@" && return 0
    sleep 0.1
  done
  fail "waited 10 s for $what"
}
is_active() { [[ "$(property ActiveState)" == active ]]; }
answers() { "$ctl" status >/dev/null 2>&1; }
pid_is_new() { [[ "$(property MainPID)" != 0 && "$(property MainPID)" != "$1" ]]; }

# Alone, without the socket unit: it makes its own socket.
control start flead.service
is ActiveState active 'after the start'
is NotifyAccess main 'Type=notify'
contains "$(property StatusText)" 'models'
ok "ready: $(property StatusText)"

pid=$(property MainPID)
[[ "$(stat -c %U "/proc/$pid")" == flea ]] || fail "flead runs as $(stat -c %U "/proc/$pid")"
contains "$(cat "/proc/$pid/status")" $'CapEff:\t0000000000004000'
contains "$(cat "/proc/$pid/status")" $'NoNewPrivs:\t1'
[[ "$(stat -c '%a %U %G' /run/flea/flea.sock)" == '660 flea flea' ]] || fail "$(ls -l /run/flea)"
ok 'user flea, CAP_IPC_LOCK and nothing else, socket 0660'

contains "$(answer status)" '"socket":"/run/flea/flea.sock"'
# A PSI trigger of a user without privileges, under ProtectKernelTunables=.
[[ ! -e /proc/pressure/memory ]] || contains "$(answer status)" '"source":"/proc/pressure/memory'
contains "$(answer load "$model" --pin)" '"state":"ready"'
contains "$(answer models)" '"reader":"io_uring"'
ok 'answers flea-ctl, opens a model, reads it with io_uring under its system call filter'

# A stranger may not, a member of the group may, and changes are not for members.
cp "$ctl" /run/flea-ctl
chmod 755 /run/flea-ctl
status=0
setpriv --reuid nobody --regid nogroup --clear-groups /run/flea-ctl status >/dev/null 2>/run/stranger || status=$?
[[ $status == 3 ]] || fail "a stranger got exit $status: $(cat /run/stranger)"
contains "$(cat /run/stranger)" 'usermod -aG flea'
setpriv --reuid nobody --regid nogroup --groups flea /run/flea-ctl status >/dev/null || fail 'a member of the group was not let in'
status=0
setpriv --reuid nobody --regid nogroup --groups flea /run/flea-ctl unload 1 >/dev/null 2>&1 || status=$?
[[ $status == 1 ]] || fail "a member of the group could unload a model (exit $status)"
ok 'strangers stay out, members of the group come in, changes are for admins'

# The reactor hangs: killed by the watchdog, started again, answers again.
kill -STOP "$pid"
wait_for 'the watchdog' pid_is_new "$pid"
wait_for 'the new flead' is_active
wait_for 'its answer' answers
[[ "$(property NRestarts)" -ge 1 ]] || fail 'no restart was counted'
ok "survives a watchdog kill: $(property NRestarts) restart"

# A reload takes over what it can and names the rest.
sed -i 's/^#clients = 1024/clients = 7/; s/^#reader = "auto"/reader = "pread"/' /etc/flea/flead.toml
control reload flead.service
wait_for 'the reload' grep -q 'applied limits.clients: 1024 -> 7' "$log"
grep -q 'reader: "auto" -> "pread" needs a restart' "$log" || fail 'the log does not name what needs a restart'
printf 'nonsense\n' >>/etc/flea/flead.toml
control reload flead.service
wait_for 'the refusal' grep -q 'the configuration stays as it is: /etc/flea/flead.toml:' "$log"
answer status >/dev/null
sed -i '/^nonsense$/d' /etc/flea/flead.toml
ok 'reloads: live keys applied, others named, a broken file changes nothing'

# A clean stop, and nothing left over.
control stop flead.service
is Result success 'after the stop'
is ExecMainStatus 0 'after the stop'
[[ ! -e /run/flea/flea.sock ]] || fail 'the socket is still there'
ok 'stops cleanly'

# Socket activation: the first connection starts it, and waits until it is ready.
control start flead.socket
[[ "$(stat -c '%a %U %G' /run/flea/flea.sock)" == '660 root flea' ]] || fail "$(ls -l /run/flea)"
is ActiveState inactive 'nobody has connected yet'
contains "$(answer status)" '"uptime_seconds"'
is ActiveState active 'after the first connection'
ok 'starts at the first connection'

# With the socket unit a restart refuses nobody, and a stop leaves the socket for the next start.
pid=$(property MainPID)
kill -KILL "$pid"
contains "$(answer status)" '"uptime_seconds"'
pid_is_new "$pid" || fail 'the same process answers'
control stop flead.service
[[ -S /run/flea/flea.sock ]] || fail 'stopping the service removed the socket of flead.socket'
ok 'connections wait while it restarts; the socket outlives the service'

# READY comes after the preloaded models are in memory.
sed -i "s|^#preload = .*|preload = [\"$model\"]|" /etc/flea/flead.toml
control start flead.service
contains "$(answer models)" '"pinned":true'
contains "$(property StatusText)" '1 model, 0 clients'
ok "preloads before it is ready: $(property StatusText)"

control stop flead.socket flead.service
[[ ! -e /run/flea/flea.sock ]] || fail 'the socket is still there'
is Result success 'at the end'
ok 'all is gone in the end'

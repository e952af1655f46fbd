set -x
systemctl is-system-running || true
systemctl status --no-pager || true
id flea; ls -la /run/flea /var/lib/flea
systemctl start flead.socket; ls -la /run/flea
systemctl start flead.service; systemctl status flead --no-pager; cat /run/flead.log
systemctl show flead -p MainPID,ActiveState,StatusText

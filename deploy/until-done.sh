#!/usr/bin/env bash
# Runs a command again while it ends with exit code 75 ("stopped, to be continued"); ends with its last exit code.
#
#   deploy/until-done.sh riskforge run jobs/quickstart.yaml --output /shared/runs/quickstart
#
# SIGINT and SIGTERM are passed to the command, which is then not started again. RISKFORGE_PAUSE_SECONDS: how long to
# wait before it is (60).
set -uo pipefail
# The command gets a process group of its own: a signal to a whole group would reach it twice, which ends a run at once.
set -m

stopped=""
child=""
pending=""

# shellcheck disable=SC2329  # The traps call it.
stop() {
  stopped=1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; else pending=$1; fi
}

trap 'stop INT' INT
trap 'stop TERM' TERM

code=75
while [ "$code" -eq 75 ] && [ -z "$stopped" ]; do
  "$@" &
  child=$!
  # It came after the command was started and before its number was known.
  [ -z "$pending" ] || kill -s "$pending" "$child" 2>/dev/null
  # A signal ends `wait`, not the command.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"
  code=$?
  child=""
  if [ "$code" -eq 75 ] && [ -z "$stopped" ]; then
    echo "stopped with exit code 75; the same command continues in ${RISKFORGE_PAUSE_SECONDS:-60} s" >&2
    sleep "${RISKFORGE_PAUSE_SECONDS:-60}" &
    child=$!
    wait "$child"
    child=""
  fi
done
exit "$code"

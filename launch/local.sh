#!/usr/bin/env bash
# Several processes of a run on this machine, of CPU devices: a rehearsal of what hosts do.
#
#   launch/local.sh 2 --config=configs/tiny.py --workdir=/tmp/tiny --config.data.tokenizer=/tmp/tiny.model
#
# DEVICES (4): CPU devices of each process.  PORT (8476): of process 0.  PYTHON (python).
# SIGTERM and SIGINT are passed on to all, which save and end; the status is that of the first process to fail.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES FLAGS_OF_TRAIN..." >&2
  exit 2
fi
processes=$1
shift
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-4}" JAX_PLATFORMS=cpu

started=()
for ((i = 0; i < processes; i++)); do
  "${PYTHON:-python}" "$(dirname "$0")/../train.py" "$@" \
    --coordinator="127.0.0.1:${PORT:-8476}" --processes="$processes" --process="$i" &
  started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT

status=0
for pid in "${started[@]}"; do
  while :; do # a signal ends the wait, not the process
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((status)) || status=$code
done
exit "$status"

#!/usr/bin/env bash
# A run on a TPU pod slice of Google's cloud, from one's own machine.
#
#   export NAME=fot ZONE=us-west4-a TYPE=v5litepod-64 BUCKET=gs://my-bucket
#   launch/tpu_pod.sh create                       # asks for the slice, and waits until it is there
#   launch/tpu_pod.sh setup                        # code and packages, on all workers
#   launch/tpu_pod.sh copy FILE...                 # to fot_jax/ on all workers: a tokenizer, texts, a model
#   launch/tpu_pod.sh train --config=configs/longllama_3b.py:v5e:8x8 --workdir="$BUCKET/run" ...
#   launch/tpu_pod.sh logs                         # follows process 0
#   launch/tpu_pod.sh stop                         # SIGTERM: the run saves and ends (kill: what hangs)
#   launch/tpu_pod.sh train ...                    # the same flags: goes on from there
#   launch/tpu_pod.sh delete
#
# VERSION: of the TPU's software (by TYPE).  SPOT=1: cheaper, and taken away at any time.  Everything is printed before it
# is run; with DRY_RUN=1 nothing is.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
fi
: "${NAME:?wanted a name for the slice}" "${ZONE:?wanted a zone, like us-west4-a}"
here=$(cd "$(dirname "$0")/.." && pwd)
folder=fot_jax

run() {
  printf '+ %q' "$1" >&2
  printf ' %q' "${@:2}" >&2
  echo >&2
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

on() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

version() {
  case "$TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo "TYPE is $TYPE; wanted v4-N, v5litepod-N, v5p-N or v6e-N, or VERSION stated" >&2 && return 1 ;;
  esac
}

# A command that a remote shell reads back as it was.
quoted() {
  printf '%q ' "$@"
}

command=$1
shift
case "$command" in
  create)
    : "${TYPE:?wanted a type of slice, like v5litepod-64}"
    software=${VERSION:-$(version)}
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$software" ${SPOT:+--spot}
    [[ -n ${DRY_RUN:-} ]] && exit
    while :; do
      state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')
      echo "$state" >&2
      case "$state" in
        ACTIVE) break ;;
        FAILED | SUSPENDED) echo "there will be none: launch/tpu_pod.sh delete, then create" >&2 && exit 1 ;;
      esac
      sleep 30
    done
    ;;
  setup)
    archive=$(mktemp -t fot_jax.XXXXXX)
    trap 'rm -f "$archive"' EXIT
    git -C "$here" archive --format=tar.gz -o "$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:$folder.tar.gz" --zone="$ZONE" --worker=all
    # uv brings a Python that is new enough; that of the image may not be.
    # What an earlier setup brought is removed, what was copied stays.
    on all "mkdir -p $folder && cd $folder && touch .brought && xargs -d '\\n' rm -f < .brought &&
      tar xzf ../$folder.tar.gz && tar tzf ../$folder.tar.gz | grep -v '/\$' > .brought &&
      (command -v uv || pip install -q --user uv) && PATH=\$HOME/.local/bin:\$PATH &&
      uv venv -q --clear --python 3.12 .venv && uv pip install -q --python .venv/bin/python '.[tpu,gs]'"
    ;;
  copy) run gcloud compute tpus tpu-vm scp --recurse "$@" "$NAME:$folder/" --zone="$ZONE" --worker=all ;;
  train)
    # setsid: the run outlives this connection. Every worker finds its place among the others by itself.
    on all "cd $folder && (setsid .venv/bin/python train.py $(quoted "$@") >>train.log 2>&1 & echo \$! >train.pid)"
    ;;
  logs) on 0 "tail -n 100 -F $folder/train.log" ;;
  stop) on all "kill -TERM \$(cat $folder/train.pid) && tail --pid=\$(cat $folder/train.pid) -f /dev/null" ;;
  kill) on all "kill -KILL \$(cat $folder/train.pid)" ;;
  delete) run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
  *)
    echo "launch/tpu_pod.sh $command; wanted create, setup, copy, train, logs, stop, kill or delete" >&2
    exit 2
    ;;
esac

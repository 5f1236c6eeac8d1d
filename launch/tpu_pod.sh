#!/usr/bin/env bash
# Trains on a TPU slice, or several, through a queued resource, until the run is done:
#   launch/tpu_pod.sh         requests the TPU, installs and starts on all workers, waits; when the TPU is preempted it
#                             requests another and the same command resumes from the run folder on gs://
#   launch/tpu_pod.sh logs    follows the first worker's output
#   launch/tpu_pod.sh stop    saves on all workers, then deletes the TPU; so does Ctrl-C
# Before: gcloud auth login; ssh-add ~/.ssh/google_compute_engine. The job is a systemd service on the workers: it does
# not end with the connection, and this script, started again, finds it. In the end the TPU is deleted.
set -euo pipefail

# What to change, here or in the environment.
NAME=${NAME:-}                # of the queued resource: bert-base
PROJECT=${PROJECT:-}          # Google Cloud project
ZONE=${ZONE:-}                # us-west4-a
TYPE=${TYPE:-}                # v5litepod-256, v5p-128, v6e-256
RUNTIME=${RUNTIME:-}          # v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
REPOSITORY=${REPOSITORY:-}    # git URL of sslx that the workers can read
RUN=${RUN:-}                  # run folder: gs://BUCKET/runs/bert_base
REVISION=${REVISION:-main}    # branch, tag or commit
SLICES=${SLICES:-1}           # more than 1: as many slices of TYPE, joined over the data centre's network
SPOT=${SPOT:-1}               # 0: not preemptible
KEEP=${KEEP:-0}               # 1: leave the TPU standing at the end (it costs)
COMMAND=${COMMAND:-python -m sslx.main --config=configs/bert_mlm.py:base --config.mesh.data=-1 --config.mesh.fsdp=16}
RETRIES=${RETRIES:-5}         # failures on one TPU, and requests that fail, before giving up
POLL=${POLL:-60}              # seconds between looks

say() { echo "$(date +%H:%M:%S) $*"; }
fail() { echo "error: $1" >&2; exit 2; }

for variable in NAME PROJECT ZONE TYPE RUNTIME REPOSITORY RUN; do
  [[ -n ${!variable} ]] || fail "$variable is not set; set it at the top of launch/tpu_pod.sh or in the environment"
done
[[ $RUN == gs://* ]] || fail "RUN is '$RUN'; expected a folder on gs://, which outlives the TPU"
for variable in SLICES RETRIES; do
  [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "$variable is '${!variable}'; expected a whole number, at least 1"
done
for variable in SPOT KEEP; do
  [[ ${!variable} == [01] ]] || fail "$variable is '${!variable}'; expected 0 or 1"
done
command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
gcloud auth print-access-token >/dev/null 2>&1 || fail "gcloud is not logged in; run: gcloud auth login"

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet "${@:2}"; }

# on WORKERS COMMAND: all at once, for a job in which some workers start later than others waits for those in vain.
on() { queue ssh --node="$1" --worker="$1" --batch-size=all --command="$2"; }

create() {
  local options=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  if ((SLICES > 1)); then options+=(--node-count="$SLICES" --node-prefix="$NAME"); else options+=(--node-id="$NAME"); fi
  if ((SPOT)); then options+=(--spot); fi
  queue create "${options[@]}"
}

delete() { queue delete --force; }

# The queued resource's state, NONE if there is none, UNKNOWN if it cannot be told.
state() {
  local answer
  if answer=$(queue describe --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

# The job's state on the first worker: running, done, missing, failed CODE, or unreachable.
job() {
  local answer
  answer=$(on 0 'systemctl show sslx --property=SubState,ExecMainStatus') || { echo unreachable; return; }
  case $answer in
    *SubState=failed*) echo "failed $(sed -n 's/^ExecMainStatus=//p' <<<"$answer")" ;;
    *SubState=exited*) echo "done" ;;
    *SubState=dead*) echo missing ;;
    *SubState=*) echo running ;;
    *) echo unreachable ;;
  esac
}

# The images' Python is older than sslx needs; uv brings one.
install() {
  on all "set -e
test -d sslx || git clone --quiet $(printf %q "$REPOSITORY") sslx
cd sslx
git fetch --quiet origin $(printf %q "$REVISION")
git checkout --quiet --force FETCH_HEAD
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python=3.12 .venv
~/.local/bin/uv pip install --quiet --python=.venv/bin/python -e '.[tpu,gcs]'"
}

# KillMode=mixed: a shutdown signals the job once, and the network stays up until it has saved.
start() {
  on all "sudo systemctl stop sslx 2>/dev/null
sudo systemctl reset-failed sslx 2>/dev/null
sudo systemd-run --quiet --unit=sslx --uid=\$USER --working-directory=\$HOME/sslx \
--property=RemainAfterExit=yes --property=KillMode=mixed --property=TimeoutStopSec=300 \
--property=After=network-online.target --setenv=PATH=\$HOME/sslx/.venv/bin:\$PATH --setenv=PYTHONUNBUFFERED=1 \
\$HOME/sslx/launch/resumable.sh $COMMAND --workdir=$(printf %q "$RUN")"
}

# finish CODE: leaves nothing behind that costs.
finish() {
  trap '' INT TERM
  if ((KEEP)); then
    say "$NAME is left standing; delete it with: launch/tpu_pod.sh stop"
  else
    delete || say "$NAME could not be deleted; it may still stand and cost"
  fi
  exit "$1"
}

stop() {
  trap '' INT TERM
  say "saving on all workers, then deleting $NAME"
  on all 'sudo systemctl stop sslx' || say "the workers could not be reached; the last checkpoint stands"
  KEEP=0
  finish 0
}

run() {
  trap stop INT TERM
  local now requested=0 failures=0 refused=0 unreached=0
  while true; do
    now=$(state)
    [[ $now != ACTIVE ]] || now="ACTIVE $(job)"
    [[ $now == UNKNOWN || $now == *unreachable ]] || unreached=0
    case $now in
      NONE)
        say "requesting $SLICES x $TYPE as $NAME"
        if create; then
          requested=1 failures=0
        elif ((!requested)); then
          fail "the request was refused; gcloud says why above"
        fi
        ;;
      SUSPENDED)
        say "$NAME was preempted; requesting another"
        delete || true
        ;;
      FAILED)
        queue describe --format='yaml(state)' || true
        if ((++refused > RETRIES)); then say "the request failed $refused times"; finish 1; fi
        delete || true
        ;;
      'ACTIVE done')
        say "done; the run is in $RUN"
        finish 0
        ;;
      'ACTIVE missing')
        refused=0
        say "installing and starting on all workers"
        if ! install || ! start; then
          if ((++failures > RETRIES)); then say "could not start $failures times"; finish 1; fi
        fi
        ;;
      'ACTIVE failed 75')
        say "the job was interrupted and has saved; the same command resumes"
        start || true
        ;;
      'ACTIVE failed '*)
        on all 'sudo journalctl --unit=sslx --lines=20 --output=cat' || true
        [[ $now != *' 2' ]] || finish 2
        if ((++failures > RETRIES)); then say "the job failed $failures times"; finish 1; fi
        say "the job ended with ${now##* }; the same command resumes"
        start || true
        ;;
      UNKNOWN | *unreachable)
        say "$NAME cannot be reached"
        if ((++unreached > 10 * RETRIES)); then fail "$NAME cannot be reached; it may still stand and cost"; fi
        ;;
      *) say "$NAME is ${now,,}" ;;
    esac
    sleep "$POLL" &
    wait $! || true
  done
}

case ${1:-run} in
  run) run ;;
  logs) on 0 'sudo journalctl --unit=sslx --lines=100 --follow --output=cat' ;;
  stop) stop ;;
  *) fail "unknown command '$1'; valid: run, logs, stop" ;;
esac

#!/usr/bin/env bash
# Runs a command that saves on SIGTERM and goes on when it is run again; its exit code says which of the two it was:
#   launch/resumable.sh python -m sslx.main --config=configs/bert_mlm.py
# 0: done. 75: interrupted, run it again. 2: a mistake, mend it first. Anything else: the command's own code.
# sslx itself ends with 0 when it is done and when it has saved, on every host; a scheduler would take both for done.
set -uo pipefail

(($#)) || { echo "error: no command given; expected launch/resumable.sh COMMAND..." >&2; exit 2; }

interrupted=""
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/output"

# The first host says that it saved even where the signal reached another one. The filter outlives signals to the group.
(trap '' TERM INT; exec sed -u "/saved at step .* the same command resumes/w $folder/saved" <"$folder/output") &
filter=$!
"$@" >"$folder/output" &
command=$!
# Passed on once, for commands that a second signal ends while they are saving.
trap 'trap "" TERM; interrupted=1; kill -TERM "$command" 2>/dev/null' TERM

while kill -0 "$command" 2>/dev/null; do wait "$command"; done
wait "$command"
code=$?
wait "$filter"

if ((code == 0)) && [[ -n $interrupted || -s $folder/saved ]]; then code=75; fi
# Ended by the signal before it could save: nothing is wrong with it.
if ((code > 128)) && [[ -n $interrupted ]]; then code=75; fi
exit "$code"

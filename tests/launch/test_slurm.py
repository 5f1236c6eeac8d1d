"""`launch/slurm.sbatch` run by bash, beside stand-ins for srun, scancel and scontrol that behave as SLURM's do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"

# srun takes TERM for the end of the job and kills the task; scancel --signal reaches the tasks of a step, not srun.
STANDINS = {
    "srun": """
echo "srun $*" >>"$CALLS"
trap 'echo "srun was sent TERM" >>"$CALLS"; kill -KILL $task' TERM
"${@:2}" &
task=$!
echo $task >"$CALLS.task"
while kill -0 $task 2>/dev/null; do wait $task; done
wait $task
""",
    "scancel": """
echo "scancel $*" >>"$CALLS"
[[ $* == "--signal=TERM 77.0" ]] && kill -TERM "$(cat "$CALLS.task")"
""",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    "python": """
echo "python $*" >>"$CALLS"
trap 'echo saved >>"$CALLS"; exit "${CODE:-0}"' TERM
touch "$CALLS.training"
[[ -z ${BRIEF:-} ]] || exit "$CODE"
while true; do sleep 0.05; done
""",
}


@pytest.fixture
def start(tmp_path):
    """Starts the script as SLURM would, ``start(CODE="1")``, and waits until the task trains."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    for name, body in STANDINS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (binaries / name).chmod(0o755)
    calls, processes = tmp_path / "calls", []

    def begin(**environment: str) -> subprocess.Popen:
        given = {"SLURM_JOB_ID": "77", "RUN": f"{tmp_path}/my run", "ENVIRONMENT": str(tmp_path / "venv")} | environment
        environment = {"PATH": os.environ["PATH"], "CALLS": str(calls)} | given
        process = subprocess.Popen(["bash", SCRIPT], env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        while process.poll() is None and not Path(f"{calls}.training").exists():
            time.sleep(0.02)
        return process

    begin.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    begin.task = lambda: int(Path(f"{calls}.task").read_text())
    yield begin
    for process in processes:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen) -> int:
    return process.wait(timeout=30)


def test_the_time_limits_warning_saves_through_scancel_and_queues_the_job_again(start, tmp_path):
    process = start()
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 0
    srun, python, *rest = start.calls()
    assert srun.startswith("srun --kill-on-bad-exit=1 bash -c exec python -m sslx.main ")
    assert python.startswith("python -m sslx.main --config=configs/bert_mlm.py:base ")
    assert python.endswith(f" --workdir={tmp_path}/my run")
    assert rest == ["scancel --signal=TERM 77.0", "saved", "scontrol requeue 77"]


def test_a_cancelled_job_waits_for_its_tasks_and_does_not_come_back(start):
    process = start()
    process.send_signal(signal.SIGTERM)
    os.kill(start.task(), signal.SIGTERM)  # SLURM's own signal to the task
    assert ended(process) == 0
    assert start.calls()[2:] == ["saved"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ends_by_itself_ends_with_its_code_and_is_not_queued_again(start, code):
    assert ended(start(BRIEF="1", CODE=str(code))) == code
    assert len(start.calls()) == 2


def test_a_mistake_is_not_queued_again_after_the_warning(start):
    process = start(CODE="2")
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 2
    assert start.calls()[-1] == "saved"


def test_the_tasks_expand_the_number_of_the_row(start):
    command = "python -m sslx.study --row=$SLURM_ARRAY_TASK_ID"
    assert ended(start(COMMAND=command, SLURM_ARRAY_TASK_ID="5", BRIEF="1", CODE="0")) == 0
    assert start.calls()[1].startswith("python -m sslx.study --row=5 --workdir=")


@pytest.mark.parametrize("missing", ["RUN", "ENVIRONMENT", "SLURM_JOB_ID"])
def test_an_unset_variable_is_refused_in_one_line(start, missing):
    process = start(**{missing: ""})
    assert ended(process) == 2
    assert process.stderr.read() == (
        f"error: {missing} is not set; expected RUN=... ENVIRONMENT=... sbatch launch/slurm.sbatch\n"
    )
    assert start.calls() == []


def test_the_options_give_a_task_to_each_gpu_and_signal_the_shell_alone():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    assert options["signal"] == "B:USR1@300"
    assert {"requeue", "open-mode", "nodes", "time"} <= set(options)
    # SLURM reads options up to the first command.
    before = SCRIPT.read_text().partition("\nset -uo pipefail")[0]
    assert all(line.startswith("#") for line in before.splitlines())
    assert before.count("#SBATCH") == len(options)

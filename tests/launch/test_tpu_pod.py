"""`launch/tpu_pod.sh` against a stand-in for gcloud that plays queues, preemptions and failing jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "launch" / "tpu_pod.sh")
SETTINGS = {
    "NAME": "bert",
    "PROJECT": "physics",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "REPOSITORY": "https://example.org/sslx",
    "RUN": "gs://bucket/my run",
    "COMMAND": "python -m sslx.main --config='configs/bert_mlm.py:base,data=text:gs://bucket/a b'",
    "RETRIES": "2",
    "POLL": "0.01",
}
# Writes its name and arguments down, one call a line; a clone makes its folder.
RECORDS = """#!/bin/bash
{ printf '%s' "${0##*/}"; printf '\\t%s' "$@"; echo; } >>"$WORKER/calls"
[[ $1 != clone ]] || mkdir "${@: -1}"
"""


@dataclass
class Ended:
    """How the script ended, what it asked of gcloud and what ran on the workers."""

    code: int
    output: str
    errors: str
    calls: list
    worker: list[list[str]]

    @property
    def asked(self) -> list[str]:
        """gcloud's commands in short; of ssh, what it is for."""
        kinds = {"uv venv": "install", "systemd-run": "start", "journalctl": "log", "systemctl stop": "stop"}
        return [
            next(kind for text, kind in kinds.items() if text in flags["command"]) if command == "ssh" else command
            for command, _, flags in self.calls
        ]


@pytest.fixture
def start(tmp_path):
    """Starts the script; ``start(lives, **settings)`` gives the process, and ``start.ended(process)`` how it ended."""
    worker, binaries, play = tmp_path / "worker", tmp_path / "bin", tmp_path / "play.json"
    (worker / ".local" / "bin").mkdir(parents=True)
    binaries.mkdir()
    for path in (worker / "git", worker / "python3", worker / "sudo", worker / ".local" / "bin" / "uv"):
        path.write_text(RECORDS)
        path.chmod(0o755)
    fake = REPOSITORY / "tests" / "launch" / "fake_gcloud.py"
    (binaries / "gcloud").write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{fake}" "$@"\n')
    (binaries / "gcloud").chmod(0o755)

    def begin(
        lives: list, *arguments: str, life: dict | None = None, logged_in: bool = True, **settings: str
    ) -> subprocess.Popen:
        play.write_text(json.dumps({"lives": lives, "life": life, "logged_in": logged_in, "calls": []}))
        environment = SETTINGS | {"PLAY": str(play), "WORKER": str(worker), "PATH": f"{binaries}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env=environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(process: subprocess.Popen) -> Ended:
        output, errors = process.communicate(timeout=60)
        ran = (worker / "calls").read_text().splitlines() if (worker / "calls").exists() else []
        calls = json.loads(play.read_text())["calls"]
        return Ended(process.returncode, output, errors, calls, [line.split("\t") for line in ran])

    begin.ended = ended
    begin.play = play
    return begin


@pytest.fixture
def run(start):
    """Runs the script to its end."""
    return lambda *arguments, **settings: start.ended(start(*arguments, **settings))


def test_a_preempted_tpu_is_deleted_and_requested_again_and_the_same_command_goes_on(run):
    waits = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"]
    lives = [{"states": waits, "jobs": ["running"]}, {"states": ["ACTIVE"], "jobs": ["running", "done"]}]
    ended = run(lives)
    assert ended.code == 0, ended.errors
    assert ended.asked == ["create", "install", "start", "delete"] * 2
    first, second = ended.calls[:4], ended.calls[4:]
    assert first == second
    assert "was preempted; requesting another" in ended.output
    assert ended.output.splitlines()[-1].endswith("done; the run is in gs://bucket/my run")


def test_a_request_names_one_slice_or_several_and_spot_or_not(run):
    lives = [{"states": ["ACTIVE"], "jobs": ["done"]}]
    common = {
        "project": "physics",
        "zone": "us-west4-a",
        "quiet": "",
        "accelerator-type": "v5litepod-16",
        "runtime-version": "v2-alpha-tpuv5-lite",
    }
    assert run(lives).calls[0] == ["create", "bert", {**common, "node-id": "bert", "spot": ""}]
    several = run(lives, SLICES="4", SPOT="0").calls[0]
    assert several == ["create", "bert", {**common, "node-count": "4", "node-prefix": "bert"}]


def test_all_workers_of_all_slices_install_and_start_at_once(run):
    ended = run([{"states": ["ACTIVE"], "jobs": ["running", "done"]}])
    for _, _, flags in ended.calls[1:3]:
        assert (flags["node"], flags["worker"], flags["batch-size"]) == ("all", "all", "all")
    programs = [call[0] for call in ended.worker]
    assert programs == ["git", "git", "git", "python3", "uv", "uv", "sudo", "sudo", "sudo"]
    assert ended.worker[0] == ["git", "clone", "--quiet", "https://example.org/sslx", "sslx"]
    assert ended.worker[5][-2:] == ["-e", ".[tpu,gcs]"]
    service = ended.worker[-1]
    home = service.index(next(part for part in service if part.endswith("/sslx/launch/resumable.sh")))
    assert service[:4] == ["sudo", "systemd-run", "--quiet", "--unit=sslx"]
    assert service[home + 1 :] == [
        *("python", "-m", "sslx.main", "--config=configs/bert_mlm.py:base,data=text:gs://bucket/a b"),
        "--workdir=gs://bucket/my run",
    ]


def test_a_job_that_was_interrupted_on_a_tpu_that_stays_is_started_again_there(run):
    ended = run([{"states": ["ACTIVE"], "jobs": ["running", "failed 75", "failed 75", "failed 75", "running", "done"]}])
    assert ended.code == 0
    assert ended.asked == ["create", "install", "start", "start", "start", "start", "delete"]


def test_a_mistake_ends_at_once_with_2_the_log_and_no_tpu(run):
    ended = run([{"states": ["ACTIVE"], "jobs": ["failed 2"]}])
    assert ended.code == 2
    assert ended.asked == ["create", "install", "start", "log", "delete"]


def test_a_job_that_keeps_failing_is_given_up_with_1_and_no_tpu(run):
    ended = run([{"states": ["ACTIVE"], "jobs": ["failed 1"]}])
    assert ended.code == 1
    assert ended.asked == ["create", "install", "start", "log", "start", "log", "start", "log", "delete"]


def test_a_request_that_keeps_failing_is_given_up_with_1_and_nothing_left(run):
    ended = run([{"states": ["FAILED"], "jobs": []}] * 5)
    assert ended.code == 1
    assert ended.asked == ["create", "delete"] * 3


def test_a_request_that_is_refused_is_told_in_one_line(run):
    ended = run([])
    assert ended.code == 2
    assert ended.errors.splitlines()[-1] == "error: the request was refused; gcloud says why above"


def test_a_network_that_fails_for_a_while_costs_nothing(run):
    states = ["ACTIVE", "ACTIVE", "offline", "offline", "ACTIVE"]
    ended = run([{"states": states, "jobs": ["running", "unreachable", "done"]}])
    assert ended.code == 0
    assert ended.asked == ["create", "install", "start", "delete"]


def test_started_again_it_finds_the_job_that_runs(run):
    ended = run([], life={"started": True, "states": ["ACTIVE"], "jobs": ["running", "running", "done"]})
    assert ended.code == 0
    assert ended.asked == ["delete"]


def test_a_tpu_that_is_to_be_kept_is_left_standing(run):
    ended = run([{"states": ["ACTIVE"], "jobs": ["done"]}], KEEP="1")
    assert ended.code == 0
    assert "delete" not in ended.asked
    assert "bert is left standing; delete it with: launch/tpu_pod.sh stop" in ended.output


def test_a_signal_saves_on_all_workers_and_deletes_the_tpu(start):
    process = start([{"states": ["ACTIVE"], "jobs": ["running"]}])
    while process.poll() is None and '"started": true' not in start.play.read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    ended = start.ended(process)
    assert ended.code == 0
    assert ended.asked == ["create", "install", "start", "stop", "delete"]
    assert ended.calls[-2][2]["worker"] == "all"


def test_stop_saves_and_deletes_and_logs_follows(run):
    life = {"started": True, "states": ["ACTIVE"], "jobs": ["running"]}
    assert run([], "stop", life=life).asked == ["stop", "delete"]
    ended = run([], "logs", life=life)
    assert ended.asked == ["log"]
    assert "--follow" in ended.worker[-1]


@pytest.mark.parametrize("missing", ["NAME", "PROJECT", "ZONE", "TYPE", "RUNTIME", "REPOSITORY", "RUN"])
def test_an_unset_variable_is_refused_in_one_line(run, missing):
    ended = run([], **{missing: ""})
    assert (ended.code, ended.output, ended.calls) == (2, "", [])
    assert ended.errors == (
        f"error: {missing} is not set; set it at the top of launch/tpu_pod.sh or in the environment\n"
    )


def test_values_that_cannot_be_are_refused_in_one_line(run):
    cases = {
        "error: RUN is 'runs/a'; expected a folder on gs://, which outlives the TPU\n": ([], {"RUN": "runs/a"}),
        "error: SLICES is '0'; expected a whole number, at least 1\n": ([], {"SLICES": "0"}),
        "error: SPOT is 'yes'; expected 0 or 1\n": ([], {"SPOT": "yes"}),
        "error: RETRIES is 'x'; expected a whole number, at least 1\n": ([], {"RETRIES": "x"}),
        "error: unknown command 'halt'; valid: run, logs, stop\n": (["halt"], {}),
    }
    for said, (arguments, settings) in cases.items():
        ended = run([], *arguments, **settings)
        assert (ended.code, ended.errors, ended.calls) == (2, said, [])


def test_without_a_login_it_does_not_begin(run):
    ended = run([], logged_in=False)
    assert (ended.code, ended.calls) == (2, [])
    assert ended.errors == "error: gcloud is not logged in; run: gcloud auth login\n"

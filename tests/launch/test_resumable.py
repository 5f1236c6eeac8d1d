"""`launch/resumable.sh` tells done from saved by its exit code, whichever host the signal reached."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "launch" / "resumable.sh")

# What a command may do on SIGTERM: it saves once, and a second signal ends it.
TRAINS = """
trap 'trap - TERM; echo "saving"; sleep 0.3; echo "saved at step 3 on SIGTERM; the same command resumes"; exit 0' TERM
echo started
while true; do sleep 0.05; done
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *command], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_a_command_that_nothing_interrupts_ends_with_its_own_code(code):
    ended = run("bash", "-c", f"echo out; echo err >&2; exit {code}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "out\n", "err\n")


def test_arguments_arrive_as_they_were_given():
    assert run("printf", "%s|", "two words", "*", "$HOME").stdout == "two words|*|$HOME|"


def test_a_signal_is_passed_on_once_and_ends_with_75_after_saving():
    process = subprocess.Popen([SCRIPT, "bash", "-c", TRAINS], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 75
    assert rest == "saved at step 3 on SIGTERM; the same command resumes\n"


def test_a_command_ended_by_the_signal_before_it_could_save_is_interrupted_too():
    process = subprocess.Popen([SCRIPT, "bash", "-c", "echo started; exec sleep 60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


def test_a_run_saved_because_of_another_hosts_signal_ends_with_75():
    assert run("echo", "saved at step 3 on SIGTERM; the same command resumes").returncode == 75


def test_the_session_says_the_words_that_the_script_waits_for():
    said = (REPOSITORY / "sslx" / "session.py").read_text()
    assert 'f"saved at step {' in said
    assert "; the same command resumes" in said


def test_no_command_is_refused_in_one_line():
    ended = run()
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("error: no command given")

"""Runs many ordinary runs, one after the other: each is an entry in a process and a folder of its own.

In: jobs, whose command lines are the entries' own. Out: run folders, and what ended each job that failed. A job that is
finished is not run again; whoever makes the jobs says when one is. `study` and `glue` are built on it.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from absl import flags
from etils.epath import Path

from sslx.errors import UserError
from sslx.runtime import display
from sslx.train.console import Console
from sslx.train.run_folder import has_checkpoint
from sslx.train.signals import StopRequest, stop_on_signals

# Of every sweep; their entries' help says what they mean.
flags.DEFINE_integer("row", None, "")
flags.DEFINE_bool("list", False, "")
flags.DEFINE_bool("report", False, "")

LOGS = "logs"  # what each job printed
MISTAKE = 2  # the exit code for what the user can mend
ARRAY_INDICES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # its folder
    arguments: tuple[str, ...]  # behind ``python -m``, without the folder
    result: Callable[[], str]  # what came out, or "" where it is not finished
    length: str  # said when it starts

    def command(self, workdir: Path) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-m", *self.arguments, f"--workdir={Path(workdir) / self.name}"]


def run_jobs(jobs: Sequence[Job], workdir: Path, console: Console) -> tuple[dict[str, str], str]:
    """Runs the jobs that are not finished; one that fails does not stop the others, two with one mistake do.

    SIGTERM and Ctrl-C are handed to the job that is running, which saves.

    Returns:
      What ended each failed job, by its name, and the signal that stopped the sweep, or "".
    """
    failures = {}
    with stop_on_signals() as request:
        for index, job in enumerate(jobs):
            if job.result() or request.number:
                continue
            goes_on = has_checkpoint(Path(workdir) / job.name)
            console.say(f"row {index} {job.name}: {'goes on' if goes_on else 'starts'}, {job.length}")
            log, begin = Path(workdir) / LOGS / f"{job.name}.txt", time.monotonic()
            code = _run(job.command(workdir), log, request)
            result = job.result()
            if not result and not request.number:
                reason = _reason(code, log)
                console.say(f"row {index} {job.name}: failed: {reason} (all of it: {log})")
                again, failures[job.name] = reason in failures.values(), reason
                if again and code == MISTAKE:
                    console.say("two rows end with the same mistake, so the others are not tried")
                    break
            elif result:
                console.say(f"row {index} {job.name}: {result}, {time.monotonic() - begin:.0f} s")
    return failures, signal.Signals(request.number).name if request.number else ""


def told_failures(jobs: Sequence[Job], failures: Mapping[str, str], workdir: Path) -> str:
    """The line that ends a sweep in which some jobs failed."""
    untried = sum(job.name not in failures and not job.result() for job in jobs)
    parts = [f"{len(failures)} of {len(jobs)} rows failed: {', '.join(failures)}"]
    if untried:
        parts.append(f"{untried} more were not tried")
    if len(jobs) > len(failures) + untried:
        parts.append("those that are finished are reported" if untried else "the others are reported")
    return f"{'; '.join(parts)}; what each printed is in {display(workdir)}/logs, and the same command tries them again"


def check_switches() -> None:
    """Refuses two of --list, --report and --row, each of which is to do something else.

    Raises:
      UserError: two are given.
    """
    given = [f"--{name}" for name in ("list", "report") if flags.FLAGS[name].value]
    given += ["--row"] if flags.FLAGS.row is not None else []
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; expected one of --list, --report and --row")


def row_index(given: int | None) -> int | None:
    """The one job that this process is to run: as given, else as a job array numbers it, else None.

    Raises:
      UserError: the array's variable is no number.
    """
    if given is not None:
        return given
    for name in ARRAY_INDICES:
        if value := os.environ.get(name, ""):
            if not value.isdecimal():
                raise UserError(f"${name} is {value!r}; expected a row's number, or give --row")
            return int(value)
    return None


def become(jobs: Sequence[Job], workdir: Path, index: int, what: str) -> None:
    """Turns this process into one job's run, so that signals and the exit code are the run's own.

    Raises:
      UserError: there is no such job in ``what``.
    """
    if not 0 <= index < len(jobs):
        raise UserError(f"no row {index}; {what} has rows 0 to {len(jobs) - 1}")
    job = jobs[index]
    if result := job.result():
        print(f"row {index} {job.name} is finished: {result}")
        return
    print(f"row {index} {job.name}", flush=True)
    arguments = job.command(workdir)
    os.execv(arguments[0], arguments)


def own_flags_cut(arguments: Sequence[str], own: Sequence[str]) -> list[str]:
    """A command line without the flags of every sweep and a sweep's ``own``: what it hands on to its jobs."""
    valued, switches = {*own, "row", "workdir"}, {"list", "report"}
    kept, skip = [], False
    for argument in arguments:
        name, given, _ = argument.lstrip("-").partition("=")
        cut = argument.startswith("-") and (name in valued or name.removeprefix("no") in switches)
        if not skip and not cut:
            kept.append(argument)
        skip = cut and not given and name in valued  # the value of `--sizes 64,96` is an argument by itself
    return kept


def _run(arguments: list[str], log: Path, request: StopRequest) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output, subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT) as process:
        told = False
        try:
            while process.poll() is None:
                if request.number and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # a second signal: this process is ending, and its job must not outlive it
                process.terminate()
    return process.returncode


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_bytes().decode("utf8", "replace").splitlines() if line.strip()]
    if code == 0:
        return "stopped before its last step"
    told = [line for line in lines if line.startswith("error: ")] or lines or [f"exit code {code}"]
    return told[-1].removeprefix("error: ")

"""Runs the rows of a study: each is ``python -m sslx.main`` in a process and a folder of its own.

In: rows and the command line that every row shares. Out: run folders, and which rows are finished; a row is finished
when its ``metrics.jsonl`` has the held-out loss of its last step.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from etils.epath import Path

from sslx.scaling.grid import Row
from sslx.train.console import Console
from sslx.train.metrics import read_metrics
from sslx.train.run_folder import has_checkpoint
from sslx.train.signals import StopRequest, stop_on_signals

LOGS = "logs"  # what each row printed


def final_loss(workdir: Path, row: Row) -> float | None:
    """The held-out loss at the row's last step, or None where it is not finished."""
    for record in reversed(read_metrics(Path(workdir) / row.name)):
        if record["step"] == row.steps and "eval/loss" in record:
            return record["eval/loss"]
    return None


def command(row: Row, workdir: Path, shared: Sequence[str]) -> list[str]:
    """The command of one row; ``shared`` holds ``--config`` and what was changed in it for all rows."""
    values = [f"--config.{key}={value}" for key, value in row.overrides().items()]
    return [sys.executable, "-m", "sslx.main", *shared, *values, f"--workdir={Path(workdir) / row.name}"]


def run_rows(rows: Sequence[Row], workdir: Path, shared: Sequence[str], console: Console) -> tuple[dict[str, str], str]:
    """Runs the rows that are not finished, one after the other; one that fails does not stop the others.

    SIGTERM and Ctrl-C are handed to the row that is running, which saves.

    Returns:
      What ended each failed row, by its name, and the signal that stopped the study, or "".
    """
    failures = {}
    with stop_on_signals() as request:
        for row in rows:
            loss = final_loss(workdir, row)
            if loss is None and not request.number:
                goes_on = has_checkpoint(Path(workdir) / row.name)
                console.say(f"row {row.index} {row.name}: {'goes on' if goes_on else 'starts'}, {row.steps:,} steps")
                log, begin = Path(workdir) / LOGS / f"{row.name}.txt", time.monotonic()
                code = _run(command(row, workdir, shared), log, request)
                loss = final_loss(workdir, row)
                if loss is None and not request.number:
                    failures[row.name] = _reason(code, log)
                    console.say(f"row {row.index} {row.name}: failed: {failures[row.name]} (all of it: {log})")
                elif loss is not None:
                    seconds = time.monotonic() - begin
                    console.say(f"row {row.index} {row.name}: held-out loss {loss:.4f}, {seconds:.0f} s")
    return failures, signal.Signals(request.number).name if request.number else ""


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
            if process.poll() is None:  # a second signal: this process is ending, and its row must not outlive it
                process.terminate()
    return process.returncode


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()]
    if code == 0:
        return "stopped before its last step"
    told = [line for line in lines if line.startswith("error: ")] or lines or [f"exit code {code}"]
    return told[-1].removeprefix("error: ")

"""The rows of a study as jobs of a sweep: each is ``python -m sslx.main`` in a process and a folder of its own.

In: rows and the command line that every row shares. Out: jobs, and which rows are finished; a row is finished when its
``metrics.jsonl`` has the held-out loss of its last step.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils.epath import Path

from sslx.scaling.grid import Row
from sslx.sweep import Job
from sslx.train.metrics import read_metrics


def final_loss(workdir: Path, row: Row) -> float | None:
    """The held-out loss at the row's last step, or None where it is not finished."""
    for record in reversed(read_metrics(Path(workdir) / row.name)):
        if record["step"] == row.steps and "eval/loss" in record:
            return record["eval/loss"]
    return None


def job(row: Row, workdir: Path, shared: Sequence[str]) -> Job:
    """One row's job; ``shared`` holds ``--config`` and what was changed in it for all rows."""

    def result() -> str:
        loss = final_loss(workdir, row)
        return "" if loss is None else f"held-out loss {loss:.4f}"

    values = [f"--config.{key}={value}" for key, value in row.overrides().items()]
    return Job(row.name, ("sslx.main", *shared, *values), result, f"{row.steps:,} steps")

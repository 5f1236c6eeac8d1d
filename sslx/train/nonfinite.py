"""What is kept of a training step whose loss or gradient is not finite: ``RUN/nonfinite/STEP/``.

``arrays/`` holds parameters, the objective's state and the batch as the step took them (not the optimizer's moments,
which neither loss nor gradient depends on), ``step.json`` the step, its key and what came out. ``sslx.replay`` reads
both. The batch is read anew, since the rows of a step are a function of the step: no batch is held back in training.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from sslx.errors import UserError
from sslx.objective import Batch
from sslx.runtime import is_first_process
from sslx.storage import absolute, write_text
from sslx.train.checkpoint import read_arrays, write_arrays
from sslx.train.hosts import agree
from sslx.train.step import TrainState, step_key

MOST_KEPT = 3  # of a run: each is as large as its parameters, and what follows a first one often is the same again


@dataclasses.dataclass(frozen=True)
class Captured:
    """A step that was kept."""

    step: int  # counted from 1, as in the logs
    key: list[int]  # of `step.step_key`
    loss: str
    grad_norm: str
    params: Any
    state: Any
    batch: Batch


def capture(
    run: Path, step: int, state: TrainState, batch: Batch, metrics: dict[str, Any], seed: int
) -> tuple[Path, bool]:
    """Keeps a step, unless the run has `MOST_KEPT` others.

    Args:
      run: The run folder.
      step: The step, counted from 1.
      state: What it began with.
      batch: Its global batch.
      metrics: Its ``loss`` and ``grad_norm``, on the host.
      seed: Of the run.

    Returns:
      The step's folder, and whether it has been written.

    Raises:
      UserError: the disk is full or not writable.
    """
    folder = absolute(run) / "nonfinite" / str(step)
    others = [kept for kept in agree("the kept steps", kept_steps(run))[0] if kept != step]
    if len(others) >= MOST_KEPT:
        return folder, False
    write_arrays(folder / "arrays", {"params": state.params, "state": state.state, "batch": batch})
    if is_first_process():
        key = np.asarray(jax.random.key_data(step_key(seed, step - 1))).tolist()
        said = {name: str(float(metrics[name])) for name in ("loss", "grad_norm")}  # JSON has no nan
        write_text(folder / "step.json", json.dumps({"step": step, "key": key, **said}, indent=2) + "\n")
    return folder, True


def kept_steps(run: Path) -> list[int]:
    """Steps of a run that have been kept, the earliest first."""
    folder = absolute(run) / "nonfinite"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def read_captured(run: Path, step: int | None = None) -> Captured:
    """Reads a kept step; None: the earliest, since what went wrong later may be its fault.

    Raises:
      UserError: there is none, none of this step, or it cannot be read.
    """
    steps = kept_steps(run)
    if not steps:
        raise UserError(f"no step to replay in {run}: a run keeps those whose loss or gradient is not finite")
    if step is not None and step not in steps:
        raise UserError(f"{run} has kept no step {step}; it has {', '.join(map(str, steps))}")
    folder = absolute(run) / "nonfinite" / str(steps[0] if step is None else step)
    try:
        said = json.loads((folder / "step.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is not complete: step.json cannot be read") from None
    arrays = read_arrays(folder / "arrays")
    return Captured(**said, params=arrays["params"], state=arrays.get("state") or {}, batch=arrays["batch"])

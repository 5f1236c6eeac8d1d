"""Names the operation that broke a training step: ``python -m sslx.replay --run=runs/bert``.

A run keeps the steps whose loss or gradient is not finite in RUN/nonfinite/STEP/. Such a step is traced again with the
parameters, the state, the batch and the key that it had, and evaluated one operation at a time, without compiling it as
a whole, on one device. Told is the first operation whose infinity or NaN reached the loss, and the first whose reached
a gradient, with module and source line. Numbers that were not finite when the step began are named instead: then a step
before it broke them.

  --run=FOLDER            the run
  --step=N                which step; default: the first one that the run has kept

Exit codes: 0 it is named, 1 the step is finite here (compiled or divided over devices it rounds otherwise), 2 no such
run or step.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils.epath import Path

from sslx import entry
from sslx.errors import UserError
from sslx.inference.loading import local, written_of
from sslx.objective import Objective
from sslx.runtime import configure
from sslx.storage import check
from sslx.train.console import plain
from sslx.train.initialise import objective_class
from sslx.train.nonfinite import Captured, read_captured
from sslx.train.origin import Origin, origins
from sslx.train.sharding import parameter_name
from sslx.train.step import make_gradient

LISTED = 8  # gradients that are named


def main() -> bool:
    """Replays as the flags say and prints; returns whether something was not finite."""
    given = flags.FLAGS
    if not given.run:
        raise UserError("no --run given; expected --run=FOLDER, for example --run=runs/bert_mlm")
    configure()
    run = Path(given.run)
    check(run)
    written = written_of(run)
    captured = read_captured(run, given.step)
    objective = objective_class(written).restored(written, local(run))
    console = plain(highlight=False, soft_wrap=True)
    console.print(
        f"step {captured.step} of {given.run}: loss {captured.loss}, gradient norm {captured.grad_norm}", markup=False
    )
    found = replay(objective, captured, written["micro_batches"])
    for line in told(found):
        console.print(line, markup=False)
    return any(found.values())


def replay(objective: Objective, captured: Captured, micro_batches: int) -> dict[str, Origin | None]:
    """Where the first value that is not finite came from, for ``loss`` and each ``gradient of NAME``."""
    gradients_of = make_gradient(objective, micro_batches)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        view_key, loss_key, _ = jax.random.split(jax.random.wrap_key_data(jnp.array(captured.key, jnp.uint32)), 3)
        loss, grads, _, _ = gradients_of(params, state, batch, (view_key, loss_key), jnp.int32(captured.step - 1))
        return loss, grads

    given = jax.tree.map(jnp.asarray, (captured.params, captured.state, captured.batch))
    leaves = jax.tree_util.tree_leaves_with_path(given)
    names = [f"{('parameter', 'state', 'batch')[path[0].idx]} {parameter_name(path[1:])}" for path, _ in leaves]
    found = origins(jax.make_jaxpr(step)(*given), [array for _, array in leaves], names)
    parameters = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(given[0])]
    return dict(zip(["loss", *(f"gradient of {name}" for name in parameters)], found, strict=True))


def told(found: dict[str, Origin | None]) -> list[str]:
    """The lines that say where it came from."""
    broken = {name: origin for name, origin in found.items() if origin is not None}
    if not broken:
        return [
            "every operation is finite here: one at a time, on this device, the step rounds otherwise than compiled; "
            "the same values may lie close to the largest number of their type"
        ]
    first = broken.get("loss") or min(broken.values(), key=lambda origin: origin.order)
    lines = [f"first: {first}"]
    if first.nan is not None:
        lines.append(f"which turns to nan: {first.nan}")
    others = [name.removeprefix("gradient of ") for name in broken if name != "loss"]
    if "loss" in broken:
        lines.append(f"it reaches the loss and {len(others)} of {len(found) - 1} gradients")
    else:
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        lines.append(f"the loss is finite; it reaches the gradients of {', '.join(others[:LISTED])}{more}")
    return lines


def _main() -> None:
    if not main():
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "Run folder")
    flags.DEFINE_integer("step", None, "Step")
    entry.run_without_config(_main)

"""Starting from another run: its encoder's parameters take the place of the new run's, checked name by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from flax import traverse_util

from sslx.config import load_class
from sslx.errors import UserError
from sslx.objective import Objective
from sslx.storage import check
from sslx.train.checkpoint import read_variables
from sslx.train.run_folder import read_config


def part_of(written: Mapping[str, Any]) -> str:
    """Which part of a config names its objective: ``pretext`` or ``task``."""
    return "pretext" if "pretext" in written else "task"


def objective_class(written: Mapping[str, Any]) -> type[Objective]:
    """The class of a run's objective, pretext or task.

    Raises:
      UserError: it does not exist; names the nearest.
    """
    from sslx.pretext import PRETEXTS
    from sslx.tasks import TASKS

    part = part_of(written)
    table = {"pretext": PRETEXTS, "task": TASKS}[part]
    return load_class(written[part]["name"], table, f"config.{part}.name", Objective)


def inherited(written: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """What a config takes from the run that ``config.init`` names (``RUN`` or ``scratch:RUN``).

    Returns:
      The config, for a downstream task with that run's architecture, and the folder of its tokenizer or None.

    Raises:
      UserError: there is no such run (names the nearest), or its storage cannot be reached.
    """
    init = written.get("init", "")
    like = init.partition(":")[2] if from_scratch(init) else init
    if not like:
        return written, None
    check(like)
    source = read_config(Path(like))
    if "task" in written:
        # What the parameters mean comes from the run; how they are computed with may be said anew.
        kept = {name: written["model"][name] for name in ("dtype", "remat", "unroll")}
        written = written | {"model": source["model"] | kept}
    return written, Path(like) / "tokenizer"  # its embeddings mean nothing under another vocabulary


def from_scratch(init: str) -> bool:
    """Whether ``config.init`` starts from random parameters: "", ``scratch`` or ``scratch:RUN``."""
    return not init or init == "scratch" or init.startswith("scratch:")


def load_encoder(abstract_params: Mapping[str, Any], run: Path) -> tuple[dict[str, Any], list[str]]:
    """The encoder of a run as host arrays, in the shape of the new run's ``params["encoder"]``.

    Args:
      abstract_params: The new run's parameters as ``ShapeDtypeStruct``.
      run: The run to start from; its newest checkpoint is read.

    Returns:
      ``{"encoder": ...}`` to put over fresh parameters, and a note on parameters that find no use.

    Raises:
      UserError: no run there, or parameters are missing or of another shape; names each.
    """
    objective = objective_class(read_config(run))
    variables = read_variables(run)
    found = objective.encoder(variables["params"], variables["state"])["params"]
    found = traverse_util.flatten_dict(found, sep="/")
    wanted = traverse_util.flatten_dict(dict(abstract_params["encoder"]), sep="/")
    problems = []
    missing = sorted(set(wanted) - set(found))
    if missing:
        problems.append(f"missing there: {', '.join(missing)}")
    reshaped = [
        f"{name} {found[name].shape} there, {leaf.shape} expected"
        for name, leaf in sorted(wanted.items())
        if name in found and found[name].shape != leaf.shape
    ]
    if reshaped:
        problems.append(f"of another shape: {', '.join(reshaped)}")
    if problems:
        raise UserError(f"config.init {str(run)!r} does not fit the model; {'; '.join(problems)}")
    extra = sorted(set(found) - set(wanted))
    notes = [f"config.init {run}: unused parameters {', '.join(extra)}"] if extra else []
    encoder = {name: np.asarray(found[name], wanted[name].dtype) for name in wanted}
    return {"encoder": traverse_util.unflatten_dict(encoder, sep="/")}, notes


def overlay(params: Any, given: Mapping[str, Any]) -> Any:
    """``params`` with the subtrees of ``given`` in place of its own, each array where the one it replaces was."""

    def place(new: np.ndarray, old: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])

    return {**params, **{name: jax.tree.map(place, tree, params[name]) for name, tree in given.items()}}

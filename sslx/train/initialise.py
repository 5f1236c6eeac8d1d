"""Starting from another run or from published weights: their parameters take the place of the new run's.

In: ``config.init``, a run's folder or one that transformers has written. Out: the architecture and the tokenizer that
the new run takes over, and the parameters, checked name by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from flax import traverse_util

from sslx.config import TO_BE_GIVEN, load_class
from sslx.errors import UserError
from sslx.interop.folder import PublishedFolder, is_published, listed
from sslx.objective import Objective
from sslx.storage import check
from sslx.train.checkpoint import chosen_step, read_variables
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


class RunFolder:
    """A run as a start."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.model, self.tokenizer = config["model"], folder / "tokenizer"
        self._folder, self._config = folder, config
        self.of_task = part_of(config) == "task"

    @functools.cached_property
    def step(self) -> int:
        """Which checkpoint: the best of a downstream task's run, the newest of any other."""
        return chosen_step(self._folder, self._config, None)

    def unused(self) -> list[str]:
        """Tensors of no known meaning: none."""
        return []

    def params(self) -> dict[str, Any]:
        """Parameters of `step` as host arrays: ``encoder``, and the parts beside it.

        Raises:
          UserError: it has none, or it cannot be read.
        """
        variables = read_variables(self._folder, self.step)
        encoder = objective_class(self._config).encoder(variables["params"], variables["state"])["params"]
        return {**variables["params"], "encoder": encoder}


def open_start(folder: Path) -> RunFolder | PublishedFolder:
    """The folder that ``config.init`` names: where its model, tokenizer and parameters come from.

    Raises:
      UserError: it is no run (names the nearest) and no folder of published weights that are supported.
    """
    config = read_config(folder, published=True)
    return PublishedFolder(folder) if is_published(config) else RunFolder(folder, config)


def inherited(written: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """What a config takes from the folder that ``config.init`` names (``FOLDER`` or ``scratch:FOLDER``).

    Returns:
      The config, with the architecture of what is there for a downstream task, or if these are published weights; and
      the folder of its tokenizer, or None.

    Raises:
      UserError: there is nothing to start from (names the nearest), or its storage cannot be reached.
    """
    init = written.get("init", "")
    if init.startswith(TO_BE_GIVEN):
        raise UserError(f"config.init is not given; expected --config.init=FOLDER, {init.removeprefix(TO_BE_GIVEN)}")
    like = init.partition(":")[2] if from_scratch(init) else init
    if not like:
        return written, None
    check(like)
    start = open_start(Path(like))
    published = isinstance(start, PublishedFolder)
    if published and not from_scratch(init):
        start.check()
    if "task" in written or published:
        # What the parameters mean comes from there; how they are computed with may be said anew.
        kept = {name: written["model"][name] for name in ("dtype", "remat", "unroll")}
        written = written | {"model": start.model | kept}
    return written, start.tokenizer  # its embeddings mean nothing under another vocabulary


def from_scratch(init: str) -> bool:
    """Whether ``config.init`` starts from random parameters: "", ``scratch`` or ``scratch:RUN``."""
    return not init or init == "scratch" or init.startswith("scratch:")


# Parts beside the encoder that a pretrained model has; what a downstream task adds belongs to its data.
PRETRAINED = ("mlm_head", "pooler", "sentence_head", "discriminator_head", "generator", "regression_head")


def load_encoder(abstract_params: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The encoder of a run or of published weights, with pretrained heads, as host arrays in the new run's shapes.

    Args:
      abstract_params: The new run's parameters as ``ShapeDtypeStruct``.
      folder: What to start from; of a run, the checkpoint that `chosen_step` names is read.

    Returns:
      ``{"encoder": ...}`` to put over fresh parameters, with those of the `PRETRAINED` parts that the new run has
      too; and notes on parameters that find no use and on parts of these that start anew.

    Raises:
      UserError: no run there, or parameters are missing, of another shape or not finite; names each.
    """
    start = open_start(folder)
    given = start.params()
    found = traverse_util.flatten_dict(given["encoder"], sep="/")
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
        raise UserError(f"config.init {str(folder)!r} does not fit the model; {'; '.join(problems)}")
    extra = sorted(set(found) - set(wanted))
    notes = [f"config.init {folder}: unused parameters {', '.join(extra)}"] if extra else []
    if unknown := start.unused():
        notes.append(f"config.init {folder}: tensors that find no use: {listed(unknown)}")
    if isinstance(start, RunFolder) and start.of_task:
        notes.append(f"config.init {folder}: a run of a task; its checkpoint of step {start.step} is taken")
    encoder = {name: np.asarray(found[name], wanted[name].dtype) for name in wanted}
    taken = {"encoder": traverse_util.unflatten_dict(encoder, sep="/")}
    for part in (part for part in PRETRAINED if part in abstract_params):
        if part not in given:
            notes.append(f"config.init {folder}: there is no {part}, which starts anew")
            continue
        fresh = dict(abstract_params[part])
        if jax.tree.map(np.shape, given[part]) == jax.tree.map(lambda leaf: leaf.shape, fresh):
            taken[part] = jax.tree.map(lambda leaf, new: np.asarray(leaf, new.dtype), given[part], fresh)
        else:
            notes.append(f"config.init {folder}: {part} is of another shape there and starts anew")
    named = traverse_util.flatten_dict(taken, sep="/")
    if broken := sorted(name for name, array in named.items() if not np.isfinite(array).all()):
        raise UserError(f"config.init {str(folder)!r} holds values that are not finite: {', '.join(broken)}")
    return taken, notes


def overlay(params: Any, given: Mapping[str, Any]) -> Any:
    """``params`` with the subtrees of ``given`` in place of its own, each array where the one it replaces was."""

    def place(new: np.ndarray, old: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])

    return {**params, **{name: jax.tree.map(place, tree, params[name]) for name, tree in given.items()}}

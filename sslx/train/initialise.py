"""Starting from another run or from published weights: their parameters take the place of the new run's.

In: ``config.init``, a run's folder or one that transformers has written. Out: the architecture and the tokenizer that
the new run takes over, and the parameters, checked name by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from flax import traverse_util

from sslx.config import TO_BE_GIVEN, load_class
from sslx.errors import UserError
from sslx.interop.folder import PublishedFolder, is_published, listed
from sslx.models import statistics
from sslx.objective import Objective
from sslx.settings import RunConfig
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


def trained_class(written: Mapping[str, Any], config: RunConfig) -> type[Objective]:
    """The class that a run trains: its objective's, or the one that watches the features of that while it trains."""
    if config.online.probe:
        from sslx.pretext.online import Watched

        return Watched
    return objective_class(written)


class RunFolder:
    """A run as a start."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.model = config["model"]
        self.tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else None  # runs on text have one
        self.folder, self._config = folder, config
        self.of_task = part_of(config) == "task"

    @functools.cached_property
    def step(self) -> int:
        """Which checkpoint: the best of a downstream task's run, the newest of any other."""
        return chosen_step(self.folder, self._config, None)

    def unused(self) -> list[str]:
        """Tensors of no known meaning: none."""
        return []

    def params(self) -> dict[str, Any]:
        """Parameters of `step` as host arrays: ``encoder``, and the parts beside it.

        Raises:
          UserError: it has none, or it cannot be read.
        """
        return {**self._variables["params"], "encoder": self._encoder["params"]}

    def statistics(self) -> dict[str, Any]:
        """Running averages of the encoder's batch normalisation; {} where it has none."""
        return self._encoder.get(statistics.NAME, {})

    @functools.cached_property
    def _variables(self) -> dict[str, Any]:
        return read_variables(self.folder, self.step)

    @property
    def _encoder(self) -> dict[str, Any]:
        return objective_class(self._config).encoder(self._variables["params"], self._variables["state"])


def open_start(folder: Path) -> RunFolder | PublishedFolder:
    """The folder that ``config.init`` names: where its model, tokenizer and parameters come from.

    Raises:
      UserError: it is no run (names the nearest) and no folder of published weights that are supported.
    """
    config = read_config(folder, published=True)
    return PublishedFolder(folder) if is_published(config) else RunFolder(folder, config)


def inherited(written: dict[str, Any], given_keys: Sequence[str] = ()) -> tuple[dict[str, Any], Path | None]:
    """What a config takes from the folder that ``config.init`` names (``FOLDER`` or ``scratch:FOLDER``).

    Args:
      written: The whole config.
      given_keys: The keys that were asked for by name, such as ``model.layers``, and may not be passed over.

    Returns:
      The config, with the architecture of what is there for a downstream task, or if these are published weights; and
      the folder of its tokenizer, or None.

    Raises:
      UserError: there is nothing to start from (names the nearest), its storage cannot be reached, or it has another
        value of what was asked for.
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
        given = {
            name: written["model"][name]
            for name in ("dtype", "remat", "unroll", "attention")
            if name in written["model"]
        }
        # Runs of before there was a choice have no "attention".
        known = {*start.model, "attention"} if "heads" in start.model else set(start.model)
        kept = {name: value for name, value in given.items() if published or name in known}
        model = _of_size(start.model | kept, written, like)
        _check_given(given_keys, written["model"], model, like)
        written = written | {"model": model}
    if start.tokenizer and (passed_over := {"data.tokenizer", "data.vocab_size"}.intersection(given_keys)):
        raise UserError(
            f"config.{min(passed_over)} is given, and the tokenizer is that of {like!r}, as its embeddings are; "
            "leave it out"
        )
    return written, start.tokenizer  # its embeddings mean nothing under another vocabulary


def _check_given(keys: Sequence[str], asked: Mapping[str, Any], model: Mapping[str, Any], start: str) -> None:
    """Refuses values of the model that were asked for where that of the start has others."""
    for name in (key.removeprefix("model.") for key in keys if key.startswith("model.")):
        if asked.get(name) != model.get(name):
            there = f"has {model[name]!r}" if name in model else "has none"
            raise UserError(
                f"config.model.{name} is {asked.get(name)!r}, and the model is that of {start!r}, which {there}; leave "
                "it out, or start from scratch"
            )


def _of_size(model: Mapping[str, Any], written: Mapping[str, Any], start: str) -> Mapping[str, Any]:
    """The model for pictures of the size that a task's data have, where its parameters say nothing of the size.

    Raises:
      UserError: they do, since each position has a learned vector of its own.
    """
    size = written["data"].get("image_size") if "image_size" in model else None
    if size is None or size == model["image_size"]:
        return model
    if model["name"] == "igpt":  # whose positions are always learned
        return model
    if model.get("positions") == "learned":
        raise UserError(
            f"config.data.image_size is {size}, and the model of {start!r} has learned positions for pictures of "
            f"{model['image_size']}; expected that size, or a run with config.model.positions=sincos or rope"
        )
    return {**model, "image_size": size}


def from_scratch(init: str) -> bool:
    """Whether ``config.init`` starts from random parameters: "", ``scratch`` or ``scratch:RUN``."""
    return not init or init == "scratch" or init.startswith("scratch:")


CODEBOOK = "codebook"  # of an encoder of pixels: colours that are made of the data before training begins

# Parts beside the encoder that a pretrained model has; what a downstream task adds belongs to its data.
PRETRAINED = ("mlm_head", "pooler", "sentence_head", "discriminator_head", "generator", "regression_head")


def load_encoder(
    abstract_params: Mapping[str, Any], start: RunFolder | PublishedFolder
) -> tuple[dict[str, Any], list[str]]:
    """The encoder of a run or of published weights, with pretrained heads, as host arrays in the new run's shapes.

    Args:
      abstract_params: The new run's parameters as ``ShapeDtypeStruct``.
      start: Of a run, the checkpoint that `chosen_step` names is read.

    Returns:
      ``{"encoder": ...}`` to put over fresh parameters, with those of the `PRETRAINED` parts that the new run has
      too; and notes on parameters that find no use and on parts of these that start anew.

    Raises:
      UserError: parameters are missing, of another shape or not finite; names each.
    """
    folder, given = start.folder, start.params()
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


def load_codebook(abstract_params: Mapping[str, Any], init: str) -> dict[str, Any]:
    """What ``scratch:RUN`` takes of the run's parameters: colours, without which its tokens mean something else.

    Returns:
      ``{"encoder": {"codebook": ...}}`` to put over fresh parameters; {} where the model has none, or no run is named.
    """
    folder = init.partition(":")[2]
    if not folder or CODEBOOK not in abstract_params.get("encoder", {}):
        return {}
    return {"encoder": {CODEBOOK: open_start(Path(folder)).params()["encoder"][CODEBOOK]}}


def load_statistics(abstract_state: Mapping[str, Any], start: RunFolder | PublishedFolder) -> dict[str, Any]:
    """Running averages of a run's encoder, to put over those of a fresh state; {} where the model has none.

    Raises:
      UserError: the run's encoder has none, or of other shapes.
    """
    wanted = abstract_state.get(statistics.NAME, {}).get("encoder")
    if wanted is None:
        return {}
    found = start.statistics()
    if jax.tree.map(np.shape, found) != jax.tree.map(lambda leaf: leaf.shape, dict(wanted)):
        raise UserError(
            f"config.init {str(start.folder)!r} has no running averages of batch normalisation that fit the model"
        )
    return {statistics.NAME: {"encoder": found}}


def overlay(params: Any, given: Any) -> Any:
    """``params`` with the arrays of ``given`` in place of its own, each where the one it replaces was."""
    if not isinstance(given, Mapping):
        return jax.make_array_from_callback(params.shape, params.sharding, lambda index: given[index])
    return {**params, **{name: overlay(params[name], tree) for name, tree in given.items()}}

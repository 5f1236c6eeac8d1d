"""From a written config to a trained run: what pretraining and fine-tuning do alike.

Everything that can be wrong with the input is found before the run folder exists and before anything compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslx.config import RunConfig, build, load_class
from sslx.errors import UserError, choose, nearest
from sslx.objective import Objective
from sslx.runtime import configure, describe_devices, display, is_first_process
from sslx.train.console import Console
from sslx.train.initialise import from_scratch, load_encoder
from sslx.train.loop import Trained, Trainer
from sslx.train.metrics import require_wandb
from sslx.train.run_folder import exclusive, has_checkpoint, resolve, write_config
from sslx.train.sharding import on_mesh


@dataclasses.dataclass
class Session:
    """A run that has been trained, with what its entry needs to say more about it."""

    written: dict[str, Any]
    objective: Objective
    data: Any
    trainer: Trainer
    trained: Trained
    console: Console


def train(
    written: dict[str, Any], workdir: Path, *, part: str, table: Mapping[str, str], tokenizer: Path | None, title: str
) -> Session:
    """Trains, or goes on training, the run in ``workdir``.

    Args:
      written: The whole config as plain dicts.
      workdir: The run folder; created when everything has been checked.
      part: The objective's key in the config: ``pretext`` or ``task``.
      table: Names of objectives to classes.
      tokenizer: Folder of the tokenizer of the run that ``config.init`` names, or None.
      title: Heads what is printed.

    Raises:
      UserError: anything the user can mend.
    """
    configure()
    # What cannot be is told before what differs from an earlier run in this folder.
    written = resolve(workdir, {**written, **dataclasses.asdict(run_config(written, part))})
    config = run_config(written, part)
    require_wandb(config.log.wandb)
    objective_class = load_class(written[part]["name"], table, f"config.{part}.name", Objective)
    resumes = has_checkpoint(workdir)
    if resumes and (workdir / "tokenizer").is_dir():
        tokenizer = workdir / "tokenizer"
    objective, data = objective_class.prepare(written, str(tokenizer) if tokenizer else None)
    trainer = Trainer(config, objective, data)
    _check_best_metric(trainer)
    start = None
    if not from_scratch(config.init) and not resumes:
        params, notes = load_encoder(trainer.abstract.params, Path(config.init))
        trainer.notes.extend(notes)
        start = lambda: trainer.started_from(params)  # noqa: E731
    console = Console()
    with exclusive(workdir):
        if is_first_process():
            write_config(workdir, written)
            if not (workdir / "tokenizer").is_dir():
                data.save(workdir)
        console.header(title, _header(config, written, workdir, trainer, data.statistics))
        for note in trainer.notes:
            console.say(f"note: {note}")
        trained = trainer.run(workdir, console, written, start)
    if trained.signal:
        console.say(f"saved at step {int(trained.state.step)} on {trained.signal}; the same command resumes")
    return Session(written, objective, data, trainer, trained, console)


def run_config(written: Mapping[str, Any], part: str) -> RunConfig:
    """The part of a config that every run has.

    Raises:
      UserError: a key is missing or unknown.
    """
    parts = ("data", "model", part)
    for name in parts:
        if name not in written:
            other = "sslx.finetune" if "task" in written else "sslx.main"
            raise UserError(f"the config has no config.{name}; is it one for python -m {other}?")
        if not isinstance(written[name], Mapping):
            raise UserError(f"config.{name} is {written[name]!r}; expected a group of values")
    if "name" not in written[part]:
        raise UserError(f"the config has no config.{part}.name")
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    for name in written:
        if name not in fields and name not in parts:
            raise UserError(f"unknown key config.{name}; {nearest(name, [*fields, *parts])}")
    return build(RunConfig, {name: value for name, value in written.items() if name in fields})


def _check_best_metric(trainer: Trainer) -> None:
    with on_mesh(trainer.mesh):
        names = trainer.evaluator.metric_names(trainer.abstract.params, trainer.abstract.state, trainer.data.eval)
    choose(trainer.config.checkpoint.best_metric, [f"eval/{name}" for name in names], "config.checkpoint.best_metric")


def _header(
    config: RunConfig, written: Mapping[str, Any], workdir: Path, trainer: Trainer, statistics: Mapping[str, Any]
) -> dict[str, str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    rows = {
        "devices": describe_devices(),
        "mesh": mesh,
        "parameters": f"{trainer.parameters / 1e6:.2f} M",
        "data": f"{written['data']['source']}: {statistics['train_rows']:,} rows, {statistics['train_tokens']:,} tokens"
        f" to train on ({statistics['train_split']}), {statistics['eval_rows']:,} rows held out"
        f" ({statistics['eval_split']})",
        "run": f"{config.steps:,} steps of {config.batch_size} rows, {_epochs(config, statistics):.1f} epochs",
    }
    chance = trainer.objective.chance(statistics)
    if chance is not None:
        rows["chance"] = f"{chance:.4f} (loss of a model that guesses)"
    if config.init:
        rows["start"] = config.init
    rows["written to"] = f"{display(workdir)} (checkpoints, metrics.jsonl, TensorBoard events, tokenizer)"
    return rows


def _epochs(config: RunConfig, statistics: Mapping[str, Any]) -> float:
    return config.steps * config.batch_size / statistics["train_rows"]

"""From a written config to a trained run: what pretraining and fine-tuning do alike.

Everything that can be wrong with the input is found before the run folder exists and before anything compiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

import jax
from etils.epath import Path

from sslx.config import build, differences
from sslx.errors import UserError, choose, nearest
from sslx.objective import Objective
from sslx.runtime import configure, describe_devices, display, is_first_process
from sslx.settings import HostsConfig, MeshConfig, RunConfig
from sslx.storage import check, local_copy, upload, write_text
from sslx.train.console import Console
from sslx.train.hosts import agree, host_name, progress, together
from sslx.train.initialise import (
    from_scratch,
    load_codebook,
    load_encoder,
    load_statistics,
    open_start,
    trained_class,
)
from sslx.train.loop import Trained, Trainer
from sslx.train.metrics import require_wandb
from sslx.train.optimizer import check_optimizer, make_schedule
from sslx.train.run_folder import TOKEN, check_shared, exclusive, has_checkpoint, resolve, write_config, write_splits
from sslx.train.sharding import check_batch, make_mesh, on_mesh


@dataclasses.dataclass
class Session:
    """A run that has been trained, with what its entry needs to say more about it."""

    written: dict[str, Any]
    objective: Objective
    data: Any
    trainer: Trainer
    trained: Trained
    console: Console


def train(written: dict[str, Any], workdir: Path, *, part: str, tokenizer: Path | None, title: str) -> Session:
    """Trains, or goes on training, the run in ``workdir``.

    Args:
      written: The whole config as plain dicts.
      workdir: The run folder; created when everything has been checked.
      part: The objective's key that the entry expects in the config: ``pretext`` or ``task``.
      tokenizer: Folder of the tokenizer of the run that ``config.init`` names, or None.
      title: Heads what is printed.

    Raises:
      UserError: anything the user can mend.
    """
    progress("preparing", limited=False)
    with together("preparing"):
        check(workdir)
        configure()
        # What cannot be is told before what differs from an earlier run in this folder.
        written = resolve(workdir, {**written, **dataclasses.asdict(run_config(written, part))})
        config = run_config(written, part)
        require_wandb(config.log.wandb)
        resumes = has_checkpoint(workdir)
        if resumes and (workdir / "tokenizer").is_dir():
            tokenizer = workdir / "tokenizer"
        kind = trained_class(written, config)
        # Preparing data may take hours: what is wrong whatever they are is told first.
        _check_optimizer(config)
        mesh = make_mesh(config.mesh)
        check_batch(config.batch_size, config.micro_batches, mesh)
        objective, data = kind.prepare(written, str(local_copy(tokenizer)) if tokenizer else None)
        trainer = Trainer(config, objective, data, mesh)
        _check_best_metric(trainer)
        notes, start = [*trainer.program.notes, *_unread(part, data)], None
        notes += _told_apart(objective, config, data.statistics)
        if not from_scratch(config.init) and not resumes:
            given = open_start(Path(config.init))
            params, unused = load_encoder(trainer.program.abstract.params, given)
            notes += unused
            statistics = load_statistics(trainer.program.abstract.state, given)
            start = lambda: trainer.program.started_from(params, statistics)  # noqa: E731
        elif part == "task" and not resumes:
            colours = load_codebook(trainer.program.abstract.params, config.init)
            start = (lambda: trainer.program.started_from(colours)) if colours else None
    _check_same(written, resumes, data.statistics)
    console = Console()
    with contextlib.ExitStack() as stack:
        with together("opening the run folder"):
            if is_first_process():
                stack.enter_context(exclusive(workdir))
                write_config(workdir, written)
                # Before the first checkpoint there may be part of one, of a start that was killed here.
                if not (resumes and (workdir / "tokenizer").is_dir()):
                    with tempfile.TemporaryDirectory() as made:
                        data.save(LocalPath(made))
                        write_splits(LocalPath(made), data.statistics)
                        upload(LocalPath(made), workdir)
        if jax.process_count() > 1:
            _look_for(workdir)
        console.header(title, _header(config, written, workdir, trainer, data.statistics))
        for note in notes:
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


def check_run(written: Mapping[str, Any], part: str) -> None:
    """Checks what training checks before it begins, as far as that needs neither its devices nor its folder.

    Raises:
      UserError: anything the user can mend.
    """
    config = run_config(written, part)
    require_wandb(config.log.wandb)
    kind = trained_class(written, config)
    _check_optimizer(config)
    objective, data = kind.prepare({**written, **dataclasses.asdict(config)})
    _check_best_metric(Trainer(config, objective, data, make_mesh(MeshConfig(data=1), jax.devices()[:1])))


def hosts_config(written: Mapping[str, Any]) -> HostsConfig:
    """How to join other processes, read before anything else of the config, since nothing may run before.

    Raises:
      UserError: ``config.hosts`` is not right.
    """
    return build(HostsConfig, written.get("hosts", {}), "config.hosts")


def _check_same(written: Mapping[str, Any], resumes: bool, statistics: Mapping[str, Any]) -> None:
    """Hosts with other programs or other rows would train on, each on its own, and no restart could repeat it."""
    data = {name: value for name, value in written["data"].items() if name not in ("cache_dir", "tfds_dir")}
    config = {**written, "data": data, "hosts": None}
    here = {"config": config, "resumes": resumes, "jax": jax.__version__, "data": statistics.get("fingerprint", "")}
    everywhere = agree("comparing the hosts", json.loads(json.dumps(here)))
    for index, there in enumerate(everywhere):
        others = {name: value for name, value in there.items() if value != everywhere[0][name]}
        if "config" in others:
            found = differences(everywhere[0]["config"], there["config"])
            listing = "; ".join(f"config.{key}: {a!r} there, {b!r} here" for key, (a, b) in found.items())
            raise UserError(f"{host_name(index)} was started with another config than {host_name(0)} ({listing})")
        if "jax" in others or "resumes" in others:
            what = "another version of jax" if "jax" in others else "another state of the run folder"
            raise UserError(f"{host_name(index)} has {what} than {host_name(0)}; expected the same on all hosts")
        if others:
            raise UserError(
                f"{host_name(index)} has prepared other data than {host_name(0)}; expected the same files and, for "
                "python_docs, the same installed packages on all hosts (or one shared config.data.cache_dir)"
            )


def _look_for(workdir: Path) -> None:
    token = agree("naming the run folder", secrets.token_hex(8))[0]
    with together("writing the run folder"):
        if is_first_process():
            write_text(workdir / TOKEN, token)
    with together("looking for the run folder"):
        check_shared(workdir, token)
    if is_first_process():
        (workdir / TOKEN).unlink(missing_ok=True)


def _check_optimizer(config: RunConfig) -> None:
    check_optimizer(config.optimizer)
    make_schedule(config.optimizer, config.steps)


def _check_best_metric(trainer: Trainer) -> None:
    abstract = trainer.program.abstract
    with on_mesh(trainer.program.mesh):
        names = trainer.evaluator.metric_names(abstract.params, abstract.state, trainer.data.eval)
    choose(trainer.config.checkpoint.best_metric, [f"eval/{name}" for name in names], "config.checkpoint.best_metric")


def _unread(part: str, data: Any) -> list[str]:
    """A note on test rows that a task could report on and does not read."""
    if part == "task" and data.test is None and "test" in data.statistics.get("unread_splits", ()):
        return ["the data have a split 'test'; with --config.data.test_split=test the report at the end is on it"]
    return []


def _told_apart(objective: Objective, config: RunConfig, statistics: Mapping[str, Any]) -> list[str]:
    """A note on held-out rows that are fewer than those of a batch, where chance is a matter of how many there are."""
    rows, whole = statistics["eval_rows"], {**statistics, "eval_rows": config.batch_size}
    if rows >= config.batch_size or objective.chance(statistics) == objective.chance(whole):
        return []
    return [
        f"{rows} rows are held out and a batch has {config.batch_size}: compared with fewer others they lose less than "
        "in training, and chance is told for so many; config.data.eval_split can hold out more"
    ]


def _header(
    config: RunConfig, written: Mapping[str, Any], workdir: Path, trainer: Trainer, statistics: Mapping[str, Any]
) -> dict[str, str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in trainer.program.mesh.shape.items())
    unit = statistics.get("row_unit", "rows")
    tokens = f", {statistics['train_tokens']:,} tokens" if "train_tokens" in statistics else ""
    rows = {
        "devices": describe_devices(),
        "mesh": mesh,
        "parameters": f"{trainer.program.parameters / 1e6:.2f} M",
        "data": f"{written['data']['source']}: {statistics['train_rows']:,} {unit}{tokens}"
        f" to train on ({statistics['train_split']}), {statistics['eval_rows']:,} {unit} held out"
        f" ({_sampled(statistics['eval_split'], written['data']['source'])})",
        "run": f"{config.steps:,} steps of {config.batch_size} {unit}, {_epochs(config, statistics):.1f} epochs",
    }
    chance = trainer.objective.chance(statistics)
    if chance is not None:
        rows["chance"] = f"{chance:.4f} (loss of a model that guesses)"
    if config.init:
        rows["start"] = config.init
    rows["written to"] = f"{display(workdir)} (checkpoints, metrics.jsonl, TensorBoard events)"
    return rows


def _sampled(split: str, source: str) -> str:
    """A split as the header has it: slices of files are cut in a shuffled order, which their notation does not tell."""
    shuffled = "[" in split and not source.startswith(("tfds:", "rows:"))
    return f"{split}, a random sample" if shuffled else split


def _epochs(config: RunConfig, statistics: Mapping[str, Any]) -> float:
    return config.steps * config.batch_size / statistics["train_rows"]

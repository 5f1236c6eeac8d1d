"""Times a config: ``python -m sslx.bench --config=configs/bert_mlm.py``, for pretraining and for fine-tuning.

The real loop runs for a few steps, with the real data, from random parameters, and leaves no run. Told are the time of
a step and its parts, what a second brings, the model's arithmetic beside the chip's published peak and beside a matrix
product that is measured here, compile times and peak memory. Values of the experiment change as usual.

  --steps=N               steps that are timed; default: 30
  --warmup=N              steps before them, at least 3; default: 5
  --json[=FILE]           writes the numbers to a file, or to standard output and nothing else there
  --profile=FOLDER        traces 3 more steps into a folder, and prints the ten most expensive operations
  --compare=FILE          prints ratios to what --json wrote earlier, new over old

Exit codes: 0 it is measured, 1 it was stopped, 2 the config or a flag cannot be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from sslx import entry
from sslx.errors import UserError
from sslx.runtime import configure, is_first_process
from sslx.session import hosts_config, run_config
from sslx.storage import local_copy, write_text
from sslx.timing import report
from sslx.timing.clock import Lap, Spread, TimedSteps, time_alone, time_steps
from sslx.timing.compilation import time_compilation
from sslx.timing.product import Product
from sslx.timing.result import Result, comparable, peak_memory, read
from sslx.timing.trace import Operation, operations, trace
from sslx.train import memory
from sslx.train.chips import peak_flops
from sslx.train.console import Console, plain
from sslx.train.hosts import joined, progress, together
from sslx.train.initialise import inherited, part_of, trained_class
from sslx.train.loop import Trainer
from sslx.train.sharding import on_mesh

STDOUT = "-"
TRACED = 3  # steps
PRODUCTS = 5  # measured before the steps, and once more after them
PACKAGES = ("jax", "jaxlib", "flax", "optax")


def main(config: ml_collections.ConfigDict, workdir: Path) -> Result:
    """Measures as the flags say, prints, and returns what was found."""
    given = flags.FLAGS
    target = None if given.json in ("", STDOUT) else _writable(Path(given.json), "bench.json")
    folder = _new_folder(Path(given.profile)) if given.profile else None
    there = read(Path(given.compare)) if given.compare else None
    written = config.to_dict()
    with joined(hosts_config(written)):
        trainer, written = _built(written)
        changed = comparable(written, trainer.program.batch_shapes, there, Path(given.compare)) if there else []
        found = measure(trainer, written, steps=given.steps, warmup=given.warmup, folder=folder)
        if not is_first_process():
            return found
        console = plain(highlight=False)
        report.show(found, console)
        if there:
            report.compare(found, there, given.compare, changed, console)
        if target:
            write_text(target, json.dumps(found.json(), indent=2) + "\n")
            console.print(f"written: {target}", markup=False)
    return found


def measure(
    trainer: Trainer, written: Mapping[str, Any], *, steps: int, warmup: int, folder: Path | None = None
) -> Result:
    """Times a trainer's steps.

    Args:
      trainer: As a run would have it.
      written: The resolved config.
      steps: How many are timed.
      warmup: How many come before.
      folder: Where a trace of some more goes; None: nothing is traced.
    """
    say, program = Console().say, trainer.program
    explained = functools.partial(memory.explained, trainer.config, written["model"], program.mesh)
    with on_mesh(program.mesh), explained():
        say(f"compiling {program.parameters / 1e6:.2f} M parameters, twice")
        progress("compiling", limited=False)
        with together("compiling"):
            compilation = time_compilation(program)
        precision = written["model"].get("dtype", "float32")
        product = Product(program.mesh, precision)
        rates = product.rates(PRODUCTS)
        say(f"timing {steps} steps after {warmup} of warm-up")
        timed = TimedSteps(trainer, program.fresh())
        laps = time_steps(timed, 0, steps, warmup)
        alone = time_alone(trainer, timed, warmup + steps, max(5, steps // 3))
        most, counted = peak_memory()
        rates += product.rates(PRODUCTS)
        expensive = _traced(trainer, timed, folder) if folder else []
    notes = [*program.notes, *program.undivided]
    if not timed.finite:
        notes.append("a loss or a gradient was not finite, and the steps after it have changed nothing")
    statistics, peak = trainer.data.statistics, peak_flops(jax.devices()[0])
    tokens, places = statistics.get("tokens_per_row"), program.batch_shapes.get("segment_ids")
    return Result(
        config=json.loads(json.dumps(written)),
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        batch={name: list(shape) for name, shape in program.batch_shapes.items()},
        **_parts(laps),
        alone=Spread.of(alone),
        row_unit=statistics.get("row_unit", "rows"),
        useful=None if tokens is None else tokens * trainer.config.batch_size,
        positions=None if places is None or tokens is None else places[0] * places[1],
        model_flops=program.flops,
        precision=precision,
        product_size=product.size,
        product=Spread.of(rates),
        peak=None if peak is None else peak * jax.device_count(),
        compilation=compilation,
        memory=most,
        memory_of=counted,
        notes=tuple(notes),
        operations=tuple(expensive),
    )


def _built(written: dict[str, Any]) -> tuple[Trainer, dict[str, Any]]:
    """What a run would train with this config, and the config resolved; nothing is written but prepared data."""
    with together("preparing"):
        configure()
        run = run_config(written, part_of(written))
        written, tokenizer = inherited(written | dataclasses.asdict(run), entry.given_keys())
        kind = trained_class(written, run)
        progress("preparing", limited=False)
        objective, data = kind.prepare(written, str(local_copy(tokenizer)) if tokenizer else None)
        return Trainer(run, objective, data), written


def _parts(laps: list[Lap]) -> dict[str, Spread]:
    totals = {"step": [lap.total for lap in laps], "waiting": [lap.device for lap in laps]}
    totals |= {name: [getattr(lap, name) for lap in laps] for name in ("input", "host")}
    return {name: Spread.of(values) for name, values in totals.items()}


def _traced(trainer: Trainer, timed: TimedSteps, folder: Path) -> list[Operation]:
    text = trainer.program.lower_train().compile().as_text()
    start = int(timed.state.step)

    def run() -> None:
        timed.drive(start, start + TRACED)
        timed.drain()
        jax.block_until_ready(timed.state)

    return operations(trace(run, folder), text, TRACED)


def _writable(target: Path, example: str) -> Path:
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder; expected a file, such as {target / example}")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: no folder {target.parent}")
    return target


def _new_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--profile={folder} is a file; expected a folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"cannot write {folder}: no folder {folder.parent}")
    return folder


def _main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    # SIGTERM ends it as Ctrl-C does: temporary folders go. What a shell starts in the background would ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if flags.FLAGS.json == STDOUT:
        print(json.dumps(main(config, workdir).json(), indent=2), file=_stdout)
    else:
        main(config, workdir)


def _define_flags() -> None:
    flags.DEFINE_integer("steps", 30, "Steps that are timed", lower_bound=1)
    flags.DEFINE_integer("warmup", 5, "Steps before them", lower_bound=3)
    flags.DEFINE_string("json", "", "File to write the numbers to, or - for standard output")
    flags.DEFINE_string("profile", "", "Folder to write a trace to")
    flags.DEFINE_string("compare", "", "File of an earlier result")


if __name__ == "__main__":
    _define_flags()
    # absl's flags have a value, or take the argument that follows for it.
    sys.argv = [f"--json={STDOUT}" if argument in ("--json", "-json") else argument for argument in sys.argv]
    _stdout = sys.stdout
    # What is meant for a person goes to standard error then, the notes of the data's preparation too.
    to_stdout = any(argument.lstrip("-") == f"json={STDOUT}" for argument in sys.argv[1:])
    with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        entry.run(_main, needs_workdir=False)

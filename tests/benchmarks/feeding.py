"""How much faster the input is than the step it feeds: batches a second that nobody computes on, beside steps a second.

    python tests/benchmarks/feeding.py

For each config, as it is, with its embedded data: the real batches, read ahead by a thread and handed to the device,
are taken as fast as they come (median of five rounds of ``--batches``); the compiled step runs by itself (median of a
third of ``--steps``); and the real loop tells what share of its time it waits for a batch. On a CPU, that thread shares
its cores with the step in the loop, and not in the first number. The aim is a ratio of 20.

One to two minutes on two CPU cores, most of it compilation, and one more the first time, when data are prepared. Use an
idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from sslx.entry import load_config
from sslx.runtime import configure, describe_devices
from sslx.session import run_config
from sslx.timing.clock import Spread, TimedSteps, time_alone, time_steps
from sslx.timing.report import ratio
from sslx.train.initialise import trained_class
from sslx.train.loop import Trainer
from sslx.train.sharding import on_mesh

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("configs/bert_mlm.py", "configs/gpt_clm.py", "configs/vit_mae.py", "configs/simclr.py")
AIM, ROUNDS, WARMUP = 20, 5, 5


@dataclasses.dataclass(frozen=True)
class Fed:
    """What one config's input and step take: seconds a batch and a step, and the share of the loop that waits."""

    batch: dict[str, tuple[int, ...]]
    input: Spread
    step: Spread
    waiting: float

    @property
    def times_faster(self) -> tuple[float, float, float]:
        """The input than the step, and between what that lies by the quartiles."""
        return ratio(self.step, self.input)

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self) | {"times_faster": self.times_faster}


def built(config: str) -> Trainer:
    """What a run of a config, ``FILE`` or ``FILE:ARGUMENT`` in the repository, would train."""
    file, _, argument = config.partition(":")
    written = load_config(ROOT / file, argument).to_dict()
    run = run_config(written, "pretext")
    return Trainer(run, *trained_class(written, run).prepare(written))


def input_seconds(trainer: Trainer, batches: int) -> list[float]:
    """Seconds a batch that is on the device, in each of some rounds, after one that is not counted."""
    found = []
    for turn in range(ROUNDS + 1):
        begin = time.perf_counter()
        for batch in trainer.batches.stream(turn * batches, (turn + 1) * batches):
            jax.block_until_ready(batch)
        found.append((time.perf_counter() - begin) / batches)
    return found[1:]


def measure(trainer: Trainer, batches: int, steps: int) -> Fed:
    """Times the input by itself, then the loop, then the step by itself."""
    program = trainer.program
    with on_mesh(program.mesh):
        fed = input_seconds(trainer, batches)
        timed = TimedSteps(trainer, program.fresh())
        laps = time_steps(timed, 0, steps, WARMUP)
        alone = time_alone(trainer, timed, WARMUP + steps, max(5, steps // 3))
    waiting = sum(lap.input for lap in laps) / sum(lap.total for lap in laps)
    return Fed(program.batch_shapes, Spread.of(fed), Spread.of(alone), waiting)


def main() -> None:
    """Prints a line for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="FILE[:ARGUMENT]")
    parser.add_argument("--batches", type=int, default=200, help="of a round")
    parser.add_argument("--steps", type=int, default=30, help="of the real loop")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    configure()
    found = {}
    print(f"{describe_devices()}, jax {jax.__version__}", flush=True)
    for config in arguments.configs:
        trainer = built(config)
        if not found:  # below what preparing the first one's data may say
            print(f"{'config':<24}{'batches/s':>10}{'steps/s':>9}  times faster (of {AIM})     loop waits for input")
        found[config] = fed = measure(trainer, arguments.batches, arguments.steps)
        middle, low, high = fed.times_faster
        faster = f"{middle:.0f} ({low:.0f} to {high:.0f})"
        rates = f"{1 / fed.input.median:>10,.0f}{1 / fed.step.median:>9.2f}"
        print(f"{config:<24}{rates}  {faster:<25}{fed.waiting:>9.2%}", flush=True)
    if arguments.json:
        told = {"device": describe_devices(), "jax": jax.__version__}
        told |= {"configs": {config: fed.json() for config, fed in found.items()}}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf8")
        print(f"written: {arguments.json}")


if __name__ == "__main__":
    main()

"""Times the inner loop of training as it is: real batches through the real step, some steps in flight.

In: a `Trainer`. Out: a `Lap` a step, whose parts add up to the time between two steps. Logging, evaluation and
checkpoints are not among them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sslx.objective import Batch
from sslx.train.hosts import progress
from sslx.train.loop import Trainer
from sslx.train.step import TrainState
from sslx.train.steps import Steps


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of several measurements, and their quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of these values."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high), len(values))


@dataclasses.dataclass
class Lap:
    """Seconds that the host spends on one step: on waiting for its batch, on handing it over, on waiting for one that
    the devices have not finished yet."""

    input: float = 0.0
    host: float = 0.0
    device: float = 0.0

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return self.input + self.host + self.device


class TimedSteps(Steps):
    """The inner loop with a clock: ``laps`` has an entry a step."""

    def __init__(self, trainer: Trainer, state: TrainState):
        super().__init__(trainer.program, trainer.batches)
        self.state, self.laps, self.finite = state, [Lap()], True
        self._since = time.perf_counter()

    def start(self) -> None:
        """Starts the clock of the next step now."""
        self.laps[-1], self._since = Lap(), time.perf_counter()

    def send(self, batch: Batch, held: jax.Array) -> dict[str, jax.Array]:
        self._spent_on("input")
        metrics = super().send(batch, held)
        self._spent_on("host")
        return metrics

    def read_one(self) -> None:
        super().read_one()
        self._spent_on("device")

    def landed(self, step: int, votes: Any, held: bool, metrics: dict[str, jax.Array]) -> None:
        self.finite = self.finite and not held
        progress("timing", step)

    def after(self, step: int) -> bool:
        self._spent_on("host")
        self.laps.append(Lap())
        return False

    def _spent_on(self, part: str) -> None:
        now = time.perf_counter()
        setattr(self.laps[-1], part, getattr(self.laps[-1], part) + now - self._since)
        self._since = now


def time_steps(steps: TimedSteps, start: int, count: int, warmup: int) -> list[Lap]:
    """Drives ``warmup`` steps after the step ``start``, then ``count`` more, whose laps it returns.

    All are one stream of batches. The first steps wait for no other, so a warm-up has more than are in flight.
    """
    steps.laps = [Lap()]
    steps.start()
    steps.drive(start, start + warmup + count)
    steps.drain()
    return steps.laps[warmup : warmup + count]


def time_alone(trainer: Trainer, steps: TimedSteps, start: int, count: int) -> list[float]:
    """Seconds of each of ``count`` steps with nothing beside it: from handing it over until its results are there."""
    seconds, held = [], trainer.program.nothing_held()
    for step in range(start, start + count):
        batch = jax.block_until_ready(trainer.batches.at(step))
        begin = time.perf_counter()
        metrics = steps.send(batch, held)
        jax.block_until_ready((steps.state, metrics))
        seconds.append(time.perf_counter() - begin)
        held = metrics["held"]
        progress("timing", step)
    return seconds

"""Steps on their way: batches go in, and the devices have some steps ahead of the one whose numbers are read.

The inner loop of every run. What is due between the steps is its subclass's: `loop` evaluates, saves and logs there,
`sslx.timing` reads the clock.
"""

from __future__ import annotations

import collections
from typing import Any

import jax

from sslx.data.batches import TrainBatches
from sslx.objective import Batch
from sslx.train.hosts import Votes
from sslx.train.program import Program
from sslx.train.step import TrainState

# Steps handed to the device ahead of the one whose numbers are read: the device never waits for the host, and the host
# does not run away from a stop request.
IN_FLIGHT = 2


class Steps:
    """Training steps of a program, from ``state`` on; enter ``on_mesh`` before driving them."""

    state: TrainState

    def __init__(self, program: Program, batches: TrainBatches):
        self._program, self._batches, self._votes = program, batches, Votes(program.mesh)
        self._pending: collections.deque = collections.deque()  # (step, device metrics), oldest first

    def drive(self, start: int, stop: int) -> None:
        """Makes the steps after ``start`` up to ``stop``, counted from 1, or until ``after`` says that it was the last.

        Steps may be in flight when it returns; ``drain`` waits for them.
        """
        held, batches = self._program.nothing_held(), self._batches.stream(start, stop)
        try:
            for step, batch in enumerate(batches, start + 1):
                metrics = self.send(batch, held)
                held = metrics["held"]
                self._pending.append((step, metrics))
                if len(self._pending) > IN_FLIGHT:
                    self.read_one()
                if self.after(step):
                    break
        finally:
            batches.close()

    def send(self, batch: Batch, held: jax.Array) -> dict[str, jax.Array]:
        """Hands a step to the devices; returns its metrics, which are not there yet."""
        self.state, metrics = self._program.train_step(self.state, batch, self.votes(), held)
        return metrics

    def votes(self) -> jax.Array:
        """What this host asks of all: nothing."""
        return self._votes(stop=0, save=False)

    def read_one(self) -> None:
        """Waits for the oldest step in flight."""
        step, metrics = self._pending.popleft()
        votes, held = jax.device_get((metrics.pop("votes"), metrics.pop("held")))
        self.landed(step, votes, bool(held), metrics)

    def landed(self, step: int, votes: Any, held: bool, metrics: dict[str, jax.Array]) -> None:
        """What to do about a step that has been made; nothing."""

    def after(self, step: int) -> bool:
        """What is due after a step was sent; returns whether it was the last one."""
        return False

    def drain(self) -> None:
        """Waits for all steps in flight."""
        while self._pending:
            self.read_one()

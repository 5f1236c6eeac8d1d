"""A teacher that is a moving average of its student (mean teacher, arXiv 1703.01780; BYOL, arXiv 2006.07733).

Only parameters are averaged. A teacher that normalises by the batch does so by the mean and variance of its own forward
pass in training; the running averages of these, which evaluation takes, are its own too and move with its own passes.
Copied from the student they would belong to other weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class MomentumConfig:
    """How much of the teacher stays in an update, over the run."""

    start: float = 0.996
    end: float = 1.0
    schedule: str = "cosine"  # cosine | linear: from the one to the other
    steps: int | None = None  # over so many updates; None: over the learning rate's schedule

    def __post_init__(self):
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.pretext.momentum.{name} is {getattr(self, name)}; expected 0 to 1")
        if self.start == 1:
            raise UserError("config.pretext.momentum.start is 1: the teacher would never move; expected less")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"config.pretext.momentum.steps is {self.steps}; expected at least 1")
        choose(self.schedule, ("cosine", "linear"), "config.pretext.momentum.schedule")

    def at(self, step: Array | int, steps: int) -> Float[Array, ""]:
        """The momentum of update ``step`` of a run whose schedule is ``steps`` long."""
        return between(self.start, self.end, step, self.steps or steps, self.schedule)


def between(start: float, end: float, step: Array | int, steps: int, schedule: str) -> Float[Array, ""]:
    """A value on its way from ``start`` at step 0 to ``end`` at ``steps`` and after: on a line or half a cosine."""
    done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
    if schedule == "cosine":
        done = 0.5 - 0.5 * jnp.cos(jnp.pi * done)
    return start + (end - start) * done


def followed(teacher: Any, student: Any, momentum: Array | float, step: Array) -> Any:
    """The teacher after an update of the student, float32; the first update copies it.

    A run that starts from another (``config.init``) replaces the student's encoder after the teacher was made.

    Args:
      teacher: A tree of arrays.
      student: The same tree, or a larger one with mappings that have further entries, of which nothing is taken.
      momentum: How much of the teacher stays.
      step: Number of the update, from 0.
    """
    momentum = jnp.where(step == 0, 0.0, momentum)

    def move(old: Any, new: Any) -> Any:
        if isinstance(old, dict):
            return {name: move(part, new[name]) for name, part in old.items()}
        return jax.tree.map(lambda a, b: momentum * a + (1.0 - momentum) * b.astype(jnp.float32), old, new)

    return move(teacher, student)


def undropped(model: Any) -> Any:
    """A model without dropout: a teacher sees with all it has."""
    names = {field.name for field in dataclasses.fields(model)}
    return dataclasses.replace(model, **dict.fromkeys(names & {"dropout", "attention_dropout", "drop_path"}, 0.0))

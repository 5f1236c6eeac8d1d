"""Few-shot: how well a linear classifier does that has seen 1, 5 or 10 labelled rows of each class.

In: features and labels of train and test. Out: the accuracy on test for each draw of the labelled rows. Nothing is
chosen on validation, since someone with ten labels has none: the penalty is fixed, on features standardised by all
training rows, whose labels that needs not.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sslx.errors import UserError
from sslx.probing.linear import fit, standardising


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """How many labels, how often drawn, and the classifier."""

    labels: tuple[int, ...] = (1, 5, 10)  # of each class; () leaves few-shot out
    draws: int = 5
    learning_rate: float = 0.03
    weight_decay: float = 0.03
    steps: int = 200

    def __post_init__(self):
        if any(count < 1 for count in self.labels):
            raise UserError(f"config.few_shot.labels are {self.labels}; expected at least 1 each")
        for name in ("draws", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"config.few_shot.{name} is {getattr(self, name)}; expected at least 1")
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise UserError(
                f"config.few_shot.learning_rate is {self.learning_rate} and weight_decay {self.weight_decay}; "
                "expected more than 0, and at least 0"
            )


def few_shot(
    train: Float[np.ndarray, "rows dim"],
    labels: Int[np.ndarray, " rows"],
    test: Float[np.ndarray, "held dim"],
    test_labels: Int[np.ndarray, " held"],
    *,
    classes: int,
    config: FewShotConfig,
    seed: int = 0,
) -> dict[int, Float[np.ndarray, " draws"]]:
    """Accuracies on test by the number of labels of each class.

    A class with fewer rows gives what it has, some of it twice.
    """
    mean, scale = standardising(train)
    x, held = jnp.asarray((train - mean) / scale), jnp.asarray((test - mean) / scale)
    members = [rows for rows in (np.flatnonzero(labels == label) for label in range(classes)) if len(rows)]
    found = {}
    for count in config.labels:
        drawn = np.stack([_draw(members, count, np.random.default_rng([seed, count, d])) for d in range(config.draws)])
        one = functools.partial(fit, classes=classes, steps=config.steps, batch_size=drawn.shape[1])
        setting = jnp.array([config.learning_rate, config.weight_decay], jnp.float32)
        kernels, biases = jax.jit(jax.vmap(one, (None, 0, 0, None)))(
            setting, x[drawn], jnp.asarray(labels[drawn]), jax.random.key(seed)
        )
        guesses = jax.jit(jax.vmap(lambda kernel, bias: jnp.argmax(held @ kernel + bias, axis=-1)))(kernels, biases)
        found[count] = np.mean(np.asarray(guesses) == test_labels, axis=1)
    return found


def _draw(members: list[np.ndarray], count: int, random: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.resize(random.permutation(rows), count) for rows in members])

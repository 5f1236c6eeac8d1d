"""Linear probe: multinomial logistic regression on frozen features, all settings of a grid trained at once.

In: features and labels of train and validation. Out: one classifier, that of the grid which is best on validation.
The loss is the mean cross-entropy plus ``weight_decay / 2 · |W|²`` (the bias is free), so the optimum of one weight
decay is scikit-learn's with ``C = 1 / (weight_decay · rows)``. Features are standardised by the training rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sslx.errors import UserError
from sslx.models.losses import softmax_cross_entropy


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig:
    """How linear probes are trained: every rate with every weight decay."""

    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)  # Adam, falling to 0 by a cosine
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    steps: int = 400
    batch_size: int = 4096  # rows of a step, drawn anew each time; all rows where there are no more

    def __post_init__(self):
        for name in ("learning_rates", "weight_decays"):
            if not getattr(self, name):
                raise UserError(f"config.linear.{name} is empty; expected at least one")
        if not all(rate > 0 for rate in self.learning_rates):
            raise UserError(f"config.linear.learning_rates are {self.learning_rates}; expected more than 0")
        if not all(decay >= 0 for decay in self.weight_decays):
            raise UserError(f"config.linear.weight_decays are {self.weight_decays}; expected 0 or more")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"config.linear.{name} is {getattr(self, name)}; expected at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbe:
    """A trained probe and how it was chosen."""

    mean: Float[np.ndarray, " dim"]
    scale: Float[np.ndarray, " dim"]
    kernel: Float[np.ndarray, "dim classes"]
    bias: Float[np.ndarray, " classes"]
    learning_rate: float
    weight_decay: float
    validation_accuracy: float

    def logits(self, features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows classes"]:
        """Logits of rows."""
        return (features - self.mean) / self.scale @ self.kernel + self.bias


def linear_probe(
    train: Float[np.ndarray, "rows dim"],
    train_labels: Int[np.ndarray, " rows"],
    validation: Float[np.ndarray, "held dim"],
    validation_labels: Int[np.ndarray, " held"],
    *,
    classes: int,
    config: LinearProbeConfig,
    seed: int = 0,
) -> LinearProbe:
    """Trains the grid and chooses by accuracy on validation; of equals, the lower cross-entropy there."""
    mean, scale = standardising(train)
    x, held = ((rows - mean) / scale for rows in (train, validation))
    settings = list(itertools.product(config.learning_rates, config.weight_decays))
    each = functools.partial(fit, classes=classes, steps=config.steps, batch_size=config.batch_size)
    kernels, biases = jax.jit(jax.vmap(each, (0, None, None, None)))(
        np.array(settings, np.float32), jnp.asarray(x), jnp.asarray(train_labels), jax.random.key(seed)
    )
    accuracy, loss = jax.device_get(
        jax.jit(_scores)(kernels, biases, jnp.asarray(held), jnp.asarray(validation_labels))
    )
    best = int(np.lexsort((loss, -accuracy))[0])
    rate, decay = (float(value) for value in list(itertools.product(config.learning_rates, config.weight_decays))[best])
    kernel, bias = np.asarray(kernels[best]), np.asarray(biases[best])
    return LinearProbe(mean, scale, kernel, bias, rate, decay, float(accuracy[best]))


def standardising(train: Float[np.ndarray, "rows dim"]) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, " dim"]]:
    """Mean and scale of features by the training rows."""
    scale = train.std(axis=0)
    return train.mean(axis=0), np.where(scale > 1e-6, scale, 1.0)  # one that never changes says nothing at any scale


def fit(
    setting: Float[Array, "2"],
    x: Float[Array, "rows dim"],
    labels: Int[Array, " rows"],
    key: Array,
    *,
    classes: int,
    steps: int,
    batch_size: int,
) -> tuple[Float[Array, "dim classes"], Float[Array, " classes"]]:
    """Kernel and bias of one classifier; ``setting`` is its learning rate and weight decay."""
    rows, dim = x.shape
    direction = optax.scale_by_adam(b2=0.99)

    def loss(params: tuple[Array, Array], x: Array, labels: Array) -> Array:
        kernel, bias = params
        return jnp.mean(softmax_cross_entropy(x @ kernel + bias, labels)) + setting[1] / 2 * jnp.sum(kernel**2)

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        params, state = carry
        batch = (x, labels)
        if batch_size < rows:
            chosen = jax.random.randint(jax.random.fold_in(key, number), (batch_size,), 0, rows)
            batch = (x[chosen], labels[chosen])
        updates, state = direction.update(jax.grad(loss)(params, *batch), state)
        rate = setting[0] * (1 + jnp.cos(math.pi * number / steps)) / 2
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), None

    params = (jnp.zeros((dim, classes)), jnp.zeros(classes))
    (params, _), _ = jax.lax.scan(step, (params, direction.init(params)), jnp.arange(steps))
    return params


def _scores(kernels: Array, biases: Array, x: Array, labels: Array) -> tuple[Array, Array]:
    def one(kernel: Array, bias: Array) -> tuple[Array, Array]:
        logits = x @ kernel + bias
        hits = jnp.argmax(logits, axis=-1) == labels
        return jnp.mean(hits.astype(jnp.float32)), jnp.mean(softmax_cross_entropy(logits, labels))

    return jax.vmap(one)(kernels, biases)

"""solo-learn's recipes for CIFAR-10, as they are but for their size: twenty steps at batch 16 lower the loss.

On average over some pairs of views: those of each step differ, and so do their losses by more than twenty steps change.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import CONFIGS, picture_rows

from sslx.entry import load_config
from sslx.session import run_config
from sslx.train.initialise import objective_class
from sslx.train.optimizer import make_optimizer
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_gradient, make_train_step

STEPS, PAIRS = 20, 64
# What the size of CIFAR-10 makes of them is built in test_configs.py.
SMALL = {"data.image_size": 8, "model.image_size": 8, "model.depth": 10, "model.width": 2, "batch_size": 16}
HEAD = {"hidden": 16, "out": 8}
FURTHER = {
    "simsiam": {"pretext.predictor.hidden": 4},
    "swav": {"pretext.prototypes": 16, "pretext.queue": 32, "pretext.queue_start": 4, "pretext.frozen_steps": 1},
    "dino": {"pretext.prototypes": 16, "pretext.frozen_steps": 1},
}


def trained(name):
    """Metrics of each step on one batch, at a tenth of the recipe's peak rate, as after a tenth of its warm-up; and the
    mean loss of some pairs of views before and after all of them."""
    config = load_config(CONFIGS / f"{name}.py", "cifar10")
    heads = [part for part in ("projector", "predictor") if part in config.pretext]
    changes = {f"pretext.{part}.{key}": value for part in heads for key, value in HEAD.items()}
    with config.unlocked():
        config.update_from_flattened_dict({**SMALL, **changes, **FURTHER.get(name, {})})
        config.online.probe = False
    written = config.to_dict()
    objective, _ = objective_class(written).abstract(written)
    batch = {"image": picture_rows(16)["image"], "row": np.arange(16)}
    init = lambda: objective.init(jax.random.key(0), batch)  # noqa: E731
    optimizer_config = run_config(written, "pretext").optimizer
    schedule = lambda step: jnp.float32(0.1 * optimizer_config.learning_rate)  # noqa: E731
    optimizer = make_optimizer(optimizer_config, schedule, jax.eval_shape(init)["params"])

    def run():
        variables = unbox(init())
        params = variables["params"]
        state = TrainState(jnp.int32(0), params, variables["state"], optimizer.init(params))
        step, gradient = make_train_step(objective, optimizer, schedule, seed=0), make_gradient(objective)
        trained, metrics = jax.lax.scan(lambda state, _: step(state, batch), state, length=STEPS)

        def loss(case):
            keys, after = case
            chosen = jax.tree.map(lambda *of: jnp.where(after, *of), trained.params, params)
            return gradient(chosen, variables["state"], batch, tuple(keys), jnp.int32(0))[0]

        keys = jax.random.split(jax.random.key(1), (PAIRS, 2))
        cases = jnp.concatenate([keys, keys]), jnp.arange(2 * PAIRS) >= PAIRS
        losses = jax.lax.map(loss, cases)  # one after the other, compiled once
        return metrics, losses[:PAIRS], losses[PAIRS:]

    return jax.device_get(jax.jit(run)())


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "dino"])
def test_twenty_steps_of_a_recipe_lower_its_loss(name):
    metrics, before, after = trained(name)
    assert np.isfinite(metrics["loss"]).all()
    assert np.isfinite(metrics["grad_norm"]).all()
    assert after.mean() < before.mean()

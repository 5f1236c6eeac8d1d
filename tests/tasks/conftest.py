"""What tests of tasks share: the gradients of one training step on any number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_pictures import pretrained

from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.step import TrainState, make_train_step


@pytest.fixture(scope="session")
def gradients_on():
    """``gradients_on(objective, batch, devices, seed=0)``: metrics and gradients of a step, on the host."""

    def recording() -> optax.GradientTransformation:
        """An optimizer that moves nothing and keeps the gradients as its state."""

        def update(updates, state, params=None):
            return jax.tree.map(jnp.zeros_like, updates), updates

        return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)

    def run(objective, batch, devices, seed=0):
        variables = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), batch))())
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        with sharding.on_mesh(mesh):
            shardings, _ = sharding.parameter_shardings(variables, mesh, tolerance=0.0)
            placed = jax.device_put(sharding.unbox(variables), shardings)
            optimizer = recording()
            step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(0.1), seed=seed))
            state = TrainState(jnp.int32(3), placed["params"], placed["state"], optimizer.init(placed["params"]))
            after, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            return jax.device_get(metrics), jax.device_get(after.opt_state)

    return run


@pytest.fixture(scope="session")
def pretrained_on_pictures(tmp_path_factory):
    """The folder of a masked autoencoder of two steps on pictures of 16 x 16 pixels."""
    return pretrained(tmp_path_factory.mktemp("pretrained_on_pictures"))


@pytest.fixture(scope="session")
def assert_close():
    """Every array agrees to a share of its largest value, and some are not zero."""

    def check(expected, found, share=5e-5):
        largest = 0.0
        for path, value in jax.tree_util.tree_leaves_with_path(expected):
            other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
            error = np.max(np.abs(value - other)) if np.size(value) else 0.0
            largest = max(largest, float(np.max(np.abs(value))))
            assert error <= share * np.max(np.abs(value)) + 1e-7, f"{jax.tree_util.keystr(path)}: {error}"
        assert largest > 0

    return check

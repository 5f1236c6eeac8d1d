"""One training step of an objective on some mesh, whose gradients and metrics can be compared with another's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.step import TrainState, make_train_step

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}


def recording() -> optax.GradientTransformation:
    """An optimizer that moves nothing and keeps the gradients as its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def prepared(objective, variables, batch, mesh, micro_batches=1):
    """The jitted step, a state at step 3 and the batch, placed on the mesh; enter ``on_mesh`` before."""
    shardings, _ = sharding.parameter_shardings(variables, mesh, tolerance=0.0)
    variables = jax.device_put(sharding.unbox(variables), shardings)
    optimizer = recording()
    step = make_train_step(objective, optimizer, optax.constant_schedule(0.1), seed=7, micro_batches=micro_batches)
    state = TrainState(jnp.int32(3), variables["params"], variables["state"], optimizer.init(variables["params"]))
    return jax.jit(step), state, jax.device_put(batch, sharding.batch_sharding(mesh))


def one_step(objective, variables, batch, mesh_config=None, devices=1, micro_batches=1):
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
    with sharding.on_mesh(mesh):
        step, state, placed = prepared(objective, variables, batch, mesh, micro_batches)
        after, metrics = step(state, placed)
        return jax.device_get(after), jax.device_get(metrics)


def assert_close(expected, found, share=2e-5):
    """Every array agrees to ``share`` of its largest value.

    The gradient of a key's bias, which softmax ignores, is 0 but for rounding.
    """
    others = dict(jax.tree_util.tree_leaves_with_path(found))
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path)
        error, largest = (np.max(np.abs(of)) if np.size(of) else 0.0 for of in (value - others[path], value))
        rounding = 1e-6 if name.endswith("['key']['bias']") else 1e-7
        assert error <= share * largest + rounding, f"{name}: {error} of {largest}"

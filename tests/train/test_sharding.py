"""Meshes over devices in groups, and what becomes of dimensions that a mesh does not divide."""

from __future__ import annotations

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.planning.topology import tpu
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.session import run_config
from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.program import Program
from sslx.train.step import finish_means


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"data=3 x fsdp=1 x sequence=1 x tensor=1, 3 devices; there are 8"),
        (MeshConfig(data=-1, tensor=3), "8 devices do not divide by 3"),
        (MeshConfig(fsdp=-1), "at most one -1; config.mesh.data is -1 unless given: --config.mesh.data=1"),
        (MeshConfig(data=1, fsdp=-1, tensor=-1), "at most one -1$"),
        (MeshConfig(data=0), "expected positive sizes"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(config)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8)], ids=["data", "fsdp"])
def test_only_the_outermost_axis_leaves_a_slice(config):
    mesh = sharding.make_mesh(config, tpu("v5e-4", slices=2).devices)
    outer = next(axis for axis, size in mesh.shape.items() if size > 1)
    place = mesh.axis_names.index(outer)
    slices = [{device.slice_index for device in row.flat} for row in np.moveaxis(mesh.devices, place, 0)]
    assert all(len(found) == 1 for found in slices)  # along every other axis, a slice keeps to itself
    counted = collections.Counter(found.pop() for found in slices)
    assert sorted(counted) == [0, 1]
    assert counted[0] == counted[1]


def test_a_tensor_axis_does_not_leave_a_slice():
    with pytest.raises(UserError, match=r"over 2 slices or nodes; expected data x fsdp to divide by 2"):
        sharding.make_mesh(MeshConfig(data=1, tensor=8), tpu("v5e-4", slices=2).devices)


@pytest.mark.parametrize("name", ["v5e-256", "v5p-128", "v6e-256"])
def test_every_split_of_a_slice_can_be_laid_out(name):
    devices = tpu(name).devices
    for tensor in (1, 2, 4, 8, 16):
        for power in range((len(devices) // tensor).bit_length()):
            mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2**power, tensor=tensor), devices)
            assert mesh.size == len(set(mesh.devices.flat)) == len(devices)


class Uneven(nn.Module):
    """A small parameter that no mesh divides, and a large one that is even."""

    width: int

    @nn.compact
    def __call__(self, x):
        for name, shape in (("odd", (3, 4)), ("large", (self.width, 64))):
            self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, ("embed", None)), shape)
        return x


def shardings_of(width):
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    with sharding.on_mesh(mesh):
        boxed = jax.eval_shape(Uneven(width).init, jax.random.key(0), jnp.zeros(1))
        return sharding.parameter_shardings(boxed, mesh, tolerance=0.05)


def test_a_dimension_that_does_not_divide_is_told():
    placed, notes = shardings_of(64)
    assert notes == ["params/odd: embed=3 is not split 2 ways over fsdp"]
    assert placed["params"]["odd"].is_fully_replicated
    assert not placed["params"]["large"].is_fully_replicated


def test_more_whole_parameters_than_the_tolerance_are_refused():
    with pytest.raises(UserError, match=r"config.mesh.fsdp=2 would leave 100% of the parameters whole on each device"):
        shardings_of(63)


def test_activations_that_do_not_divide_are_told_also_inside_loops():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))

    def layers(x):
        def layer(x, _):
            return nn.with_logical_constraint(x, ("act_batch", None, "act_heads")), None

        return jax.lax.scan(layer, x, None, length=2)[0]

    with sharding.on_mesh(mesh):
        uneven, even = (jax.jit(layers).trace(jnp.zeros((4, 8, heads))).jaxpr for heads in (6, 8))
    assert sharding.undivided(even, mesh) == []
    message = "6 is not split evenly 4 ways over tensor (activations (4, 8, 6))"
    assert sharding.undivided(uneven, mesh) == [message]
    assert sharding.undivided(uneven, mesh, {6: "config.model.heads"}) == [f"config.model.heads={message}"]


def test_heads_that_do_not_divide_are_told_once_and_by_name(tiny_config):
    written = tiny_config("bert_mlm", {"mesh.tensor": 4, "model.heads": 2, "mesh.data": 2}).to_dict()
    config = run_config(written, "pretext")
    program = Program(config, *MaskedLanguageModel.abstract(written), sharding.make_mesh(config.mesh))
    program.lower_train()
    (line,) = program.undivided  # of all positions and of those that are predicted
    assert line.startswith("config.model.heads=2 is not split evenly 4 ways over tensor (activations (")


def test_hundreds_of_evaluation_steps_need_not_be_read_one_by_one(tiny_config):
    # Simulated devices share threads: this many collectives at once held each other up for ever.
    written = tiny_config("bert_mlm", {"mesh.tensor": 2, "mesh.data": 4, "model.layers": 1, "batch_size": 8}).to_dict()
    config = run_config(written, "pretext")
    program = Program(config, *MaskedLanguageModel.abstract(written), sharding.make_mesh(config.mesh))
    with sharding.on_mesh(program.mesh):
        state = program.fresh()
        batch = {
            name: jax.device_put(np.ones(shape, program.abstract_batch[name].dtype), program.batch_sharding)
            for name, shape in program.batch_shapes.items()
        }
        batch["valid"] = jax.device_put(np.ones(config.batch_size, np.float32), program.batch_sharding)
        for _ in range(300):
            means = program.eval_step(state.params, state.state, batch)
        assert np.isfinite(finish_means(jax.device_get(means))["loss"])

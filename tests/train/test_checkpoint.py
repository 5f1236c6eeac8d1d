"""Checkpoints on disk: what is kept, and what happens to those that cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sslx.errors import UserError
from sslx.settings import CheckpointConfig
from sslx.train.checkpoint import Checkpoints, read_variables, saved_steps
from sslx.train.step import TrainState


def state_at(step: int) -> TrainState:
    params = {"a": {"kernel": jnp.arange(3000.0).reshape(30, -1) + step}, "b": jnp.ones(3)}
    return TrainState(jnp.int32(step), params, {}, optax.adam(1e-3).init(params))


def abstract() -> TrainState:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state_at(0))


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=1))
    for step, loss in [(1, None), (2, 1.0), (3, 2.0), (4, None), (5, None)]:
        checkpoints.save(state_at(step), step, {"note": step}, None if loss is None else {"eval/loss": loss})
    checkpoints.close()
    return tmp_path


def spoil(run, step):
    largest = max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" * 100)


def test_the_last_ones_and_the_best_are_kept_over_restarts(saved):
    assert saved_steps(saved / "checkpoints") == [2, 4, 5]
    again = Checkpoints(saved, CheckpointConfig(keep=2, keep_best=1))
    assert again.best_step() == 2
    again.save(state_at(6), 6, {}, {"eval/loss": 3.0})
    again.close()
    assert saved_steps(saved / "checkpoints") == [2, 5, 6]


def test_a_state_comes_back_bit_for_bit_with_its_progress(saved):
    state, progress = Checkpoints(saved, CheckpointConfig()).restore(abstract())
    assert progress == {"note": 5}
    jax.tree.map(np.testing.assert_array_equal, state, state_at(5))
    assert read_variables(saved, 4)["params"]["a"]["kernel"][0, 0] == 4.0


def test_small_arrays_on_eight_devices_are_written_without_a_program_for_each_slice(tmp_path, caplog):
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec())
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig()), jax.device_put(state_at(1), everywhere)
    with jax.log_compiles():
        checkpoints.save(state, 1, {}, None)
    checkpoints.close()
    compiled = [line for line in caplog.messages if line.startswith("Compiling ")]
    assert len(compiled) == 1, compiled  # the digest
    state, _ = Checkpoints(tmp_path, CheckpointConfig()).restore(abstract())
    jax.tree.map(np.testing.assert_array_equal, state, state_at(1))


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(saved):
    spoil(saved, 5)
    said = []
    state, _ = Checkpoints(saved, CheckpointConfig()).restore(abstract(), say=said.append)
    assert int(state.step) == 4
    assert "checkpoint 5 cannot be read" in said[0]
    assert (saved / "checkpoints" / "5.damaged").is_dir()


def test_where_none_can_be_read_nothing_is_renamed(saved):
    # Too little memory or a changed model looks the same; the next start must not take the run for a new one.
    for step in (2, 4, 5):
        spoil(saved, step)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: 5 .* 4 .* 2 "):
        Checkpoints(saved, CheckpointConfig()).restore(abstract(), say=lambda _: None)
    assert saved_steps(saved / "checkpoints") == [2, 4, 5]

"""I-JEPA: which patches are seen and asked for, the loss against NumPy, the teacher, and any mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows

from sslx.errors import UserError
from sslx.models.teacher import MomentumConfig
from sslx.pretext.ijepa import IJepa, IJepaConfig, blocks
from sslx.train.sharding import unbox

MODEL = dataclasses.replace(TINY_VIT, class_token=False)
CONFIG = IJepaConfig(
    targets=2, target_area=0.2, predictor_layers=1, predictor_width=8, predictor_heads=2, momentum=MomentumConfig(0.5)
)
OBJECTIVE = IJepa(CONFIG, MODEL, False, 10)


def test_targets_are_blocks_and_the_context_is_what_they_leave():
    grid, config = 14, IJepaConfig()
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(64))
    context, targets = jax.device_get(jax.jit(blocks, static_argnums=(1, 2))(keys, grid, config))
    longer, shorter = config.block(grid)
    assert 0.15 * grid**2 <= longer * shorter <= 0.2 * grid**2
    assert targets.shape == (64, 4, longer * shorter)
    assert context.shape == (64, config.context(grid))
    ways = set()
    for row in range(64):
        assert not set(context[row]) & set(targets[row].reshape(-1))
        assert len(set(context[row])) == config.context(grid)
        for block in targets[row]:
            rows, columns = np.divmod(block, grid)
            high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert high * wide == len(set(block)) == longer * shorter
            assert block.min() >= 0
            assert block.max() < grid**2
            ways.add((high, wide))
    assert ways == {(longer, shorter), (shorter, longer)}


def test_the_loss_is_smooth_l1_to_the_teachers_normalised_features():
    batch, compiled = picture_rows(8), Compiled(OBJECTIVE)
    variables = unbox(jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), batch))()))
    params, state = variables["params"], variables["state"]
    viewed = compiled.views(batch, True)
    out = compiled.loss(params, state, viewed, True)

    def seen():
        return (
            OBJECTIVE.module.apply({"params": params}, viewed, deterministic=True),
            MODEL.encoder().apply({"params": state["teacher"]}, viewed, deterministic=True),
        )

    predicted, states = map(np.float64, jax.jit(seen)())
    normal = (states - states.mean(-1, keepdims=True)) / np.sqrt(states.var(-1, keepdims=True) + 1e-5)
    where = np.asarray(viewed["targets"])
    target = normal[np.arange(8)[:, None, None], where]
    size = np.abs(predicted - target)
    each = np.where(size < 1, 0.5 * size**2, size - 0.5).mean(-1)
    assert out.terms["prediction"].sum == pytest.approx(each.sum(), rel=1e-4)
    assert viewed["weights"]["prediction"].shape == each.shape


def test_one_device_and_eight_agree_and_the_teacher_follows():
    batch = picture_rows(8)
    variables = jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(5), batch))())
    (one, metrics), (eight, others) = (one_step(OBJECTIVE, variables, batch, devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state, share=1e-4)
    assert_close(metrics, others, share=1e-4)
    assert_close(one.state, eight.state, share=1e-4)
    assert np.abs(one.opt_state["encoder"]["patches"]["kernel"]).max() > 0
    assert OBJECTIVE.scope == "row"


def test_targets_that_may_leave_no_context_are_refused():
    with pytest.raises(UserError, match=r"targets is 6, of 2 x 2 patches of 4 x 4: they may leave no context"):
        IJepa.check(dataclasses.replace(CONFIG, targets=6), MODEL, {})
    with pytest.raises(UserError, match="class_token is True"):
        IJepa.check(CONFIG, TINY_VIT, {})

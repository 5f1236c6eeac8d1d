"""iBOT's own parts: which patches are hidden, KoLeo, and that a student does not see what is hidden."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import TINY_VIT, Compiled, picture_rows

from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.models.heads import HeadConfig
from sslx.pretext.ibot import Ibot, IbotConfig, hidden_blocks, koleo
from sslx.pretext.picture_views import MultiCrop, PictureViews
from sslx.train.sharding import unbox

PLAIN = AugmentConfig(crop_area=(0.3, 1.0))
HEAD = HeadConfig(layers=2, hidden=16, out=8, norm=False)
CONFIG = IbotConfig(prototypes=16, projector=HEAD, views=MultiCrop(PLAIN, PLAIN, PLAIN, local_count=0))
OBJECTIVE = Ibot(CONFIG, PictureViews(TINY_VIT, CONFIG.views), 8, 10)


def test_half_the_rows_have_a_block_of_a_tenth_to_a_half_of_their_patches_hidden():
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(400))
    which, weights = jax.device_get(jax.jit(hidden_blocks, static_argnums=(1, 2))(keys, 10, CONFIG))
    assert which.shape == weights.shape == (400, 50)
    counts = (which < 100).sum(1)
    assert 160 < (counts > 0).sum() < 240
    assert set(counts[counts > 0]) <= set(range(10, 51))
    assert np.ptp(counts[counts > 0]) > 30
    np.testing.assert_allclose(weights.sum(1), counts > 0, atol=1e-5)
    assert ((weights > 0) == (which < 100)).all()
    for row in np.flatnonzero(counts)[:50]:
        hidden = which[row][: counts[row]]
        assert len(set(hidden)) == counts[row]
        # A block: its patches fill most of the rectangle around them.
        rows, columns = np.divmod(hidden, 10)
        assert counts[row] >= 0.5 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_koleo_is_minus_the_mean_logarithm_of_distances_to_the_nearest():
    x = np.random.default_rng(0).normal(size=(6, 4))
    weights = np.array([1, 1, 0, 1, 1, 1], np.float32)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True))[weights > 0]
    apart = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 9 * np.eye(5)
    found = jax.jit(koleo)(jnp.float32(x), weights)
    np.testing.assert_allclose(found, -np.log(apart.min(1)).mean(), rtol=1e-4)
    # Rows that are the same: nothing that is not finite.
    value, gradient = jax.jit(jax.value_and_grad(koleo))(jnp.ones((4, 3)), np.ones(4, np.float32))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_hidden_patches_do_not_reach_the_student_and_do_reach_the_teacher():
    batch = picture_rows(8)
    viewed = jax.device_get(Compiled(OBJECTIVE).views(batch, True))
    variables = unbox(jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), batch))()))
    view = viewed["views"][0]
    assert (view["hidden"] < 16).any()
    other = dict(view, image=view["image"].copy())
    for row, hidden in enumerate(view["hidden"]):
        for patch in hidden[hidden < 16]:
            top, left = (2 * int(place) for place in np.divmod(patch, 4))
            other["image"][row, top : top + 2, left : left + 2] = 0.3
    student = jax.jit(lambda view: OBJECTIVE.network.apply({"params": variables["params"]}, [view], deterministic=True))
    teacher = {"params": variables["state"]["teacher"]["params"]}
    taught = jax.jit(lambda view: OBJECTIVE.teacher_network.apply(teacher, [view], deterministic=True))
    np.testing.assert_allclose(student(view)[0].patches, student(other)[0].patches, atol=1e-6)
    assert np.abs(taught(view)[0].patches - taught(other)[0].patches).max() > 1e-4


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"koleo needs rows that are each other's nearest"):
        Ibot.check(dataclasses.replace(CONFIG, koleo=0.1), TINY_VIT, {"batch_size": 1})
    with pytest.raises(UserError, match=r"projector\.norm is True: crops and patches"):
        Ibot.check(dataclasses.replace(CONFIG, projector=HeadConfig()), TINY_VIT, {"batch_size": 8})
    with pytest.raises(UserError, match="mask_ratio is"):
        IbotConfig(projector=HEAD, mask_ratio=(0.5, 0.1))

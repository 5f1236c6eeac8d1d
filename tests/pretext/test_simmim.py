"""SimMIM: whole squares are hidden, nothing of them is seen, and the loss is their mean absolute error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx.errors import UserError
from sslx.pretext.simmim import SimMim, SimMimConfig, SimMimModel, patches_of_squares
from sslx.train.sharding import unbox

OBJECTIVE = SimMim(SimMimConfig(mask_ratio=0.6, mask_size=4), TINY_VIT, False)  # 2 x 2 squares of 2 x 2 patches
COMPILED = Compiled(OBJECTIVE)


@pytest.fixture(scope="module")
def viewed():
    return COMPILED.views(picture_rows(8), True)


@pytest.fixture(scope="module")
def params():
    return unbox(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), picture_rows(2)))())["params"]


@pytest.fixture(scope="module")
def predicted():
    return jax.jit(lambda params, batch: OBJECTIVE.module.apply({"params": params}, batch, deterministic=True))


def normalised(images):
    return (np.float64(images) - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]


def cut(images, patch):
    """One patch of 2 by 2 pixels of an image that has 4 by 4 of them."""
    top, left = 2 * (patch // 4), 2 * (patch % 4)
    return images[top : top + 2, left : left + 2]


def test_hidden_patches_are_whole_squares_and_as_many_as_the_ratio_rounded_up(viewed):
    squares = {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}, 2: {8, 9, 12, 13}, 3: {10, 11, 14, 15}}
    drawn = set()
    for row in np.asarray(viewed["hidden"]):
        whole = [number for number, patches in squares.items() if patches <= set(row.tolist())]
        assert len(row) == len(set(row.tolist())) == 12  # 60 % of 4 squares are 2.4
        assert len(whole) == 3
        drawn.add(tuple(whole))
    assert len(drawn) > 1
    assert patches_of_squares(jnp.array([[1]]), 3, 2).tolist() == [[2, 3, 8, 9]]


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels(params, viewed, predicted):
    out = COMPILED.loss(params, {}, viewed, True)
    painted = np.float64(predicted(params, viewed))
    images, total = normalised(viewed["image"]), 0.0
    for row in range(8):
        for place, patch in enumerate(np.asarray(viewed["hidden"])[row]):
            total += np.abs(painted[row, place] - cut(images[row], patch).ravel()).mean()
    assert out.terms["reconstruction"].sum == pytest.approx(total, rel=1e-5)
    assert viewed["weights"]["reconstruction"].shape == (8, 12)


def test_the_encoder_sees_a_token_in_each_hidden_place(params, viewed, predicted):
    image = np.asarray(viewed["image"]).copy()
    for row in range(8):
        for patch in np.asarray(viewed["hidden"])[row]:
            cut(image[row], patch)[:] = 0.77
    before = np.asarray(predicted(params, viewed))
    np.testing.assert_array_equal(predicted(params, viewed | {"image": image}), before)
    moved = params | {"mask_token": params["mask_token"] + jnp.arange(16.0)}
    assert np.abs(predicted(moved, viewed) - before).max() > 1e-3
    visible = np.asarray(viewed["image"]).copy()
    for row in range(8):
        seen = np.setdiff1d(np.arange(16), np.asarray(viewed["hidden"])[row])
        cut(visible[row], seen[0])[:] = 0.77
    assert (np.abs(predicted(params, viewed | {"image": visible}) - before).max(axis=(1, 2)) > 0).all()


def test_views_losses_and_gradients_are_the_same_on_eight_devices():
    variables = jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(5), picture_rows(2)))())
    (one, metrics), (eight, others) = (one_step(OBJECTIVE, variables, picture_rows(8), devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state)
    assert_close(metrics, others)
    assert np.abs(one.opt_state["mask_token"]).max() > 0


def test_chance_is_the_loss_of_the_median():
    objective, data = SimMim.prepare(tiny_images("vit_simmim", pretext__mask_size=4).to_dict())
    pixels = np.float64(data.eval.fetch(np.arange(len(data.eval)))["image"]) / 255 * 2 - 1
    expected = np.abs(pixels - np.median(pixels)).mean()
    assert objective.chance(data.statistics) == pytest.approx(expected, rel=1e-5)


def test_pictures_show_what_was_painted(viewed, monkeypatch):
    def perfect(self, batch, *, deterministic):
        images = normalised(batch["image"])
        rows = [[cut(images[row], patch).ravel() for patch in batch["hidden"][row]] for row in range(8)]
        return jnp.array(rows, jnp.float32)

    monkeypatch.setattr(SimMimModel, "__call__", perfect)
    shown = OBJECTIVE.predict({}, {}, {"image": viewed["image"], "hidden": np.asarray(viewed["hidden"])})
    np.testing.assert_allclose(shown["reconstruction"], viewed["image"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pretext__mask_size=3), "mask_size is 3; expected a multiple of config.model.patch_size 2"),
        (dict(pretext__mask_size=4, pretext__mask_ratio=0.9), r"mask_ratio is 0\.9 of 4 squares"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SimMim.abstract(tiny_images("vit_simmim", **changes).to_dict())

"""data2vec 2: masks of an exact count, targets and losses against NumPy, the teacher, any mesh."""

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
from sslx.pretext.data2vec import Data2vec, Data2vecConfig, seen_squares
from sslx.train.sharding import unbox

MODEL = dataclasses.replace(TINY_VIT, layers=2)
CONFIG = Data2vecConfig(
    masks=3,
    mask_ratio=0.75,
    square=2,
    top_layers=2,
    class_weight=0.5,
    decoder_layers=2,
    decoder_width=8,
    decoder_groups=2,
    noise=0.5,
    momentum=MomentumConfig(0.5),
)
OBJECTIVE = Data2vec(CONFIG, MODEL, False, 10)


def test_what_is_seen_is_an_exact_count_in_squares():
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(64))
    seen, hidden = jax.device_get(jax.jit(seen_squares, static_argnums=(1, 2, 3))(keys, 14, 39, 3))
    np.testing.assert_array_equal(np.sort(np.concatenate([seen, hidden], axis=1)), np.tile(np.arange(196), (64, 1)))
    assert seen.shape == (64, 39)
    assert len({tuple(row) for row in seen}) > 60
    # Of patches that are seen, most have a neighbour to the right that is: of single ones a fifth would.
    rows, columns = np.divmod(seen, 14)
    grids = np.zeros((64, 14, 14), bool)
    grids[np.arange(64)[:, None], rows, columns] = True
    beside = (grids[:, :, 1:] & grids[:, :, :-1]).sum() / grids[:, :, :-1].sum()
    assert 0.6 < beside < 0.85


def test_targets_and_losses_are_those_of_numpy():
    batch, compiled = picture_rows(8), Compiled(OBJECTIVE)
    variables = unbox(jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), batch))()))
    params, state = variables["params"], variables["state"]
    state["teacher"] = jax.tree.map(lambda array: 1.5 * array + 0.01, state["teacher"])
    viewed = compiled.views(batch, True)
    assert viewed["visible"].shape == (8, 3, 4)
    assert viewed["noise"].std() == pytest.approx(0.5, rel=0.05)
    out = compiled.loss(params, state, viewed, True)

    def seen():
        keep = lambda y: y[:, MODEL.front :]  # noqa: E731
        layers = MODEL.encoder().apply({"params": state["teacher"]}, viewed, keep, method="each_layer")
        return layers, OBJECTIVE.module.apply({"params": params}, viewed, deterministic=True)

    layers, (predicted, told) = jax.tree.map(np.float64, jax.jit(seen)())
    normal = lambda x, axis: (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)  # noqa: E731
    whole = normal(np.mean([normal(layer, 1) for layer in layers], axis=0), 2)
    hidden = np.asarray(viewed["hidden"])
    square = [
        ((predicted[3 * row + mask] - whole[row, hidden[row, mask]]) ** 2).mean(-1)
        for row in range(8)
        for mask in range(3)
    ]
    assert out.terms["regression"].sum == pytest.approx(np.sum(square), rel=1e-4)
    of_class = ((told - np.repeat(whole.mean(1), 3, axis=0)) ** 2).mean(-1).sum()
    assert out.terms["class"].sum == pytest.approx(of_class, rel=1e-4)
    assert viewed["weights"]["regression"].shape == (8, 3, 12)
    # Only what is seen reaches a prediction, and the noise that stands for the rest.
    black = dict(viewed) | {"image": np.array(viewed["image"])}
    first = np.asarray(viewed["hidden"])[0, 0, 0]
    row, column = 2 * (first // 4), 2 * (first % 4)
    black["image"][0, row : row + 2, column : column + 2] = 0.0
    again = OBJECTIVE.module.apply({"params": params}, black, deterministic=True)[0]
    np.testing.assert_allclose(again[0], predicted[0], atol=1e-5)


def test_one_device_and_eight_agree_and_the_teacher_follows():
    batch = picture_rows(8)
    variables = jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(5), batch))())
    (one, metrics), (eight, others) = (one_step(OBJECTIVE, variables, batch, devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state, share=1e-4)
    assert_close(metrics, others, share=1e-4)
    assert_close(one.state, eight.state, share=1e-4)
    assert np.abs(one.opt_state["encoder"]["patches"]["kernel"]).max() > 0
    assert {"target_variance", "prediction_variance", "error"} <= set(metrics)
    assert OBJECTIVE.scope == "row"
    assert OBJECTIVE.encoder(one.params, one.state)["params"] is one.params["encoder"]


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        (dict(top_layers=3), MODEL, r"top_layers 3 is more than config\.model\.layers 2"),
        (dict(mask_ratio=0.99), MODEL, "mask_ratio"),
        (dict(decoder_groups=8), dataclasses.replace(MODEL, width=20), r"width 20 does not divide into"),
    ],
)
def test_what_cannot_be_is_refused(changes, model, message):
    with pytest.raises(UserError, match=message):
        Data2vec.check(dataclasses.replace(CONFIG, **changes), model, {})

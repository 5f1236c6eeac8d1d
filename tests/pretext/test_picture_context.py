"""Rotation, relative patch and jigsaw: what is asked, laid by hand, and that the answers are right."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx.augment.policy import NONE
from sslx.errors import UserError
from sslx.models.resnet import ResnetConfig
from sslx.pretext import jigsaw, relative_patch
from sslx.pretext.jigsaw import Jigsaw, JigsawConfig
from sslx.pretext.relative_patch import RelativePatch, RelativePatchConfig
from sslx.pretext.rotation import Rotation, RotationConfig
from sslx.train.sharding import unbox
from sslx.train.step import make_train_step

KEY = jax.random.key(1)
NINE = dataclasses.replace(TINY_VIT, image_size=12, patch_size=6)
RESNET = ResnetConfig(depth=10, width=2, stem="cifar", image_size=8)

ROTATION = Rotation(RotationConfig(), TINY_VIT, False)
RELATIVE = RelativePatch(RelativePatchConfig(head_width=8), NINE, False)
JIGSAW = Jigsaw(JigsawConfig(permutations=20, head_width=8), NINE, False)
ALL = pytest.mark.parametrize("objective", [ROTATION, RELATIVE, JIGSAW], ids=["rotation", "relative", "jigsaw"])


def nine_shades(rows=40, size=12):
    """Pictures whose ninths have one value each: 0.05, 0.15 and so on, in reading order."""
    cell = np.repeat(np.arange(3), size // 3)
    image = 0.05 + 0.1 * (3 * cell[:, None] + cell[None, :])
    return np.broadcast_to(image[None, :, :, None], (rows, size, size, 3)).astype(np.float32)


def keys(rows):
    return jax.vmap(lambda row: jax.random.fold_in(KEY, row))(jnp.arange(rows))


def rows_of(objective, rows=8):
    return picture_rows(rows, objective.model.image_size)


def test_a_picture_is_shown_in_all_four_turns_with_their_numbers():
    batch = picture_rows(3)
    objective = dataclasses.replace(ROTATION, pretext=RotationConfig(augment=NONE))
    viewed = Compiled(objective).views(batch, True)
    assert viewed["pieces"].shape == (3, 4, 8, 8, 3)
    for row in range(3):
        for turn in range(4):
            expected = np.rot90(batch["image"][row] / 255.0, turn)  # against the clock
            np.testing.assert_allclose(viewed["pieces"][row, turn], expected, atol=1e-6)
    assert viewed["answer"].tolist() == [[0, 1, 2, 3]] * 3
    # The first row of a picture that has been turned once is its last column.
    np.testing.assert_allclose(viewed["pieces"][0, 1, 0], batch["image"][0, :, -1] / 255.0, atol=1e-6)


def test_the_neighbour_lies_where_the_answer_says(monkeypatch):
    monkeypatch.setattr(relative_patch, "standardised", lambda pieces: pieces)
    pieces, answer = jax.jit(RELATIVE.pieces)(nine_shades(200), keys(200))
    assert pieces.shape == (200, 2, 12, 12, 3)
    shades = np.asarray(pieces).mean(axis=(2, 3, 4))
    around = [0, 1, 2, 3, 5, 6, 7, 8]  # of nine in reading order, without the middle
    where = np.array([around[place] for place in np.asarray(answer)[:, 0]])
    np.testing.assert_allclose(shades[:, 0], 0.45, atol=0.045)
    np.testing.assert_allclose(shades[:, 1], 0.05 + 0.1 * where, atol=0.045)
    counts = np.bincount(np.asarray(answer)[:, 0], minlength=8)
    assert (np.abs(counts - 25) < 4 * (200 * 7 / 64) ** 0.5).all()


def test_permutations_are_distinct_and_far_apart():
    table = jigsaw.permutations(64)
    assert table.shape == (64, 9)
    assert (np.sort(table, axis=1) == np.arange(9)).all()
    distances = (table[:, None] != table[None]).sum(-1)
    apart = distances[~np.eye(64, dtype=bool)]
    # Random ones differ in 8 of 9 places on average, and the nearest two of 64 in 3 or 4.
    assert apart.min() >= 6
    assert apart.mean() > 8
    np.testing.assert_array_equal(jigsaw.permutations(20), table[:20])


def test_the_answer_names_the_order_in_which_pieces_were_laid(monkeypatch):
    monkeypatch.setattr(jigsaw, "standardised", lambda pieces: pieces)
    laid, answer = jax.jit(JIGSAW.pieces)(nine_shades(), keys(40))
    assert laid.shape == (40, 9, 12, 12, 3)
    table = jigsaw.permutations(20)
    for row in range(40):
        shades = np.asarray(laid)[row].mean(axis=(1, 2, 3))
        back = np.argsort(table[int(answer[row, 0])])
        np.testing.assert_allclose(shades[back], 0.05 + 0.1 * np.arange(9), atol=0.045)
    assert len(set(np.asarray(answer)[:, 0].tolist())) > 10


@pytest.mark.parametrize("objective", [RELATIVE, JIGSAW], ids=["relative", "jigsaw"])
def test_pieces_tell_nothing_by_their_brightness_or_contrast(objective):
    # In each ninth a chequered ground of another mean and another deviation, from 0.03 to 0.2, in each channel.
    rng, cell = np.random.default_rng(0), np.repeat(np.arange(3), 4)
    mean, spread = (rng.uniform(*bounds, (40, 3, 3, 3))[:, cell][:, :, cell] for bounds in ((0.3, 0.7), (0.03, 0.2)))
    noise = np.where((np.indices(mean.shape)[1:3] // 2).sum(axis=0) % 2, -1.0, 1.0)  # fields of 2 x 2 pixels
    images = (mean + spread * noise).astype(np.float32)
    pieces = np.asarray(jax.jit(objective.pieces)(images, keys(40))[0])
    np.testing.assert_allclose(pieces.mean(axis=(2, 3)), 0.5, atol=1e-4)
    np.testing.assert_allclose(pieces.std(axis=(2, 3)), 0.25, atol=1e-3)
    # Blank paper with a grain that no one sees stays so.
    grain = 0.5 + 0.002 * noise[..., :3].astype(np.float32)
    assert np.asarray(jax.jit(objective.pieces)(grain, keys(40))[0]).std(axis=(2, 3)).max() < 0.03


@ALL
def test_the_loss_is_the_cross_entropy_of_the_answers(objective):
    compiled = Compiled(objective)
    viewed = compiled.views(rows_of(objective), True)
    assert "image" not in viewed
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), rows_of(objective)))())["params"]
    params = jax.tree.map(lambda array: array * 4.0, params)
    out = compiled.loss(params, {}, viewed, True)
    apply = jax.jit(lambda p, b: objective.module.apply({"params": p}, b, deterministic=True))
    logits = np.float64(apply(params, viewed))
    answer = np.asarray(viewed["answer"])
    assert logits.shape[:2] == answer.shape
    likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.take_along_axis(likelihood, answer[..., None], -1)
    name = objective.pretext.name
    assert out.terms[name].sum == pytest.approx(-right.sum(), rel=1e-5)
    assert viewed["weights"][name].sum() == answer.size
    assert out.metrics["accuracy"].sum == (logits.argmax(-1) == answer).sum()
    assert objective.chance({}) == pytest.approx(math.log({"rotation": 4, "relative_patch": 8, "jigsaw": 20}[name]))


@ALL
def test_views_losses_and_gradients_are_the_same_on_eight_devices(objective):
    batch = rows_of(objective)
    variables = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), batch))())
    (one, metrics), (eight, others) = (one_step(objective, variables, batch, devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state)
    assert_close(metrics, others)
    assert np.abs(one.opt_state["encoder"]["patches"]["kernel"]).max() > 0


def test_with_batch_norm_running_averages_move_and_serve_evaluation():
    objective = dataclasses.replace(ROTATION, model=RESNET)
    batch = picture_rows(8)
    variables = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), batch))())
    one, _ = one_step(objective, variables, batch, devices=8)
    before = unbox(variables["state"])["batch_stats"]["encoder"]
    moved = jax.tree.map(lambda old, new: np.abs(old - new).max(), before, one.state["batch_stats"]["encoder"])
    assert min(jax.tree.leaves(moved)) > 0
    encoder = objective.encoder(one.params, one.state)
    assert encoder["batch_stats"] is one.state["batch_stats"]["encoder"]
    encode = Compiled(objective).encode
    together = encode(encoder, {"image": batch["image"]})  # a row's features do not depend on the others
    np.testing.assert_allclose(encode(encoder, {"image": batch["image"][:2]}), together[:2], atol=1e-5)
    fresh = encode(objective.encoder(one.params, unbox(variables["state"])), {"image": batch["image"]})
    assert np.abs(fresh - together).max() > 1e-4


def test_batch_norm_and_micro_batches_exclude_each_other():
    objective = dataclasses.replace(ROTATION, model=RESNET)
    assert (objective.scope, ROTATION.scope) == ("batch", "row")
    with pytest.raises(UserError, match="micro_batches is 2; Rotation compares all rows of a batch"):
        make_train_step(objective, None, None, seed=0, micro_batches=2)
    make_train_step(ROTATION, None, None, seed=0, micro_batches=2)


def test_gaps_are_those_of_the_papers():
    # Pieces lie anywhere in their ninths, so that on average what they leave free is between them.
    gap = lambda config: (1 - config.piece_share) / config.piece_share  # noqa: E731
    assert gap(RelativePatchConfig()) == pytest.approx(48 / 96, abs=0.01)
    assert gap(JigsawConfig()) == pytest.approx(11 / 64, abs=0.01)


@ALL
def test_pictures_of_what_is_seen(objective):
    batch = rows_of(objective, 3)
    viewed = jax.device_get(Compiled(objective).views(batch, True))
    (drawn,) = objective.preview_pictures(batch, viewed).values()
    assert (drawn.dtype, drawn.ndim, drawn.shape[-1]) == (np.uint8, 3, 3)
    assert len(objective.preview(batch, viewed)) == 3


def test_the_preview_says_in_words_where_the_neighbour_lies():
    answer = np.arange(8)[:, None]
    said = [line["neighbour lies"] for line in RELATIVE.preview({}, {"answer": answer})]
    assert said == ["above left", "above", "above right", "left", "right", "below left", "below", "below right"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("jigsaw", dict(pretext__permutations=1), "permutations is 1; expected 2 to 5000"),
        ("jigsaw", dict(pretext__piece_share=0.0), r"piece_share is 0\.0"),
        ("relative_patch", dict(pretext__head_width=0), "head_width is 0"),
        ("rotation", dict(model__image_size=16), r"data\.image_size is 8 and config\.model\.image_size is 16"),
    ],
)
def test_what_cannot_be_is_refused(name, changes, message):
    classes = {"jigsaw": Jigsaw, "relative_patch": RelativePatch, "rotation": Rotation}
    with pytest.raises(UserError, match=message):
        classes[name].abstract(tiny_images(name, **changes).to_dict())

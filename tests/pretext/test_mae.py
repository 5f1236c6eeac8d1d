"""Masked autoencoding: targets and loss against NumPy, who sees what, one program for all masks, and pictures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx.errors import UserError
from sslx.models.pixels import patchify, take_patches
from sslx.models.vit import sincos_table
from sslx.pretext import mae
from sslx.pretext.mae import Mae, MaeConfig, MaskedAutoencoder, patch_targets
from sslx.pretext.patch_masks import hidden_count, split_patches
from sslx.train.sharding import unbox

PRETEXT = MaeConfig(mask_ratio=0.75, decoder_layers=1, decoder_width=16, decoder_heads=2)
MODEL = dataclasses.replace(TINY_VIT, init="xavier", registers=1)
OBJECTIVE = Mae(PRETEXT, MODEL, False)
COMPILED = Compiled(OBJECTIVE)
KEY, STEP = jax.random.key(1), jnp.int32(0)


def numpy_patches(images):
    """Patches of 2 by 2 pixels, one after the other."""
    rows = [
        images[:, top : top + 2, left : left + 2].reshape(len(images), -1)
        for top in range(0, images.shape[1], 2)
        for left in range(0, images.shape[2], 2)
    ]
    return np.stack(rows, axis=1)


@pytest.fixture(scope="module")
def viewed():
    return COMPILED.views(picture_rows(8), True)


@pytest.fixture(scope="module")
def params(viewed):
    return unbox(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), picture_rows(2)))())["params"]


@pytest.fixture(scope="module")
def predicted():
    return jax.jit(lambda params, batch: OBJECTIVE.module.apply({"params": params}, batch, deterministic=True))


def test_masks_hide_an_exact_number_of_patches_at_random_by_row():
    assert [hidden_count(196, 0.75), hidden_count(16, 0.75), hidden_count(10, 0.55)] == [147, 12, 6]
    keys = jax.vmap(lambda row: jax.random.fold_in(KEY, row))(jnp.arange(400))
    visible, hidden = (np.asarray(of) for of in split_patches(keys, 16, 12))
    assert (visible.shape, hidden.shape) == ((400, 4), (400, 12))
    np.testing.assert_array_equal(np.sort(np.concatenate([visible, hidden], axis=1)), np.tile(np.arange(16), (400, 1)))
    assert (np.diff(visible) > 0).all()  # in reading order
    share = np.bincount(visible.ravel(), minlength=16) / 400
    np.testing.assert_allclose(share, 0.25, atol=4 * (0.25 * 0.75 / 400) ** 0.5)
    again = split_patches(keys[7:8], 16, 12)  # a row's mask is its own, whatever rows are beside it
    np.testing.assert_array_equal(again[0][0], visible[7])


def test_targets_are_normalised_patch_by_patch_as_mae_does(viewed):
    images = np.float64(viewed["image"])
    pixels = numpy_patches((images - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25])
    np.testing.assert_allclose(patch_targets(viewed["image"], MODEL, norm_pixels=False), pixels, atol=1e-5)
    mean, count = pixels.mean(-1, keepdims=True), pixels.shape[-1]
    variance = ((pixels - mean) ** 2).sum(-1, keepdims=True) / (count - 1)
    expected = (pixels - mean) / (variance + 1e-6) ** 0.5
    np.testing.assert_allclose(patch_targets(viewed["image"], MODEL, norm_pixels=True), expected, atol=1e-4)
    # There is nothing to paint on blank paper: its deviation of 0 is not divided by.
    blank = patch_targets(jnp.full((1, 8, 8, 3), 0.3), MODEL, norm_pixels=True)
    assert np.isfinite(blank).all()


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_the_mean_square_over_hidden_patches(params, viewed, predicted, norm_pixels):
    objective = dataclasses.replace(OBJECTIVE, pretext=dataclasses.replace(PRETEXT, norm_pixels=norm_pixels))
    out = Compiled(objective).loss(params, {}, viewed, True)
    painted = np.float64(predicted(params, viewed))
    assert painted.shape == (8, 12, 12)
    target = np.float64(patch_targets(viewed["image"], MODEL, norm_pixels=norm_pixels))
    total = 0.0
    for row in range(8):
        for place, patch in enumerate(np.asarray(viewed["hidden"])[row]):
            total += np.mean((painted[row, place] - target[row, patch]) ** 2)
    assert out.terms["reconstruction"].sum == pytest.approx(total, rel=1e-5)
    assert viewed["weights"]["reconstruction"].tolist() == [[1.0] * 12] * 8


def test_no_one_sees_hidden_patches_and_visible_ones_are_not_asked_for(params, viewed, predicted):
    patches = np.asarray(patchify(viewed["image"], 2))
    rows = np.arange(8)[:, None]
    repainted = patches.copy()
    repainted[rows, viewed["hidden"]] = 0.123
    image = np.asarray(repainted.reshape(8, 4, 4, 2, 2, 3).swapaxes(2, 3).reshape(8, 8, 8, 3))
    np.testing.assert_array_equal(predicted(params, viewed | {"image": image}), predicted(params, viewed))

    # With an encoder that sees nothing, the picture reaches the loss by its targets alone.
    blind = params | {
        "encoder": params["encoder"] | {"patches": jax.tree.map(jnp.zeros_like, params["encoder"]["patches"])}
    }

    def loss(image):
        return OBJECTIVE.loss(blind, {}, viewed | {"image": image}, KEY, STEP, train=True).terms["reconstruction"].sum

    by_patch = np.abs(numpy_patches(np.asarray(jax.jit(jax.grad(loss))(viewed["image"])))).sum(-1)
    asked = np.zeros((8, 16), bool)
    asked[rows, np.asarray(viewed["hidden"])] = True
    assert (by_patch[~asked] == 0).all()
    assert (by_patch[asked] > 0).all()


def test_the_decoder_puts_tokens_where_they_belong(params, viewed):
    # Its blocks add nothing here, so that what stands in each place comes out of its last norm and dense layer.
    decoder = jax.tree.map(jnp.copy, params["decoder"])
    layers = decoder["transformer"]["layers"]
    for part, out in (("attention", "out"), ("mlp", "down")):
        layers[part][out] = jax.tree.map(jnp.zeros_like, layers[part][out])
    module = mae.Decoder(mae.decoder_of(MODEL, PRETEXT))
    apply = jax.jit(lambda p, *given: module.apply({"params": p}, *given, front=2, deterministic=True))
    x = np.random.default_rng(0).normal(size=(8, 2 + 4, 16)).astype(np.float32)
    visible, hidden = np.asarray(viewed["visible"]), np.asarray(viewed["hidden"])

    def painted(which):
        return np.asarray(apply(decoder, x, visible, which))

    def expected(places):
        normed = (places - places.mean(-1, keepdims=True)) / np.sqrt(places.var(-1, keepdims=True) + 1e-6)
        return normed @ decoder["pixels"]["kernel"] + decoder["pixels"]["bias"]

    table = sincos_table(4, 16)
    np.testing.assert_allclose(painted(hidden), expected(decoder["mask_token"] + table[hidden]), atol=1e-4)
    # Asked for the visible places, it has the encoder's outputs there, with the same positions.
    embedded = x @ decoder["embed"]["kernel"] + decoder["embed"]["bias"]
    np.testing.assert_allclose(painted(visible), expected(embedded[:, 2:] + table[visible]), atol=1e-4)


def test_hidden_places_see_all_others_with_their_positions(params, viewed):
    module = mae.Decoder(mae.decoder_of(MODEL, PRETEXT))
    apply = jax.jit(lambda p, *given: module.apply({"params": p}, *given, front=2, deterministic=True))
    decoder = jax.tree.map(lambda array: array * 3.0, params["decoder"])
    x = np.random.default_rng(0).normal(size=(8, 2 + 4, 16)).astype(np.float32)
    visible, hidden = np.asarray(viewed["visible"]), np.asarray(viewed["hidden"])

    def painted(x, visible):
        return np.asarray(apply(decoder, x, visible, hidden))

    order = np.array([2, 0, 3, 1])
    shuffled = np.concatenate([x[:, :2], x[:, 2:][:, order]], axis=1)
    np.testing.assert_allclose(painted(shuffled, visible[:, order]), painted(x, visible), atol=1e-4)
    assert np.abs(painted(shuffled, visible) - painted(x, visible)).max() > 1e-2  # another picture


def test_views_losses_and_gradients_are_the_same_on_eight_devices():
    variables = jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(5), picture_rows(2)))())
    batch = picture_rows(8)
    (one, metrics), (eight, others) = (one_step(OBJECTIVE, variables, batch, devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state)
    assert_close(metrics, others)
    assert metrics["loss"] > 0.1
    norms = {name: max(np.abs(leaf).max() for leaf in jax.tree.leaves(of)) for name, of in one.opt_state.items()}
    assert min(norms.values()) > 0


def test_evaluation_sees_whole_pictures_and_the_same_masks_each_time():
    batch = picture_rows(4)
    draw = jax.jit(lambda step: OBJECTIVE.views(batch, KEY, step, train=False))
    views = [draw(step) for step in (0, 9)]
    jax.tree.map(np.testing.assert_array_equal, *views)
    np.testing.assert_allclose(views[0]["image"], batch["image"] / 255.0, atol=1e-6)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_chance_is_the_loss_of_painting_the_same_everywhere(norm_pixels):
    config = tiny_images("vit_mae", pretext__norm_pixels=norm_pixels)
    objective, data = Mae.prepare(config.to_dict())
    images = np.float64(data.eval.fetch(np.arange(len(data.eval)))["image"]) / 255 * 2 - 1
    targets = numpy_patches(images)
    if norm_pixels:
        spread = (targets.var(-1, keepdims=True, ddof=1) + 1e-6) ** 0.5
        targets = (targets - targets.mean(-1, keepdims=True)) / spread
    expected = ((targets - targets.mean((0, 1))) ** 2).mean()
    assert objective.chance(data.statistics) == pytest.approx(expected, rel=1e-3)
    assert objective.chance({}) is None


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_show_what_is_hidden_and_what_was_painted(viewed, monkeypatch, norm_pixels):
    objective = dataclasses.replace(OBJECTIVE, pretext=dataclasses.replace(PRETEXT, norm_pixels=norm_pixels))

    def perfect(self, batch, *, deterministic):
        return take_patches(patch_targets(batch["image"], MODEL, norm_pixels=norm_pixels), batch["hidden"])

    monkeypatch.setattr(MaskedAutoencoder, "__call__", perfect)
    shown = {name: np.asarray(of) for name, of in Compiled(objective).predict({}, {}, viewed).items()}
    image = np.asarray(viewed["image"])
    np.testing.assert_allclose(shown["picture"], image, atol=1e-6)
    np.testing.assert_allclose(shown["reconstruction"], image, atol=1e-4)
    masked, patches = numpy_patches(shown["masked"]), numpy_patches(image)
    for row in range(8):
        assert (masked[row, np.asarray(viewed["hidden"])[row]] == 0.5).all()
        kept = np.asarray(viewed["visible"])[row]
        np.testing.assert_allclose(masked[row, kept], patches[row, kept], atol=1e-6)
    (drawn,) = objective.pictures(shown).values()
    assert (drawn.dtype, drawn.ndim, drawn.shape[-1]) == (np.uint8, 3, 3)


def test_features_are_of_all_patches_by_the_encoder_alone(params):
    variables = OBJECTIVE.encoder(params, {})
    assert set(variables) == {"params"}
    batch = picture_rows(2)
    features = COMPILED.encode(variables, {"image": batch["image"]})
    assert (features.shape, features.dtype) == ((2, 16), jnp.float32)
    for place in range(16):
        image = batch["image"].copy()
        image[:, 2 * (place // 4), 2 * (place % 4)] ^= 255
        assert np.abs(COMPILED.encode(variables, {"image": image}) - features).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pretext__mask_ratio=1.0), r"mask_ratio is 1\.0 of 16 patches"),
        (dict(pretext__mask_ratio=0.99), r"mask_ratio is 0\.99 of 16 patches"),
        (dict(pretext__decoder_width=98), "decoder_width 98 does not divide into config.pretext.decoder_heads 4"),
        (dict(model__patch_size=1), "norm_pixels needs patches of more than one number"),
        (dict(model__name="resnet"), "'resnet'.*vit"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Mae.abstract(tiny_images("vit_mae", **changes).to_dict())

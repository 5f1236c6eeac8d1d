"""iGPT: colours by k-means, causality, the loss in bits by hand, pictures that go on, features of the middle layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import Compiled, picture_rows, tiny_images

from sslx.errors import UserError
from sslx.models.igpt import IgptConfig, nearest_colours
from sslx.pretext.igpt import Igpt, IgptPretextConfig, _codebook, _colour_entropy
from sslx.pretext.image import some_pictures
from sslx.train.sharding import unbox

MODEL = IgptConfig(layers=2, width=16, heads=2, mlp_width=32, max_length=16, image_size=4, channels=3, colours=6)
COLOURS = tuple(map(tuple, np.random.default_rng(3).uniform(size=(6, 3)).tolist()))
OBJECTIVE = Igpt(IgptPretextConfig(), MODEL, False, COLOURS)
COMPILED = Compiled(OBJECTIVE)


class Rows:
    """Prepared rows of given pictures."""

    def __init__(self, images):
        self._images = np.asarray(images, np.uint8)

    def __len__(self):
        return len(self._images)

    def fetch(self, ids):
        return {"image": self._images[ids]}


@pytest.fixture(scope="module")
def params():
    fresh = unbox(jax.jit(lambda: OBJECTIVE.init(jax.random.key(0), picture_rows(2, 4)))())["params"]
    larger = jax.tree.map(lambda array: array * 8.0, fresh)  # far from even guesses
    larger["encoder"]["codebook"] = fresh["encoder"]["codebook"]
    return larger


@pytest.fixture(scope="module")
def viewed():
    return COMPILED.views(picture_rows(8, 4), False)


def brute_force(images, codebook):
    pixels = np.float64(images).reshape(len(images), -1, 1, images.shape[-1])
    return ((pixels - np.float64(codebook)) ** 2).sum(-1).argmin(-1)


def test_each_pixel_becomes_the_nearest_colour_in_reading_order(params, viewed):
    np.testing.assert_allclose(params["encoder"]["codebook"], COLOURS, rtol=1e-6)
    tokens = nearest_colours(viewed["image"], jnp.asarray(COLOURS))
    np.testing.assert_array_equal(tokens, brute_force(np.asarray(viewed["image"]), COLOURS))
    assert len(np.unique(tokens)) == 6


def test_256_greys_are_kept_exactly():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    codebook = _codebook(Rows(images[:, :1]), 256, seed=0)  # even where the pictures do not have them all
    np.testing.assert_array_equal(np.round(codebook * 255)[:, 0], np.arange(256))
    tokens = nearest_colours(images / np.float32(255), jnp.asarray(codebook))
    np.testing.assert_array_equal(tokens[0], np.arange(256))


def test_the_codebook_is_a_fixed_point_of_k_means():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(rng.integers(0, 5, (40, 6, 6, 1)) * 50, 6, (40, 6, 6, 3)), 0, 255).astype(np.uint8)
    codebook = _codebook(Rows(images), 5, seed=0)
    near = brute_force(images / 255.0, codebook).ravel()
    pixels = images.reshape(-1, 3) / 255.0
    for colour in range(5):
        np.testing.assert_allclose(codebook[colour], pixels[near == colour].mean(0), atol=1e-3)
    np.testing.assert_array_equal(_codebook(Rows(images), 5, seed=0), codebook)


def test_colours_that_are_no_more_than_asked_for_are_kept():
    values = np.array([3, 77, 200, 250])
    images = values[np.random.default_rng(0).integers(0, 4, (10, 4, 4, 1))]
    np.testing.assert_allclose(np.sort(_codebook(Rows(images), 4, seed=0)[:, 0] * 255), values, atol=1e-3)
    with pytest.raises(UserError, match="colours is 5, and the training pictures have 4"):
        _codebook(Rows(images), 5, seed=0)


def test_the_loss_is_the_code_length_of_the_pixels(params, viewed):
    out = COMPILED.loss(params, {}, viewed, True)
    tokens = brute_force(np.asarray(viewed["image"]), COLOURS)
    logits = np.float64(COMPILED.logits(params, {}, {"image": viewed["image"]}))
    assert logits.shape == (8, 16, 7)  # the start is a token, too
    likelihood = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    likelihood -= logits.max(-1, keepdims=True)
    nats = -np.take_along_axis(likelihood, tokens[..., None], -1)
    assert out.terms["igpt"].sum == pytest.approx(nats.sum(), rel=1e-5)
    assert viewed["weights"]["igpt"].shape == (8, 16)
    # In bits, and for each of the three numbers of a pixel.
    mean = nats.sum() / (8 * 16)
    assert OBJECTIVE.derive({"loss": mean})["bits_per_dim"] == pytest.approx(mean / math.log(2) / 3)
    even = OBJECTIVE.derive({"loss": math.log(256)})["bits_per_dim"]
    assert even * 3 == pytest.approx(8)


def test_no_logit_knows_its_own_pixel_or_a_later_one(params, viewed):
    tokens = np.asarray(nearest_colours(viewed["image"], jnp.asarray(COLOURS)))
    logits = lambda image: COMPILED.logits(params, {}, {"image": image})  # noqa: E731
    image = np.asarray(COLOURS, np.float32)[tokens].reshape(8, 4, 4, 3)
    before = np.asarray(logits(image))
    for changed in (0, 5, 15):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % 6
        after = np.asarray(logits(np.asarray(COLOURS, np.float32)[other].reshape(8, 4, 4, 3)))
        np.testing.assert_array_equal(after[:, : changed + 1], before[:, : changed + 1])
        if changed < 15:
            assert np.abs(after[:, changed + 1] - before[:, changed + 1]).max() > 1e-3


def test_what_is_drawn_goes_on_from_the_given_pixels(params, viewed):
    greedy = dataclasses.replace(OBJECTIVE, pretext=IgptPretextConfig(temperature=0.0))
    tokens = nearest_colours(viewed["image"], jnp.asarray(COLOURS))[:3]
    drawn = jax.jit(lambda above: greedy.drawn(params, above, jax.random.split(jax.random.key(1), 3)))(tokens[:, :8])
    assert drawn.shape == (3, 8)
    logits = lambda image: COMPILED.logits(params, {}, {"image": image})  # noqa: E731
    row = np.asarray(tokens).copy()
    for place in range(8, 16):  # without a cache, one pixel after the other
        image = np.asarray(COLOURS, np.float32)[row].reshape(3, 4, 4, 3)
        row[:, place] = np.asarray(logits(image))[:, place, :6].argmax(-1)
    np.testing.assert_array_equal(drawn, row[:, 8:])


def test_pictures_keep_the_upper_half_and_sample_whole_ones(params, viewed):
    shown = {name: np.asarray(of) for name, of in COMPILED.predict(params, {}, viewed).items()}
    tokens = brute_force(np.asarray(viewed["image"]), COLOURS)
    picture = np.asarray(COLOURS)[tokens].reshape(8, 4, 4, 3)
    np.testing.assert_allclose(shown["picture"], picture, atol=1e-6)
    np.testing.assert_allclose(shown["lower half painted"][:, :2], picture[:, :2], atol=1e-6)
    for name in ("lower half painted", "sample"):
        assert {tuple(colour) for colour in shown[name].reshape(-1, 3)} <= {tuple(np.float32(c)) for c in COLOURS}
    assert len(np.unique(shown["sample"], axis=0)) > 1
    (drawn,) = OBJECTIVE.pictures(shown).values()
    assert drawn.dtype == np.uint8


def test_views_losses_and_gradients_are_the_same_on_eight_devices():
    variables = jax.device_get(jax.jit(lambda: OBJECTIVE.init(jax.random.key(5), picture_rows(2, 4)))())
    (one, metrics), (eight, others) = (one_step(OBJECTIVE, variables, picture_rows(8, 4), devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state)
    assert_close(metrics, others)
    assert not one.opt_state["encoder"]["codebook"].any()


def test_features_are_the_mean_of_the_normalised_states_of_the_middle_layer(params, viewed):
    variables = OBJECTIVE.encoder(params, {})
    features = np.asarray(COMPILED.encode(variables, viewed))
    # The states after one layer are those of a model of one layer, whose last norm has neither scale nor bias.
    encoder = jax.tree.map(lambda array: array, params["encoder"])
    encoder["transformer"] = {
        "layers": jax.tree.map(lambda array: array[:1], encoder["transformer"]["layers"]),
        "final_norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)},
    }
    short = dataclasses.replace(MODEL, layers=1).encoder()
    tokens = brute_force(np.asarray(viewed["image"]), COLOURS)
    row = {
        "tokens": np.concatenate([np.full((8, 1), 6), tokens[:, :-1]], axis=1),
        "segment_ids": np.ones((8, 16), int),
        "positions": np.tile(np.arange(16), (8, 1)),
    }
    states = jax.jit(lambda: short.apply({"params": encoder}, row, deterministic=True))()
    np.testing.assert_allclose(features, np.asarray(states).mean(1), atol=1e-4)
    # Asked for, the last layer's, which are what predictions are made of.
    last = dataclasses.replace(OBJECTIVE, model=dataclasses.replace(MODEL, features_layer=2))
    states = jax.jit(lambda: MODEL.encoder().apply({"params": params["encoder"]}, row, deterministic=True))()
    np.testing.assert_allclose(Compiled(last).encode(variables, viewed), np.asarray(states).mean(1), atol=1e-4)


def test_pictures_for_statistics_are_from_all_over_the_rows():
    # As a folder has them: 600 of one class, and 600 of another after them.
    images = np.repeat(np.array([0, 255], np.uint8), 600).reshape(-1, 1, 1, 1)
    assert _colour_entropy(Rows(images), np.array([[0.0], [1.0]], np.float32)) == pytest.approx(math.log(2), rel=1e-3)
    some = some_pictures(Rows(images), 100)
    assert (len(some), int((some > 0).sum())) == (100, 50)
    assert len(some_pictures(Rows(images[:7]), 100)) == 7


def test_chance_is_the_entropy_of_held_out_colours():
    config = tiny_images("vit_igpt", model__colours=4, model__max_length=64)
    objective, data = Igpt.prepare(config.to_dict())
    codebook = np.array(objective.codebook)
    tokens = brute_force(data.eval.fetch(np.arange(len(data.eval)))["image"] / 255.0, codebook)
    share = np.bincount(tokens.ravel(), minlength=4) / tokens.size
    assert objective.chance(data.statistics) == pytest.approx(-(share * np.log(share)).sum(), rel=1e-4)
    assert objective.chance({}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(model__max_length=63),
            r"max_length is 63; expected at least the 64 pixels of config\.model\.image_size 8",
        ),
        (dict(model__colours=1), "colours is 1; expected at least 2"),
        (dict(model__features_layer=2), "features_layer is 2; expected 0 to 1"),
        (dict(pretext__temperature=-1.0), "temperature is -1"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Igpt.abstract(tiny_images("vit_igpt", **changes).to_dict())

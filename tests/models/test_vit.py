"""ViT: patches, positions, tokens in front, pooling, drop path, its published sizes.

What a whole one computes is compared in ``tests/interop/test_parity.py``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from sslx.errors import UserError
from sslx.models.pixels import patchify, unpatchify
from sslx.models.transformer import Block, rotate
from sslx.models.vit import SIZES, VitConfig, places, sincos_table
from sslx.settings import OptimizerConfig
from sslx.train.optimizer import make_optimizer
from sslx.train.sharding import PARAMETER_AXES, is_box, parameter_name, unbox

# timm's vit_*_patch16_224 (huge: patch14) without the classifier.
PUBLISHED = {
    "tiny": 5_524_416,
    "small": 21_665_664,
    "base": 85_798_656,
    "large": 303_301_632,
    "huge": 630_764_800,
}
TINY = VitConfig(layers=1, width=16, heads=2, mlp_width=32, image_size=8, patch_size=2, channels=1)


def images(rows=3, size=8, channels=1):
    return np.random.default_rng(1).uniform(size=(rows, size, size, channels)).astype(np.float32)


def fresh(config, scale=3.0):
    """Parameters far from 0, so that every part of the encoder shows in what comes out."""
    batch = {"image": images(1, config.image_size, config.channels)}
    init = lambda: config.encoder().init(jax.random.key(0), batch, deterministic=True, method="features")  # noqa: E731
    return jax.tree.map(lambda array: array * scale, unbox(jax.jit(init)()))


def run(config, variables, batch, method=None, **options):
    options = dict(deterministic=True) | options
    return np.asarray(jax.jit(lambda v, b: config.encoder().apply(v, b, method=method, **options))(variables, batch))


def test_patches_are_in_reading_order_and_go_back():
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    patches = np.asarray(patchify(image, 2))
    assert patches.shape == (2, 6, 12)
    for place, (top, left) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        np.testing.assert_array_equal(patches[:, place], image[:, top : top + 2, left : left + 2].reshape(2, -1))
    square = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(unpatchify(patchify(square, 2), 2), square)


def test_fixed_positions_are_those_of_mae():
    # Its formula, for one patch after the other: the column in the first half, the row in the second, sines first.
    grid, width = 3, 16
    table = sincos_table(grid, width)
    assert table.shape == (9, 16)
    for place in range(9):
        row, column = divmod(place, grid)
        expected = []
        for position in (column, row):
            angles = [position / 10000 ** (i / (width / 4)) for i in range(width // 4)]
            expected += [*np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(table[place], expected, atol=1e-6)


def test_rotary_products_depend_on_how_far_apart_rows_and_columns_are():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(at, of):
        turned = [rotate(x, jnp.array([[place]]), 100.0) for x, place in ((query, at), (key, of))]
        return float(jnp.sum(turned[0] * turned[1]))

    base = product((2, 5), (4, 6))
    assert product((3, 9), (5, 10)) == pytest.approx(base, abs=1e-5)  # both moved by one row and four columns
    assert abs(product((2, 5), (4, 7)) - base) > 1e-3
    assert abs(product((2, 5), (5, 6)) - base) > 1e-3
    assert abs(product((5, 2), (6, 4)) - base) > 1e-3  # rows are no columns
    # By hand: the first half of the features turns by the row, the second by the column.
    turned = np.asarray(rotate(query, jnp.array([[(2, 5)]]), 100.0))[0, 0, 0]
    for half, place in ((0, 2), (4, 5)):
        part = np.asarray(query)[0, 0, 0, half : half + 4]
        for pair, frequency in ((0, 1.0), (1, 0.1)):
            angle = place * frequency
            real = (part[pair] + 1j * part[pair + 2]) * np.exp(1j * angle)
            np.testing.assert_allclose(turned[[half + pair, half + pair + 2]], [real.real, real.imag], atol=1e-5)


def test_rotary_positions_are_rows_and_columns_and_nothing_turns_what_stands_in_front():
    config = dataclasses.replace(TINY, positions="rope", registers=1)
    variables = fresh(config)
    places_of = lambda visible: config.encoder().apply(variables, 2, visible, 4, method="positions")  # noqa: E731
    places = np.asarray(places_of(None))
    assert places.shape == (2, 2 + 16, 2)
    assert not places[:, :2].any()
    np.testing.assert_array_equal(places[1, 2:], [[1 + row, 1 + column] for row in range(4) for column in range(4)])
    visible = jnp.array([[3, 4], [0, 15]])
    np.testing.assert_array_equal(places_of(visible)[1, 2:], [[1, 1], [4, 4]])


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_visible_patches_alone_go_through_the_layers_and_keep_their_positions(positions):
    config = dataclasses.replace(TINY, positions=positions, registers=1)
    variables, batch = fresh(config), {"image": images()}
    encode = jax.jit(
        lambda image, visible: config.encoder().apply(variables, {"image": image}, visible=visible, deterministic=True)
    )
    visible = np.array([[0, 3, 7], [1, 2, 15], [4, 5, 6]])
    found = encode(batch["image"], visible)
    assert found.shape == (3, 2 + 3, 16)
    changed = np.asarray(patchify(batch["image"], 2)).copy()
    for row in range(3):
        changed[row, np.setdiff1d(np.arange(16), visible[row])] = 0.77
    np.testing.assert_allclose(encode(np.asarray(unpatchify(changed, 2)), visible), found, atol=1e-5)
    # All of them, in another order: every token keeps the place that it has in the picture.
    order = np.random.default_rng(0).permutation(16)
    whole, shuffled = run(config, variables, batch), np.asarray(encode(batch["image"], np.tile(order, (3, 1))))
    np.testing.assert_allclose(shuffled[:, 2:], whole[:, 2:][:, order], atol=1e-3)
    np.testing.assert_allclose(shuffled[:, :2], whole[:, :2], atol=1e-3)


def test_positions_and_tokens_in_front_are_added_once():
    # Without layers in between there would be nothing to see: a transformer whose branches add nothing and whose last
    # norm is undone by comparing directions.
    config = dataclasses.replace(TINY, positions="sincos", registers=2)
    variables = fresh(config)
    layers = variables["params"]["transformer"]["layers"]
    layers["attention"]["out"] = jax.tree.map(jnp.zeros_like, layers["attention"]["out"])
    layers["mlp"]["down"] = jax.tree.map(jnp.zeros_like, layers["mlp"]["down"])
    params = variables["params"]
    params["transformer"]["final_norm"] = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    batch = {"image": images()}
    embedded = np.asarray(patchify(batch["image"], 2) * 2 - 1) @ params["patches"]["kernel"] + params["patches"]["bias"]
    patches = embedded + sincos_table(4, 16)
    front = np.concatenate([params["class_token"], params["registers"]])
    x = np.concatenate([np.tile(front, (3, 1, 1)), patches], axis=1)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(run(config, variables, batch), expected, atol=1e-3)
    # What is hidden is a token with the position of what it stands for.
    token, hidden = np.full(16, 0.5, np.float32), np.array([[2], [0], [9]])
    for row in range(3):
        x[row, 3 + hidden[row, 0]] = token + sincos_table(4, 16)[hidden[row, 0]]
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    found = run(config, variables, batch, hidden=(jnp.asarray(hidden), jnp.asarray(token)))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_layer_scale_is_a_factor_of_each_feature_of_a_branch():
    config = dataclasses.replace(TINY, layer_scale=0.1)
    variables, batch = fresh(config, 1.0), {"image": images()}
    layers = variables["params"]["transformer"]["layers"]
    for branch in ("attention", "mlp"):
        np.testing.assert_allclose(layers[f"{branch}_layer_scale"], np.full((1, 16), 0.1))
    factor = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    layers |= {"attention_layer_scale": factor, "mlp_layer_scale": -factor}
    found = run(config, variables, batch)
    # The same in the kernels that write to the residual stream, without it.
    plain = {name: of for name, of in layers.items() if not name.endswith("layer_scale")}
    for branch, out, scale in (("attention", "out", factor), ("mlp", "down", -factor)):
        dense = layers[branch][out]
        scaled = {"kernel": dense["kernel"] * scale[:, None], "bias": dense["bias"] * scale}
        plain[branch] = {**layers[branch], out: scaled}
    variables["params"]["transformer"]["layers"] = plain
    np.testing.assert_allclose(run(dataclasses.replace(config, layer_scale=0.0), variables, batch), found, atol=1e-4)


def test_drop_path_skips_branches_of_whole_rows_and_in_evaluation_none():
    config = dataclasses.replace(TINY, drop_path=0.4)
    variables = fresh(config, 1.0)
    rows = 2000
    x = jnp.ones((rows, 4, 16)) * jnp.arange(16.0)

    # A block whose attention adds the same everywhere, and whose MLP adds nothing.
    params = jax.tree.map(lambda array: array[0], variables["params"]["transformer"]["layers"])
    params["mlp"]["down"] = jax.tree.map(jnp.zeros_like, params["mlp"]["down"])
    params["attention"]["out"] = {"kernel": jnp.zeros((16, 16)), "bias": jnp.arange(16.0) % 3}
    ids = jnp.ones((rows, 4), jnp.int32)

    def branch(skipped, deterministic=False):
        given, rngs = (x, ids, ids, None, None, skipped), {"dropout": jax.random.key(3)}
        apply = jax.jit(lambda p: Block(config).apply({"params": p}, *given, deterministic=deterministic, rngs=rngs)[0])
        return np.asarray(apply(params) - x)

    whole = np.tile(np.arange(16.0) % 3, (rows, 4, 1))
    found = branch(0.4)
    kept = np.abs(found).max(axis=(1, 2)) > 0
    np.testing.assert_allclose(found[kept], whole[kept] / 0.6, rtol=1e-5)
    assert np.mean(kept) == pytest.approx(0.6, abs=0.044)  # four standard deviations
    np.testing.assert_allclose(found.mean(0), whole[0], atol=0.15)  # what is expected is the branch
    np.testing.assert_allclose(branch(0.0), whole, rtol=1e-6)
    np.testing.assert_allclose(branch(0.4, deterministic=True), whole, rtol=1e-6)


def test_the_first_layer_skips_nothing_and_the_last_as_many_as_the_config_says(monkeypatch):
    config = dataclasses.replace(TINY, layers=3, drop_path=0.4)
    variables, seen = fresh(config, 1.0), []
    call = Block.__call__

    def noting(self, x, segment_ids, positions, picked=None, cache=None, skipped=0.0, *, deterministic):
        jax.debug.callback(lambda share: seen.append(float(share)), skipped)
        return call(self, x, segment_ids, positions, picked, cache, skipped, deterministic=deterministic)

    monkeypatch.setattr(Block, "__call__", noting)
    run(config, variables, {"image": images()}, deterministic=False, rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), [0.0, 0.2, 0.4], atol=1e-6)


def test_features_are_the_class_token_or_the_mean_of_the_patches():
    batch = {"image": images()}
    for pool, registers in (("class", 2), ("mean", 2)):
        config = dataclasses.replace(TINY, pool=pool, registers=registers)
        variables = fresh(config)
        states = run(config, variables, batch)
        expected = states[:, 0] if pool == "class" else states[:, 3:].mean(1)
        np.testing.assert_allclose(run(config, variables, batch, "features"), expected, atol=1e-5)


def test_attention_pooling_is_one_query_over_the_patches_and_an_mlp():
    config = dataclasses.replace(TINY, pool="attention", registers=1)
    variables, batch = fresh(config), {"image": images()}
    pool = jax.tree.map(np.float64, variables["params"]["attention_pool"])
    patches = np.float64(run(config, variables, batch))[:, 2:]
    dense = lambda of, x: x @ of["kernel"] + of["bias"]  # noqa: E731
    heads = lambda x: x.reshape(*x.shape[:-1], 2, 8)  # noqa: E731
    query, key, value = (
        heads(dense(pool["query"], pool["probe"])),
        *(heads(dense(pool[n], patches)) for n in ("key", "value")),
    )
    scores = np.einsum("qhd,bkhd->bhk", query, key) / np.sqrt(8)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhk,bkhd->bhd", share / share.sum(-1, keepdims=True), value).reshape(3, 16)
    y = dense(pool["out"], y)
    normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    normed = normed * pool["norm"]["scale"] + pool["norm"]["bias"]
    up = dense(pool["mlp"]["up"], normed)
    expected = y + dense(pool["mlp"]["down"], up * 0.5 * (1 + erf(up / np.sqrt(2))))
    found = run(config, variables, batch, "features")
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(size):
    encoder = VitConfig(**SIZES[size]).encoder()
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)}
    boxed = jax.eval_shape(lambda batch: encoder.init(jax.random.key(0), batch, deterministic=True), batch)
    leaves = jax.tree.leaves(boxed["params"], is_leaf=is_box)
    assert sum(leaf.value.size for leaf in leaves) == PUBLISHED[size]
    assert {name for leaf in leaves for name in leaf.names} - {None} <= set(PARAMETER_AXES)


def test_weight_decay_moves_kernels_alone():
    config = dataclasses.replace(TINY, positions="learned", registers=2, pool="attention", layer_scale=0.1)
    params = fresh(config, 1.0)["params"]
    boxed = {"encoder": params, "mask_token": np.zeros(16, np.float32)}
    boxed = jax.tree.map(lambda value: value + 1.0, boxed)  # nothing is 0, which no decay would move
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, clip_norm=None), lambda step: 1.0, boxed)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, boxed), optimizer.init(boxed), boxed)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = parameter_name(path)
        assert np.any(update) == name.endswith("kernel"), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(image_size=225), "image_size 225 does not divide into patches of 16"),
        (dict(class_token=False), "pool is 'class' without config.model.class_token"),
        (dict(positions="sincos", width=18, heads=2), "positions=sincos needs a width that divides by 4"),
        (dict(positions="rope", width=20, heads=2), "positions=rope needs a head width that divides by 4"),
        (dict(pool="meen"), "did you mean 'mean'"),
        (dict(pixel_mean=(0.5, 0.5)), "pixel_mean has 2 values for 3 channels"),
        (dict(drop_path=1.0), "drop_path is 1.0; expected 0 or a share below 1"),
    ],
)
def test_a_vit_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        VitConfig(**settings)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_smaller_pictures_span_the_same_places(positions):
    config = VitConfig(
        layers=1, width=16, heads=2, mlp_width=32, image_size=16, patch_size=4, positions=positions, pool="mean"
    )
    encoder = config.encoder()
    whole = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    params = jax.jit(lambda: encoder.init(jax.random.key(0), {"image": whole}, deterministic=True))()
    small = jax.jit(lambda p: encoder.apply(p, {"image": whole[:, :8, :8]}, deterministic=True))(params)
    assert small.shape == (2, 1 + 4, 16)
    assert np.isfinite(small).all()
    # Each of two patches along a side stands in the middle of the two of four that it covers.
    assert places(2, 4).tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    np.testing.assert_array_equal(sincos_table(4, 16, 4), sincos_table(4, 16))

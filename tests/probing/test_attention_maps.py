"""Attention maps from a ViT's parameters by NumPy, and where their picture is bright."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from tiny_images import TINY_VIT, picture_rows

from sslx.probing import attention
from sslx.probing.attention import attention_maps, attention_sheet
from sslx.train.sharding import unbox

# Two layers over 16 patches, with a class token and a register in front.
MODEL = dataclasses.replace(TINY_VIT, layers=2, registers=1, positions="learned", pool="class")


def fresh(model):
    """Parameters far from 0, of which the first layer adds nothing to what it sees."""
    init = lambda: model.encoder().init(jax.random.key(0), picture_rows(1), deterministic=True, method="features")  # noqa: E731
    params = jax.tree.map(lambda array: np.array(10 * array), unbox(jax.jit(init)()))["params"]
    for part, out in (("attention", "out"), ("mlp", "down")):
        for array in params["transformer"]["layers"][part][out].values():
            array[0] = 0
    return params


def numpy_attention(params, images, front, queries):
    """[images, heads, patches] of the last layer, averaged over the queries."""
    pixels = (images / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]
    places = [(top, left) for top in range(0, 8, 2) for left in range(0, 8, 2)]
    patches = np.stack([pixels[:, y : y + 2, x : x + 2].reshape(len(images), -1) for y, x in places], axis=1)
    x = patches @ params["patches"]["kernel"] + params["patches"]["bias"]
    position = params["position"]
    if front:
        x = x + position[1:]
        before = np.concatenate([params["class_token"] + position[:1], params["registers"]])
        x = np.concatenate([np.broadcast_to(before, (len(images), *before.shape)), x], axis=1)
    else:
        x = x + position
    layer = jax.tree.map(lambda array: np.float64(array[1]), params["transformer"]["layers"])
    norm = layer["attention_norm"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    query, key = (x @ layer["attention"][of]["kernel"] + layer["attention"][of]["bias"] for of in ("query", "key"))
    found = np.zeros((len(images), 2, x.shape[1]))
    for row, head, asked in np.ndindex(len(images), 2, len(queries)):
        part = slice(8 * head, 8 * head + 8)
        scores = key[row, :, part] @ query[row, queries[asked], part] / np.sqrt(8)
        shares = np.exp(scores - scores.max())
        found[row, head] += shares / shares.sum() / len(queries)
    return found[..., front:]


def test_the_class_token_of_the_last_layer_is_asked():
    params, images = fresh(MODEL), picture_rows(3)["image"]
    found = attention_maps(MODEL, {"params": params}, images)
    assert found.shape == (3, 2, 4, 4)
    expected = numpy_attention(params, images, 2, [0])
    np.testing.assert_allclose(found.reshape(3, 2, 16), expected, atol=1e-4)
    assert expected.max() > 3 * expected.mean()  # it is no flat map that agrees


def test_without_a_class_token_all_patches_are_asked():
    model = dataclasses.replace(MODEL, class_token=False, registers=0, pool="mean")
    params, images = fresh(model), picture_rows(3)["image"]
    found = attention_maps(model, {"params": params}, images)
    np.testing.assert_allclose(found.reshape(3, 2, 16), numpy_attention(params, images, 0, range(16)), atol=1e-4)
    np.testing.assert_allclose(found.sum((2, 3)), 1.0, atol=1e-5)


def test_the_picture_is_brightest_where_most_is_taken(monkeypatch):
    maps = np.full((1, 2, 4, 4), 0.01)
    maps[0, 0, 1, 2] = maps[0, 1, 3, 0] = 0.5
    monkeypatch.setattr(attention, "attention_maps", lambda *given: maps)
    headings = []
    sheet = attention.sheet
    monkeypatch.setattr(
        attention, "sheet", lambda columns, heading: headings.append(heading) or sheet(columns, heading=heading)
    )
    drawn = attention_sheet(MODEL, {}, np.zeros((1, 8, 8, 3), np.uint8))
    assert (drawn.dtype, drawn.shape) == (np.uint8, (4 + 96 + 4 + 2 * 16, 4 + 4 * 100, 3))
    tiles = [drawn[32 : 32 + 96, 4 + 100 * column : 100 + 100 * column].mean(-1) for column in range(4)]
    assert tiles[0].max() == 0  # the picture itself
    assert [np.unravel_index(tile.argmax(), tile.shape) for tile in tiles[2:]] == [(24, 48), (72, 0)]
    assert tiles[1][24, 48] == tiles[1][72, 0] == tiles[1].max()
    attention_sheet(dataclasses.replace(MODEL, class_token=False, pool="mean"), {}, np.zeros((1, 8, 8, 3), np.uint8))
    assert ["class token" in heading and "no class" not in heading for heading in headings] == [True, False]

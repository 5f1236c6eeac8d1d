"""Attention against NumPy float64; documents packed in one row do not see one another, nor padding."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sslx.models.attention import attend
from sslx.models.bert import MODERN, BertConfig, BertEncoder
from sslx.models.transformer import rotate
from sslx.train.sharding import unbox

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def reference(query, key, value, segments):
    """Loops over everything, in float64."""
    out = np.zeros(query.shape)
    batch, length, heads, width = query.shape
    for b, i, h in np.ndindex(batch, length, heads):
        seen = [j for j in range(length) if segments[b, i] == segments[b, j]]
        scores = np.array([np.dot(np.float64(query[b, i, h]), key[b, j, h]) / np.sqrt(width) for j in seen])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = (weights / weights.sum()) @ np.float64(value[b, seen, h])
    return out


def test_attention_is_the_formula_within_segments():
    query, key, value = np.random.default_rng(0).normal(0, 2, (3, 2, 8, 3, 4)).astype(np.float32)
    found = attend(query, key, value, SEGMENTS, SEGMENTS)
    np.testing.assert_allclose(found, reference(query, key, value, SEGMENTS), atol=2e-6)


def test_attention_dropout_averages_to_no_dropout():
    query, key, value = np.random.default_rng(1).normal(0, 1, (3, 2, 8, 3, 4)).astype(np.float32)
    once = jax.jit(jax.vmap(lambda k: attend(query, key, value, SEGMENTS, SEGMENTS, dropout_rate=0.3, dropout_key=k)))(
        jax.random.split(jax.random.key(0), 3000)
    )
    expected = reference(query, key, value, SEGMENTS)
    assert np.abs(once[0] - expected).max() > 0.1
    np.testing.assert_allclose(once.mean(0), expected, atol=5 * np.asarray(once).std(0).max() / np.sqrt(3000))


def test_rotary_positions():
    x = np.random.default_rng(2).normal(size=(1, 6, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 50, 1000]], np.int32)
    found = np.asarray(rotate(x, positions, 10000.0))
    # Pairs (i, i + 4) are complex numbers that turn by position / theta^(2i / 8).
    pairs = x[..., :4].astype(np.float64) + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * 10000.0 ** (-2 * np.arange(4) / 8))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-4)
    np.testing.assert_array_equal(found[:, 0], x[:, 0])


KINDS = {"original": {}, "modern": MODERN, "rmsnorm": {**MODERN, "norm": "rmsnorm", "activation": "silu"}}


@pytest.fixture(scope="module", params=KINDS)
def encode(request):
    """A random encoder as a function of a batch."""
    config = BertConfig(layers=2, width=32, heads=4, mlp_width=64, max_length=32, **KINDS[request.param])
    encoder = BertEncoder(config, 120)
    tokens = np.zeros((1, 4), np.int32)
    batch = {"tokens": tokens, "segment_ids": tokens, "positions": tokens}
    variables = unbox(jax.jit(lambda: encoder.init(jax.random.key(0), batch, deterministic=True))())
    # Far larger than fresh ones, so that attention is not almost even.
    variables = jax.tree.map(lambda array: array * (8.0 if array.ndim > 1 else 1.0), variables)
    run = jax.jit(lambda batch: encoder.apply(variables, batch, deterministic=True))
    return lambda batch: np.asarray(run({name: batch[name] for name in ("tokens", "segment_ids", "positions")}))


def test_packed_documents_are_as_if_alone(encode, packed_rows):
    batch = packed_rows(6, 30, seed=3)
    packed, compared = encode(batch), 0
    for row in range(6):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            # Alone at the start of a row of the same length, so that one compilation serves all.
            alone = {name: np.zeros((6, 30), np.int32) for name in ("tokens", "segment_ids", "positions")}
            for name in alone:
                alone[name][0, : inside.sum()] = 1 if name == "segment_ids" else batch[name][row, inside]
            np.testing.assert_allclose(encode(alone)[0, : inside.sum()], packed[row, inside], atol=2e-5)
            compared += 1
    assert compared > 8


def test_padding_and_other_documents_do_not_leak(encode, packed_rows):
    batch = packed_rows(6, 30, seed=4)
    before = encode(batch)
    changed = {name: array.copy() for name, array in batch.items()}
    first = batch["segment_ids"] == 1
    changed["tokens"][~first] = 77
    changed["positions"][~first] = 5
    np.testing.assert_allclose(encode(changed)[first], before[first], atol=2e-5)
    assert np.isfinite(encode(changed)).all()
    # The check has teeth: within the document every token reaches every other.
    changed["tokens"][:, 1] += 1
    assert np.abs(encode(changed) - before)[:, 0].max(axis=-1).min() > 1e-3

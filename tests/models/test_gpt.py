"""GPT: causal within documents, initialised as GPT-2, and generating with a cache what it generates without."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.models.generation import Sampling, draw, generate, right_aligned
from sslx.models.gpt import MODERN, SIZES, GptConfig
from sslx.train.sharding import unbox

SIZE = dict(layers=2, width=32, heads=4, mlp_width=64, max_length=40, dropout=0.0, attention_dropout=0.0)
KINDS = {"gpt2": GptConfig(**SIZE), "modern": GptConfig(**SIZE, **MODERN)}
VOCABULARY = 50


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    config = KINDS[request.param]
    ids = jnp.zeros((1, 4), jnp.int32)
    batch = {"tokens": ids, "segment_ids": ids + 1, "positions": jnp.arange(4)[None]}
    fresh = unbox(config.encoder(VOCABULARY).init(jax.random.key(0), batch, deterministic=True))["params"]
    return config, jax.tree.map(lambda array: array * 4.0, fresh)  # far from even guesses


def hidden(config, params, tokens, segments=None, positions=None):
    tokens = jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    batch = {"tokens": tokens, "segment_ids": segments, "positions": jnp.asarray(positions)}
    return np.asarray(applied(config, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def applied(config, params, batch):
    return config.encoder(VOCABULARY).apply({"params": params}, batch, deterministic=True)


def test_a_token_sees_nothing_after_it_and_everything_before(model):
    config, params = model
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 10))
    before = hidden(config, params, tokens)
    for changed in range(10):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        moved = np.abs(hidden(config, params, other) - before).max(axis=-1)[0]
        assert (moved[:changed] == 0).all()
        assert (moved[changed:] > 0).all()


def test_packed_documents_are_as_if_alone(model):
    config, params = model
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, VOCABULARY, (1, 6)), rng.integers(0, VOCABULARY, (1, 4))
    packed = np.concatenate([one, two, np.zeros((1, 2), int)], axis=1)
    segments, positions = [[1] * 6 + [2] * 4 + [0] * 2], [[*range(6), *range(4), 0, 0]]
    found = hidden(config, params, packed, segments, positions)
    np.testing.assert_allclose(found[:, :6], hidden(config, params, one), atol=2e-5)
    np.testing.assert_allclose(found[:, 6:10], hidden(config, params, two), atol=2e-5)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 7, 4]])
def test_greedy_generation_with_the_cache_is_that_without(model, lengths):
    config, params = model
    prompts = np.random.default_rng(2).integers(1, VOCABULARY, (3, 7))
    found = generate(
        config,
        VOCABULARY,
        params,
        right_aligned(prompts, jnp.asarray(lengths), 7),
        jax.random.split(jax.random.key(0), 3),
        new_tokens=12,
        sampling=Sampling(temperature=0.0),
        end_id=0,
        forbidden=(3,),
    )
    for row, length in enumerate(lengths):
        tokens, ended = prompts[row, :length].tolist(), False
        for step in range(12):
            whole = [
                tokens + [0] * (19 - len(tokens))
            ]  # the model sees nothing after a token; one length compiles once
            last = hidden(config, params, whole)[0, len(tokens) - 1]
            logits = last @ np.asarray(params["embeddings"]["word"]).T[:, :VOCABULARY]
            logits[3] = -np.inf
            tokens.append(0 if ended else int(logits.argmax()))
            ended |= tokens[-1] == 0
            assert int(found[row, step]) == tokens[-1]


def test_a_rows_samples_do_not_depend_on_the_other_rows(model):
    config, params = model
    prompts = np.random.default_rng(3).integers(1, VOCABULARY, (4, 5))
    keys = jax.random.split(jax.random.key(7), 4)

    def run(rows):
        aligned = right_aligned(prompts[rows], jnp.full(len(rows), 5), 5)
        options = dict(new_tokens=8, sampling=Sampling(temperature=1.0), end_id=0)
        return np.asarray(generate(config, VOCABULARY, params, aligned, keys[np.array(rows)], **options))

    together = run([0, 1, 2, 3])
    np.testing.assert_array_equal(together[[2, 0]], run([2, 0]))
    assert len({tuple(row) for row in together}) == 4


def test_drawing_follows_the_truncated_distribution():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def shares(sampling):
        tokens = jax.vmap(lambda key: draw(logits, key[None], sampling)[0])(keys)
        return np.bincount(np.asarray(tokens), minlength=4) / len(keys)

    for sampling, expected in (
        (Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 alone does not reach 0.6
        (Sampling(top_p=0.05), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.01]) / 0.3),
        (Sampling(temperature=0.0), [1, 0, 0, 0]),
    ):
        found = shares(sampling)
        np.testing.assert_allclose(found, expected, atol=0.015)
        assert ((found > 0) == (np.asarray(expected) > 0)).all()


def test_published_sizes_and_initialisation():
    config = GptConfig(**SIZES["small"])
    row = {name: jnp.zeros((1, 8), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    init = lambda key: unbox(config.encoder(50257).init(key, row, deterministic=True))["params"]  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    padding = (50304 - 50257) * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) - padding == 124_439_808  # openai-community/gpt2

    config = dataclasses.replace(config, layers=8, width=128, heads=4, mlp_width=512)
    layers = jax.device_get(init(jax.random.key(0)))["transformer"]["layers"]
    assert np.std(layers["attention"]["query"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(layers["attention"]["out"]["kernel"]) == pytest.approx(0.02 / 4, rel=0.02)
    assert np.std(layers["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / 4, rel=0.02)


def test_sampling_that_cannot_be():
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            Sampling(**options)

"""Masked language modelling: its terms against NumPy, evaluation masks, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sslx.models.bert import BertConfig
from sslx.objective import Mean
from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_train_step

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=32, dropout=0.0, attention_dropout=0.0)


def log_softmax(logits):
    shifted = np.float64(logits) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def objective(vocabulary):
    return MaskedLanguageModel(MaskedLanguageModelConfig(sentence="sop"), MODEL, vocabulary, None)


@pytest.fixture(scope="module")
def viewed(objective, packed_rows):
    batch = packed_rows(16, 32, paired=True)
    return jax.jit(lambda b: objective.views(b, jax.random.key(1), jnp.int32(0), train=True))(batch)


@pytest.fixture(scope="module")
def params(objective, viewed):
    fresh = unbox(jax.jit(lambda: objective.init(jax.random.key(0), viewed))())["params"]
    return jax.tree.map(lambda array: array * 5.0, fresh)  # far from even guesses


def test_the_terms_are_cross_entropies_of_the_logits(objective, params, viewed):
    out = objective.loss(params, {}, viewed, jax.random.key(2), jnp.int32(0), train=True)
    logits, sentence = objective.module.apply({"params": params}, viewed, deterministic=True)
    tokens = log_softmax(np.asarray(logits)[..., : objective.vocabulary.size])
    weights, targets = np.asarray(viewed["weights"]["mlm"]), np.asarray(viewed["targets"])
    chosen = np.take_along_axis(tokens, targets[..., None], -1)[..., 0]
    assert set(out.terms) == set(viewed["weights"]) == {"mlm", "sentence"}
    assert out.terms["mlm"].sum == pytest.approx(-(weights * chosen).sum(), rel=1e-5)
    hits = weights * (np.asarray(logits).argmax(-1) == targets)
    assert out.metrics["accuracy"] == Mean(hits.sum(), weights.sum())

    labels = np.asarray(viewed["sentence_label"])
    assert viewed["weights"]["sentence"].tolist() == [1.0] * 16
    pairs = log_softmax(np.asarray(sentence))[np.arange(16), labels]
    assert out.terms["sentence"].sum == pytest.approx(-pairs.sum(), rel=1e-5)
    assert out.metrics["sentence_accuracy"].sum == (np.asarray(sentence).argmax(-1) == labels).sum()
    assert [term.coef for term in out.terms.values()] == [1.0, 1.0]


def test_without_a_sentence_loss_there_is_one_term(vocabulary, packed_rows):
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(), MODEL, vocabulary, None)
    batch = packed_rows(2, 32)

    def terms():
        viewed = objective.views(batch, jax.random.key(0), 0, train=True)
        params = unbox(objective.init(jax.random.key(0), viewed))["params"]
        assert not {"pooler", "sentence_head"} & set(params)
        return objective.loss(params, {}, viewed, jax.random.key(0), 0, train=False).terms

    assert set(jax.eval_shape(terms)) == {"mlm"}


def test_evaluation_masks_15_percent_whatever_training_does_and_whatever_the_step(vocabulary, packed_rows):
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(mask_ratio=0.4), MODEL, vocabulary, None)
    batch = packed_rows(8, 32)
    views = [objective.views(batch, jax.random.key(0), jnp.int32(step), train=False) for step in (0, 7)]
    jax.tree.map(np.testing.assert_array_equal, *views)
    assert views[0]["picked"].shape == (8, round(0.15 * 32))
    assert objective.views(batch, jax.random.key(0), 0, train=True)["picked"].shape == (8, round(0.4 * 32))


def test_chance_is_the_entropy_of_what_is_guessed(objective):
    assert objective.chance({"unigram_entropy": 5.0}) == pytest.approx(5.0 + math.log(2))
    alone = dataclasses.replace(objective, pretext=MaskedLanguageModelConfig())
    assert alone.chance({"unigram_entropy": 5.0}) == 5.0
    assert alone.chance({}) is None
    assert alone.derive({"loss": 2.0}) == {"perplexity": pytest.approx(math.exp(2))}
    assert objective.derive({"loss": 3.0, "mlm": 2.0}) == {"perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(alone.derive({"loss": 1e6})["perplexity"])


def test_features_are_means_over_tokens_of_the_encoder_alone(objective, params, packed_rows):
    batch = packed_rows(4, 32, paired=True)
    variables = objective.encoder(params, {})
    features = np.asarray(objective.encode(variables, batch))
    assert features.shape == (4, 32)
    assert features.dtype == np.float32
    batch["tokens"][batch["segment_ids"] == 0] = 77  # padding does not count
    np.testing.assert_allclose(objective.encode(variables, batch), features, atol=1e-5)


def test_a_tiny_model_memorises_a_tiny_corpus(vocabulary):
    # Four rows, each of its own random tokens: the hidden ones follow from the row and the position.
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 120, (4, 32)).astype(np.int32)
    batch = {
        "tokens": np.tile(tokens, (8, 1)),
        "segment_ids": np.ones((32, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (32, 1)),
        "row": np.arange(32, dtype=np.int32),
    }
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(), MODEL, vocabulary, None)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 400))
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(0.0), seed=0), donate_argnums=0)
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
    losses = []
    for _ in range(400):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    assert float(losses[0]) == pytest.approx(math.log(120), abs=0.5)
    assert np.mean(losses[-20:]) < 0.3

"""BERT against Hugging Face's PyTorch, number by number, and what must not change its numbers.

``tests/goldens/record_hf.py`` recorded ``bert_tiny.npz``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx.models.bert import MODERN, SIZES, BertConfig, BertEncoder
from sslx.models.layers import padded_vocabulary
from sslx.pretext.mlm import BertForPretraining
from sslx.train.sharding import unbox

GOLDEN = Path(__file__).parent.parent / "goldens" / "bert_tiny.npz"
CONFIG = BertConfig(layers=2, width=32, heads=4, mlp_width=64, max_length=40, dropout=0.0, attention_dropout=0.0)
VOCABULARY = 120

# Ours to Hugging Face's. A kernel [in, out] is their weight [out, in]; ``{}`` is the layer that we stack.
DENSE = {"kernel": "weight", "bias": "bias"}
NORM = {"scale": "LayerNorm.weight", "bias": "LayerNorm.bias"}
NAMES = {
    "encoder/embeddings/word": "bert.embeddings.word_embeddings.weight",
    "encoder/embeddings/position": "bert.embeddings.position_embeddings.weight",
    "encoder/embeddings/token_type": "bert.embeddings.token_type_embeddings.weight",
    "mlm_head/bias": "cls.predictions.bias",
}
MODULES = {
    "encoder/embeddings/norm": ("bert.embeddings", NORM),
    "encoder/transformer/layers/attention/query": ("bert.encoder.layer.{}.attention.self.query", DENSE),
    "encoder/transformer/layers/attention/key": ("bert.encoder.layer.{}.attention.self.key", DENSE),
    "encoder/transformer/layers/attention/value": ("bert.encoder.layer.{}.attention.self.value", DENSE),
    "encoder/transformer/layers/attention/out": ("bert.encoder.layer.{}.attention.output.dense", DENSE),
    "encoder/transformer/layers/attention_norm": ("bert.encoder.layer.{}.attention.output", NORM),
    "encoder/transformer/layers/mlp/up": ("bert.encoder.layer.{}.intermediate.dense", DENSE),
    "encoder/transformer/layers/mlp/down": ("bert.encoder.layer.{}.output.dense", DENSE),
    "encoder/transformer/layers/mlp_norm": ("bert.encoder.layer.{}.output", NORM),
    "mlm_head/transform": ("cls.predictions.transform.dense", DENSE),
    "mlm_head/norm": ("cls.predictions.transform", NORM),
    "pooler/dense": ("bert.pooler.dense", DENSE),
    "sentence_head": ("cls.seq_relationship", DENSE),
}
for ours, (theirs, parts) in MODULES.items():
    NAMES |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in parts.items()}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def params(golden):
    """Hugging Face's weights under our names."""
    weights = {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
    layers = range(CONFIG.layers)
    found, used = {}, set()
    for ours, theirs in NAMES.items():
        sources = [theirs.format(layer) for layer in layers] if "{}" in theirs else [theirs]
        arrays = [weights[name].T if ours.endswith("kernel") else weights[name] for name in sources]
        found[ours] = np.stack(arrays) if "{}" in theirs else arrays[0]
        used |= set(sources)
    assert used == set(weights)
    padding = padded_vocabulary(VOCABULARY) - VOCABULARY
    for name in ("encoder/embeddings/word", "mlm_head/bias"):
        found[name] = np.pad(found[name], [(0, padding)] + [(0, 0)] * (found[name].ndim - 1), constant_values=9.0)
    return unflatten_dict(found, sep="/")


@pytest.fixture(scope="module")
def batch(golden):
    rows, length = golden["input_ids"].shape
    return {
        "tokens": golden["input_ids"],
        "segment_ids": golden["attention_mask"],
        "token_types": golden["token_type_ids"],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "picked": np.array([[1, 5, 23], [0, 2, 16], [8, 7, 0], [1, 0, 1]], np.int32),
    }


def pretraining(**changes):
    return BertForPretraining(dataclasses.replace(CONFIG, **changes), VOCABULARY, sentence=True)


def test_our_parameters_are_theirs(params, batch):
    ours = unbox(jax.eval_shape(lambda: pretraining().init(jax.random.key(0), batch, deterministic=True)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, ours)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_hidden_states_are_those_of_hugging_face(golden, params, batch, layers):
    config, encoder = dataclasses.replace(CONFIG, layers=max(layers, 1)), params["encoder"]
    if layers:
        stack = jax.tree.map(lambda array: array[:layers], encoder["transformer"])
        found = BertEncoder(config, VOCABULARY).apply(
            {"params": encoder | {"transformer": stack}}, batch, deterministic=True
        )
    else:
        embed = lambda encoder: encoder.embeddings(  # noqa: E731
            batch["tokens"], batch["token_types"], batch["positions"], deterministic=True
        )
        found = BertEncoder(config, VOCABULARY).apply({"params": encoder}, method=embed)
    real = golden["attention_mask"] > 0
    assert np.abs(np.asarray(found) - golden[f"hidden/{layers}"])[real].max() < 1e-5


def test_logits_are_those_of_hugging_face(golden, params, batch):
    logits, sentence = pretraining().apply({"params": params}, batch, deterministic=True)
    expected = np.take_along_axis(golden["mlm_logits"], batch["picked"][..., None], axis=1)
    assert np.abs(np.asarray(logits)[..., :VOCABULARY] - expected).max() < 1e-5
    assert np.abs(np.asarray(sentence) - golden["nsp_logits"]).max() < 1e-5


def test_picked_positions_are_those_of_the_whole_row(params, batch):
    encoder = BertEncoder(CONFIG, VOCABULARY)
    whole = np.asarray(encoder.apply({"params": params["encoder"]}, batch, deterministic=True))
    picked = encoder.apply({"params": params["encoder"]}, batch, batch["picked"], deterministic=True)
    expected = np.take_along_axis(whole, batch["picked"][..., None], axis=1)
    np.testing.assert_allclose(picked, expected, atol=2e-6)


def test_the_padded_vocabulary_takes_no_probability_and_no_gradient(params, batch):
    def loss(params):
        logits, _ = pretraining().apply({"params": params}, batch, deterministic=True)
        log_probabilities = jax.nn.log_softmax(logits)
        return -log_probabilities[..., 7].sum(), jnp.exp(log_probabilities)

    gradients, probabilities = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (np.asarray(probabilities)[..., VOCABULARY:] == 0).all()
    np.testing.assert_allclose(np.asarray(probabilities)[..., :VOCABULARY].sum(-1), 1, atol=1e-5)
    assert not np.asarray(gradients["encoder"]["embeddings"]["word"])[VOCABULARY:].any()
    assert not np.asarray(gradients["mlm_head"]["bias"])[VOCABULARY:].any()
    # The table is tied: tokens that are in no row still get a gradient, through the head.
    unseen = np.setdiff1d(np.arange(VOCABULARY), batch["tokens"])
    assert np.abs(gradients["encoder"]["embeddings"]["word"])[unseen].max(axis=1).min() > 0


def loss_and_gradients(batch, **changes):
    """Of a made-up loss over everything the model returns, as a function of the parameters."""
    model = pretraining(**changes)

    def loss(params):
        rngs = {"dropout": jax.random.key(3)}
        logits, sentence = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        return jnp.sum(jnp.sin(logits[..., :VOCABULARY])) + jnp.sum(jnp.cos(sentence))

    return jax.jit(jax.value_and_grad(loss))


DROPOUT = dict(dropout=0.2, attention_dropout=0.2)


@pytest.fixture(scope="module")
def unrolled(params, batch):
    return jax.device_get(loss_and_gradients(batch, unroll=True, **DROPOUT)(params))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanning_and_rematerialisation_change_nothing(params, batch, unrolled, remat):
    found = jax.device_get(loss_and_gradients(batch, unroll=False, remat=remat, **DROPOUT)(params))
    for path, expected in jax.tree_util.tree_leaves_with_path(unrolled):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(other, expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_bfloat16_computes_near_float32_and_keeps_its_parameters_float32(params, batch):
    model = pretraining(dtype="bfloat16")
    initial = unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True)))
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    logits, sentence = model.apply({"params": params}, batch, deterministic=True)
    expected, expected_sentence = pretraining().apply({"params": params}, batch, deterministic=True)
    assert logits.dtype == sentence.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(logits) - expected)[..., :VOCABULARY].max() < 0.15
    assert 0 < np.abs(np.asarray(sentence) - expected_sentence).max() < 0.15
    _, gradients = jax.eval_shape(loss_and_gradients(batch, dtype="bfloat16"), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


# Hugging Face's ``BertForPreTraining`` with 30,522 tokens and 512 positions.
PUBLISHED = {"tiny": 4_433_468, "mini": 11_267_900, "small": 29_058_876, "base": 110_106_428, "large": 336_226_108}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(batch, size):
    config = BertConfig(**SIZES[size])
    model = BertForPretraining(config, 30522, sentence=True)
    shapes = unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True)))["params"]
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    padding = (padded_vocabulary(30522) - 30522) * (config.width + 1)
    assert found - padding == PUBLISHED[size]


def test_the_modern_variant_has_no_biases_and_no_positions(batch):
    encoder = BertEncoder(dataclasses.replace(CONFIG, **MODERN), VOCABULARY)
    params = unbox(jax.eval_shape(lambda: encoder.init(jax.random.key(0), batch, deterministic=True)))
    names = set(flatten_dict(params["params"], sep="/"))
    assert not [name for name in names if name.endswith("bias")]
    assert "embeddings/position" not in names
    assert {"transformer/layers/mlp/gate/kernel", "transformer/final_norm/scale"} <= names

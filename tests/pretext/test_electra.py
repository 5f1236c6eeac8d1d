"""Replaced-token detection: terms and metrics against NumPy, the samples, where gradients go, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_step import MESHES, assert_close, one_step

from sslx.errors import UserError
from sslx.models.bert import MODERN, BertConfig
from sslx.pretext.electra import Electra, ElectraConfig, fill_in, generator_of, sample
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, finish_means, make_eval_step, make_train_step

SIZE = dict(layers=2, width=32, heads=4, mlp_width=64, max_length=32, embed_width=16)


@pytest.fixture(scope="module")
def make_objective(vocabulary):
    def make(dropout: float = 0.0, **pretext) -> Electra:
        model = BertConfig(**SIZE, dropout=dropout, attention_dropout=dropout, unroll=False)
        return Electra(ElectraConfig(**{"mask_ratio": 0.3} | pretext), model, vocabulary, None)

    return make


@pytest.fixture(scope="module")
def objective(make_objective):
    return make_objective()


@pytest.fixture(scope="module")
def batch(packed_rows):
    return packed_rows(32, 24)


@pytest.fixture(scope="module")
def viewed(objective, batch):
    return jax.jit(lambda b: objective.views(b, jax.random.key(1), jnp.int32(0), train=True))(batch)


@pytest.fixture(scope="module")
def variables(objective, batch):
    """Boxed variables, on the host, far from even guesses."""
    fresh = jax.jit(lambda: objective.init(jax.random.key(0), batch))()

    def enlarged(path, array):
        wide = any(name in jax.tree_util.keystr(path) for name in ("project", "out'"))  # Glorot's, already large
        return array * (1.0 if wide and array.ndim == 2 else 5.0)

    return jax.device_get(jax.tree_util.tree_map_with_path(enlarged, fresh))


@pytest.fixture(scope="module")
def params(variables):
    return unbox(variables)["params"]


def log_softmax(logits):
    shifted = np.float64(logits) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_terms_and_metrics_are_those_of_numpy(objective, params, viewed):
    out = jax.jit(lambda: objective.loss(params, {}, viewed, jax.random.key(2), jnp.int32(0), train=True))()
    module, host = objective.module, jax.device_get(viewed)
    real, filled = host["segment_ids"] > 0, host["weights"]["mlm"] > 0
    assert 0 < filled.sum() < filled.size
    call = jax.jit(
        lambda batch, method: module.apply({"params": params}, batch, deterministic=True, method=method),
        static_argnums=1,
    )
    logits = np.asarray(call(viewed, "generate"))
    chosen = np.take_along_axis(log_softmax(logits[..., :120]), host["targets"][..., None], -1)[..., 0]
    assert out.terms["mlm"].sum == pytest.approx(-chosen[filled].sum(), rel=1e-5)
    assert out.metrics["mlm_accuracy"].sum == (logits.argmax(-1) == host["targets"])[filled].sum()
    assert out.metrics["mlm_accuracy"].weight == filled.sum()

    # Rows with the samples in them, made place by place.
    sampled = np.asarray(sample(jnp.asarray(logits), viewed["draw"]))
    tokens = host["tokens"].copy()
    for row, place in np.argwhere(filled):
        tokens[row, host["picked"][row, place]] = sampled[row, place]
    replaced = (tokens != host["tokens"])[real]
    assert 0 < replaced.sum() < filled.sum()  # some are guessed right, and count as original
    verdict = call(viewed | {"tokens": tokens}, "discriminate")
    verdict = np.float64(verdict)[real]
    chance = 1 / (1 + np.exp(-verdict))
    loss = -np.where(replaced, np.log(chance), np.log1p(-chance)).sum()
    assert out.terms["discriminator"].sum == pytest.approx(loss, rel=1e-5)
    assert {name: term.coef for name, term in out.terms.items()} == {"mlm": 1.0, "discriminator": 50.0}
    assert set(out.terms) == set(viewed["weights"])
    assert viewed["weights"]["discriminator"].sum() == real.sum()

    said = verdict > 0
    assert 0 < said.sum() < real.sum()
    found = {name: (float(mean.sum), float(mean.weight)) for name, mean in out.metrics.items()}
    assert found["accuracy"] == ((said == replaced).sum(), real.sum())
    assert found["precision"] == ((said & replaced).sum(), said.sum())
    assert found["recall"] == ((said & replaced).sum(), replaced.sum())
    assert found["replaced"] == (replaced.sum(), real.sum())


def test_a_sample_that_equals_the_original_is_original(objective, params, viewed):
    # A bias that outweighs everything: the generator says 7 wherever it is asked.
    params = jax.tree.map(lambda array: array, params)
    params["generator"]["mlm_head"]["bias"] = jnp.zeros(128).at[7].set(1e4)
    targets = viewed["targets"].at[:, 0].set(7)
    put = jax.vmap(lambda row, at: row.at[at].set(7))
    batch = viewed | {"targets": targets, "tokens": put(viewed["tokens"], viewed["picked"][:, 0])}
    out = jax.jit(lambda: objective.loss(params, {}, batch, jax.random.key(2), jnp.int32(0), train=True))()
    host = jax.device_get(batch)
    changed = (host["weights"]["mlm"] > 0) & (host["targets"] != 7)
    assert (~changed).sum() >= 32
    assert out.metrics["replaced"].sum == changed.sum()
    tokens = np.asarray(fill_in(batch, jnp.full_like(targets, 7)))
    places = {(row, host["picked"][row, at]) for row, at in np.argwhere(changed)}
    assert set(map(tuple, np.argwhere(tokens != host["tokens"]))) == places


def test_samples_follow_the_generators_distribution():
    logits = np.array([[2.0, 0.0, -1.0, 1.0, 0.5, -1e9], [0.0, 3.0, 0.0, 0.0, 0.0, -1e9]], np.float32)
    rows = 20_000
    draw = jax.random.key_data(jax.random.split(jax.random.key(3), rows))
    found = np.asarray(sample(jnp.broadcast_to(logits, (rows, 2, 6)), draw))
    for place in range(2):
        counts, expected = np.bincount(found[:, place], minlength=6), rows * np.exp(log_softmax(logits[place]))
        assert counts[5] == 0
        # Chi-squared with 4 degrees of freedom: 99.99 % are below 23.5.
        assert ((counts - expected)[:5] ** 2 / expected[:5]).sum() < 23.5
    # The two places are drawn apart: the second is as likely whatever the first is.
    share = np.exp(log_softmax(logits[1]))[1]
    assert np.mean(found[found[:, 0] == 0, 1] == 1) == pytest.approx(share, abs=0.02)


def test_a_row_is_sampled_alike_in_any_batch_and_otherwise_at_another_step(objective, batch, viewed):
    some = np.array([5, 1, 30])
    draw = jax.jit(lambda batch, key: objective.views(batch, key, jnp.int32(0), train=True))
    part = draw({name: array[some] for name, array in batch.items()}, jax.random.key(1))
    np.testing.assert_array_equal(part["draw"], np.asarray(viewed["draw"])[some])
    np.testing.assert_array_equal(part["masked"], np.asarray(viewed["masked"])[some])
    other = draw(batch, jax.random.key(2))
    assert (np.asarray(other["draw"]) != np.asarray(viewed["draw"])).any(axis=1).all()


def test_each_player_gets_the_gradient_of_its_own_term_and_both_move_the_embeddings(objective, params, viewed):
    def term(name):
        out = lambda p: objective.loss(p, {}, viewed, jax.random.key(2), jnp.int32(0), train=True)  # noqa: E731
        return jax.jit(jax.grad(lambda p: out(p).terms[name].sum))(params)

    def moved(tree):
        return {name: bool(np.abs(leaf).max() > 0) for name, leaf in flat(tree).items()}

    def flat(tree):
        return {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    shared = {name for name in flat(params) if name.startswith("encoder/embeddings/") and "project" not in name}
    assert {"encoder/embeddings/word", "encoder/embeddings/norm/scale", "encoder/embeddings/position"} <= shared
    by_generator, by_discriminator = moved(term("mlm")), moved(term("discriminator"))
    for name in flat(params):
        if name.endswith("attention/key/bias"):  # 0 but for rounding: softmax ignores what it adds
            continue
        assert by_generator[name] == (name in shared or name.startswith("generator/")), name
        assert by_discriminator[name] == (not name.startswith("generator/")), name


def test_one_device_and_eight_give_the_same_loss_and_gradients_with_dropout(make_objective, variables, batch):
    objective = make_objective(dropout=0.1)
    after, metrics = one_step(objective, variables, batch)
    eight_after, eight_metrics = one_step(objective, variables, batch, MESHES["all"], 8)
    assert {"loss", "mlm", "discriminator", "mlm_accuracy", "accuracy", "precision", "recall", "replaced"} < set(
        metrics
    )
    assert_close(metrics, eight_metrics)
    assert_close(after.opt_state, eight_after.opt_state)


def test_accumulation_equals_the_full_batch_samples_included(objective, variables, batch):
    after, metrics = one_step(objective, variables, batch)
    split_after, split_metrics = one_step(objective, variables, batch, MESHES["data"], 8, micro_batches=4)
    assert_close(metrics, split_metrics)
    assert_close(after.opt_state, split_after.opt_state)


def test_a_collapsed_discriminator_gains_nothing_and_finds_nothing(objective, params, batch):
    evaluate = jax.jit(make_eval_step(objective, seed=0))
    valid = (np.arange(32) < 29).astype(np.float32)

    def answers(logit):
        head = {"kernel": jnp.zeros((32, 1)), "bias": jnp.full(1, logit)}
        given = params | {"discriminator_head": params["discriminator_head"] | {"out": head}}
        found = finish_means(evaluate(given, {}, batch | {"valid": valid}))
        return found | objective.derive(found)

    share = answers(0.0)["replaced"]
    found = answers(math.log(share / (1 - share)))  # the best of all constant answers
    assert found["discriminator"] == pytest.approx(entropy(share), rel=1e-5)
    assert found["discriminator_gain"] == pytest.approx(0.0, abs=1e-6)
    assert found["recall"] == found["precision"] == 0.0
    assert found["accuracy"] == pytest.approx(1 - share, rel=1e-5)
    assert answers(-3.0)["discriminator_gain"] < -0.01
    assert found["perplexity"] == pytest.approx(math.exp(found["mlm"]))


def test_chance_is_both_players_guessing(objective):
    # All tokens equally frequent: the bound on how often two draws agree is exact.
    expected = math.log(1000) + 50 * entropy(0.15 * (1 - 1 / 1000))
    assert objective.chance({"unigram_entropy": math.log(1000)}) == pytest.approx(expected)
    assert objective.chance({}) is None


def test_the_encoder_is_the_discriminator_and_features_are_means_over_its_tokens(objective, params, batch):
    variables = objective.encoder(params, {})
    assert variables["params"] is params["encoder"]
    features = np.asarray(jax.jit(objective.encode)(variables, batch))
    encoder = objective.model.encoder(120)
    states = np.asarray(jax.jit(lambda: encoder.apply(variables, batch, deterministic=True))())
    real = batch["segment_ids"] > 0
    means = np.stack([row[there].mean(axis=0) for row, there in zip(states, real, strict=True)])
    np.testing.assert_allclose(features, means, atol=1e-5)


def test_generators_have_their_published_shapes():
    shapes = {
        "small": (BertConfig(layers=12, width=256, heads=4, mlp_width=1024, embed_width=128), 1 / 4, (64, 1, 256, 128)),
        "base": (BertConfig(layers=12, width=768, heads=12, mlp_width=3072), 1 / 3, (256, 4, 1024, 768)),
        "large": (BertConfig(layers=24, width=1024, heads=16, mlp_width=4096), 1 / 4, (256, 4, 1024, 1024)),
    }
    for model, share, expected in shapes.values():
        found = generator_of(model, share)
        assert (found.width, found.heads, found.mlp_width, found.table_width) == expected
        assert found.layers == model.layers


def test_flops_count_both_players(objective):
    length, picked, rows = 24, 7, 4

    def stack(width, mlp, queries):  # two layers, the last for some queries only
        per = lambda q: 4 * length * width**2 + 4 * q * width**2 + 4 * q * length * width + 4 * q * width * mlp  # noqa: E731
        return per(length) + per(queries)

    discriminator = 2 * length * 16 * 32 + stack(32, 64, length) + 2 * length * 32 * 32 + 2 * length * 32
    generator = 2 * length * 16 * 8 + stack(8, 16, picked) + 2 * picked * 8 * 16 + 2 * picked * 16 * 128
    assert objective.flops({"tokens": (rows, length)}) == 3 * rows * (discriminator + generator)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"generator_width is 0.*expected a share above 0"):
        ElectraConfig(generator_width=0.0)
    with pytest.raises(UserError, match=r"mask_ratio is 1.5; expected a share"):
        ElectraConfig(mask_ratio=1.5)
    with pytest.raises(UserError, match=r"discriminator_weight is -1"):
        ElectraConfig(discriminator_weight=-1.0)
    with pytest.raises(UserError, match=r"generator_width 0.25 of config.model.width 36 is 9; expected an even width"):
        generator_of(BertConfig(layers=1, width=36, heads=2, mlp_width=8, **MODERN), 0.25)


def test_the_discriminator_learns_what_a_guessing_generator_replaces(make_objective):
    # A row says one token over and over: a false one stands out, and a generator of width 2 cannot copy.
    tokens = np.repeat(np.random.default_rng(0).integers(5, 45, (32, 1)), 24, axis=1).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones((32, 24), np.int32),
        "positions": np.tile(np.arange(24, dtype=np.int32), (32, 1)),
        "row": np.arange(32, dtype=np.int32),
    }
    objective = make_objective(generator_width=1 / 16, mask_ratio=0.15)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 50, 600))
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(0.0), seed=0), donate_argnums=0)
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
    history = []
    for _ in range(260):
        state, metrics = step(state, batch)
        history.append(metrics)
    last = {name: np.mean([metrics[name] for metrics in history[-20:]]) for name in history[0]}
    assert float(history[0]["mlm"]) == pytest.approx(math.log(120), abs=0.3)
    assert last["mlm"] < 3.5  # ln 32 and less: which tokens there are
    assert last["replaced"] > 0.1
    assert last["discriminator"] < 0.2 * entropy(last["replaced"])
    assert last["recall"] > 0.9
    assert last["precision"] > 0.9


def test_preview_shows_what_the_generator_sees(objective, batch, viewed):
    @dataclasses.dataclass
    class Spelled:
        def convert_ids_to_tokens(self, ids):
            return [f"t{token}" for token in ids]

    shown = dataclasses.replace(objective, tokenizer=Spelled()).preview(batch, jax.device_get(viewed))
    assert len(shown) == 32
    row, host = shown[0], jax.device_get(viewed)
    picked = host["picked"][0][host["weights"]["mlm"][0] > 0]
    assert row["text"].count("<-") == len(picked)
    seen, was = host["masked"][0, picked[0]], batch["tokens"][0, picked[0]]
    assert f"[t{seen} <- t{was}]" in row["text"]

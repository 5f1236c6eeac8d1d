"""Sentence embeddings: the loss against NumPy, negatives of the whole batch on any mesh, evaluation's own numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from sslx import finetune
from sslx.data.sentences import NEGATIVE, PAIR, prepare_sentences
from sslx.data.text import TextConfig
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.models.contrast import info_nce
from sslx.tasks.sentence_embedding import (
    SentenceEmbedding,
    SentenceEmbeddingConfig,
    spearman,
)
from sslx.train.sharding import unbox
from sslx.train.step import eval_keys, finish_means, make_eval_step

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=32, dropout=0.1, attention_dropout=0.1)
NAMES = ("tokens", "segment_ids", "positions")


@pytest.fixture(scope="module")
def batch(packed_rows):
    """Sixteen rows with a pair and a hard negative each."""
    views = {"": 0, PAIR: 1, NEGATIVE: 2}
    rows = {p + n: packed_rows(16, 20, paired=True, seed=seed)[n] for p, seed in views.items() for n in NAMES}
    return rows | {"scored": np.zeros(16, np.int32), "row": np.arange(16, dtype=np.int32)}


def objective_with(vocabulary, scores=None, **task):
    task = SentenceEmbeddingConfig(**task)
    model = dataclasses.replace(MODEL, dropout=task.dropout, attention_dropout=task.dropout)
    return SentenceEmbedding(task, model, vocabulary.size, None, 16, scores)


def parameters(objective, batch):
    made = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    return jax.tree.map(lambda array: array * 5.0, made)


def reference(first, second, negatives, weights, temperature):
    """A loop over rows, in float64."""
    losses = []
    for i in range(len(first)):
        among = [(j, x) for j, x in enumerate(second) if weights[j]]
        among += [(None, x) for j, x in enumerate(negatives if negatives is not None else ()) if weights[j]]
        exponents = {n: math.exp(float(first[i] @ x) / temperature) for n, (_, x) in enumerate(among)}
        own = next((exponents[n] for n, (j, _) in enumerate(among) if j == i), None)
        losses.append(math.log(sum(exponents.values()) / own) if own else 0.0)
    return np.array(losses) * weights


def pooled_by_hand(x, view, pool):
    """The mean of a row's tokens, or its first or last one, in float64."""
    rows = [states[real] for states, real in zip(np.float64(x), view["segment_ids"] > 0, strict=True)]
    return np.stack([{"mean": row.mean(0), "first": row[0], "last": row[-1]}[pool] for row in rows])


@pytest.mark.parametrize("hard", [False, True])
def test_info_nce_is_a_cross_entropy_over_all_rows_with_weight(hard):
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    first, second, negatives = unit(rng.normal(size=(3, 6, 8)))
    second = unit(first + 0.5 * second)
    negatives = negatives if hard else None
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    given = (jnp.float32(x) if x is not None else None for x in (first, second, negatives))
    losses, hits = info_nce(*given, weights, 0.2)
    expected = reference(first, second, negatives, weights, 0.2)
    np.testing.assert_allclose(losses * weights, expected, rtol=1e-4, atol=1e-6)
    assert 0 < (hits * weights).sum() <= 4


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_the_loss_of_pairs_is_that_of_their_unit_vectors(vocabulary, batch, pool):
    objective = objective_with(vocabulary, pool=pool, dropout=0.0, pair_field="b", negative_field="c")
    params = parameters(objective, batch)
    encoder = objective.model.encoder(vocabulary.size)
    vectors = []
    for prefix in ("", PAIR, NEGATIVE):
        view = {name: batch[prefix + name] for name in NAMES}
        x = pooled_by_hand(encoder.apply({"params": params["encoder"]}, view, deterministic=True), view, pool)
        if pool == "first":  # the layer that only training has
            dense = jax.tree.map(np.float64, params["pooler"]["dense"])
            x = np.tanh(x @ dense["kernel"] + dense["bias"])
        vectors.append(x / np.linalg.norm(x, axis=-1, keepdims=True))
    viewed = objective.views(batch, jax.random.key(0), 0, train=True)
    out = objective.loss(params, {}, viewed, jax.random.key(1), jnp.int32(0), train=True)
    assert out.terms["contrast"].sum == pytest.approx(reference(*vectors, np.ones(16), 0.05).sum(), rel=2e-4)
    assert objective.chance({}) == pytest.approx(math.log(32))
    assert objective.chance({"eval_rows": 3}) < objective.chance({"eval_rows": 1000}) == objective.chance({})
    # What is left after training is the encoder alone.
    found = objective.encode(objective.encoder(params, {}), batch)
    own = {name: batch[name] for name in NAMES}
    expected = pooled_by_hand(encoder.apply({"params": params["encoder"]}, own, deterministic=True), own, pool)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class OnlyFirst(SentenceEmbedding):
    """No gradient through the second view."""

    stopped = PAIR

    def _embed(self, params, batch, prefix, key, **options):
        x = super()._embed(params, batch, prefix, key, **options)
        return jax.lax.stop_gradient(x) if prefix == self.stopped else x


class OnlySecond(OnlyFirst):
    """No gradient through the first view."""

    stopped = ""


def test_gradients_reach_both_views_of_a_sentence(vocabulary, batch, assert_close):
    objective = objective_with(vocabulary)
    params, key = parameters(objective, batch), jax.random.key(3)
    viewed = objective.views(batch, key, 0, train=True)
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}

    def gradient(made):
        def total(params):
            return made.loss(params, {}, viewed, key, jnp.int32(0), train=True).terms["contrast"].sum

        return jax.device_get(jax.jit(jax.grad(total))(params))

    whole, first, second = (gradient(kind(**fields)) for kind in (SentenceEmbedding, OnlyFirst, OnlySecond))
    for part in (first, second):
        assert np.abs(part["encoder"]["embeddings"]["word"]).max() > 1e-3
    assert_close(whole, jax.tree.map(np.add, first, second), share=1e-3)
    views = [
        objective._embed(params, viewed, prefix, k, projected=True, train=True)
        for prefix, k in zip(("", PAIR), jax.random.split(key), strict=True)
    ]
    assert np.abs(views[0] - views[1]).max() > 1e-2  # two masks


def test_eight_devices_have_the_negatives_of_one(vocabulary, batch, gradients_on, assert_close):
    objective = objective_with(vocabulary, pool="first", pair_field="b", negative_field="c")
    (metrics, gradients), (others, also) = (gradients_on(objective, batch, devices) for devices in (1, 8))
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert_close(gradients, also, share=2e-4)


def test_evaluation_compares_neither_padding_nor_scored_pairs(vocabulary, batch):
    objective = objective_with(vocabulary, dropout=0.3, pair_field="b")
    params = parameters(objective, batch)
    valid, scored = np.ones(16, np.float32), np.zeros(16, np.int32)
    valid[12:], scored[:4] = 0.0, np.arange(1, 5)
    evaluated = batch | {"valid": valid, "scored": scored}
    found = finish_means(jax.device_get(make_eval_step(objective, seed=0)(params, {}, evaluated)))
    kept = {name: array[4:12] for name, array in batch.items()}
    viewed = objective.views(kept, eval_keys(0)[0], 0, train=False)
    out = objective.loss(params, {}, viewed, eval_keys(0)[1], jnp.int32(0), train=False)
    assert found["loss"] == pytest.approx(float(out.terms["contrast"].sum) / 8, rel=1e-4)


def test_evaluation_has_dropout_without_pairs_alone(vocabulary, batch):
    calm = objective_with(vocabulary, dropout=0.0, pair_field="b")
    params, key = parameters(calm, batch), jax.random.key(1)

    def loss(objective, train):
        viewed = objective.views(batch, key, 0, train=train)
        return float(objective.loss(params, {}, viewed, key, jnp.int32(0), train=train).terms["contrast"].sum)

    paired, alone = objective_with(vocabulary, dropout=0.3, pair_field="b"), objective_with(vocabulary, dropout=0.3)
    assert loss(paired, False) == pytest.approx(loss(calm, False), rel=1e-5)
    assert abs(loss(paired, True) / loss(calm, True) - 1) > 0.01
    assert (alone.predict(params, {}, batch)["distance"] > 1e-3).all()  # two masks
    found, expected = (objective.predict(params, {}, batch)["distance"] for objective in (paired, calm))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_spearman_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 30)).astype(float)  # ties
    assert spearman(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)
    assert spearman(a, np.ones(30)) == 0.0


def test_scores_pair_up_the_sentences_of_the_pairs(vocabulary):
    scores = np.array([5.0, 0.0, 3.0])
    objective = objective_with(vocabulary, scores)
    angles = np.radians([0, 10, 0, 90, 0, 40, 0, 180])  # three pairs, from like to unlike as they are scored; two rows
    embedding = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    order = np.array([6, 3, 0, 5, 1, 2, 4, 7])
    found = objective.score(
        {
            "embedding": embedding[order],
            "scored": np.array([1, 2, 3, 4, 5, 6, 0, 0])[order],
            "distance": np.array([9.0, 9, 9, 9, 9, 9, 1, 3])[order],
        }
    )
    assert found == {"sts_spearman": pytest.approx(1.0), "alignment": 2.0, "uniformity": pytest.approx(-8.0)}


def write_csv(file, columns, rows):
    with open(file, "w", newline="", encoding="utf8") as opened:
        csv.writer(opened).writerows([columns, *rows])


def test_the_views_of_a_record_stay_together(tmp_path, made_up_texts):
    rows = [(text, f"{text} again", f"never {text}") for text in made_up_texts]
    write_csv(tmp_path / "pairs.csv", ("text", "same", "other"), rows)
    sts = [(a, b, score) for a, b, score in zip(made_up_texts, made_up_texts[1:], ("0.5", "5", "2.25"), strict=False)]
    write_csv(tmp_path / "sts.csv", ("text", "text2", "score"), sts)
    config = TextConfig(
        f"csv:{tmp_path / 'pairs.csv'}", seq_len=72, vocab_size=400, train_split="train[:50]", eval_split="train[50:]"
    )
    fields = {PAIR: "same", NEGATIVE: "other"}
    data, pairs = prepare_sentences(config, fields, f"csv:{tmp_path / 'sts.csv'}")
    assert pairs.scores.tolist() == [0.5, 5.0, 2.25]
    assert (len(data.train), len(data.eval)) == (50, 10 + 6)

    def texts(batch, prefix):
        return [data.tokenizer.decode(row, skip_special_tokens=True) for row in batch[f"{prefix}tokens"]]

    batch = data.eval.fetch(np.arange(16)[::-1])
    assert batch["scored"].tolist() == [0] * 10 + [6, 5, 4, 3, 2, 1]
    plain = lambda text: data.tokenizer.decode(data.tokenizer(text)["input_ids"], skip_special_tokens=True)  # noqa: E731
    expected = [side for a, b, _ in sts for side in (a, b)]
    assert texts(batch, "")[:9:-1] == [plain(text) for text in expected]
    for own, same, other in zip(*(texts(batch, prefix)[:10] for prefix in ("", PAIR, NEGATIVE)), strict=True):
        assert (same, other) == (plain(f"{own} again"), plain(f"never {own}"))
    task = SentenceEmbeddingConfig(pair_field="same", negative_field="other")
    objective = SentenceEmbedding(task, MODEL, data.vocabulary.size, data.tokenizer, 16)
    shown = objective.preview(batch | {"row": np.arange(16)}, batch)[0]
    assert shown["pair"].startswith(shown["text"].removesuffix(" [SEP]"))
    assert set(shown) == {"text", "pair", "negative", "tokens"}

    write_csv(tmp_path / "hole.csv", ("text", "same"), [("a b", "b"), ("c d", ""), ("e", "f"), ("g", "h")])
    hole = dataclasses.replace(
        config, source=f"csv:{tmp_path / 'hole.csv'}", train_split="train[:2]", eval_split="train[2:]"
    )
    with pytest.raises(UserError, match=r"field 'same' is empty in 1 records; expected whole pairs"):
        prepare_sentences(hole, {PAIR: "same"}, "", data.tokenizer.name_or_path)
    write_csv(tmp_path / "bad.csv", ("text", "text2", "score"), [("a", "b", "high")])
    with pytest.raises(UserError, match=r"bad.csv:2: label 'high' is no number"):
        prepare_sentences(config, {}, f"csv:{tmp_path / 'bad.csv'}", data.tokenizer.name_or_path)
    with pytest.raises(UserError, match=r"hole.csv: no field 'sane'; .*'same'.*; --config.task.pair_field=NAME reads"):
        prepare_sentences(hole, {PAIR: "sane"}, "", data.tokenizer.name_or_path)
    with pytest.raises(UserError, match=r"no field 'score'.*; config.task.sts is read from text, text2 and score$"):
        prepare_sentences(config, {}, hole.source, data.tokenizer.name_or_path)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"pool": "lost"}, r"unknown config.task.pool 'lost'; did you mean 'last'"),
        ({"temperature": 0.0}, r"config.task.temperature is 0.0; expected more than 0"),
        ({"temperature": float("nan")}, r"config.task.temperature is nan; expected more than 0"),
        ({"temperature": float("inf")}, r"config.task.temperature is inf; expected more than 0"),
        ({"dropout": 0.0}, r"both views would be the same"),
        ({"negative_field": "c"}, r"config.task.negative_field is given without config.task.pair_field"),
    ],
)
def test_settings_that_cannot_be_are_refused(task, match):
    with pytest.raises(UserError, match=match):
        SentenceEmbeddingConfig(**task)


def test_a_limited_evaluation_that_would_see_the_scored_pairs_alone_is_refused(tiny_config, tmp_path):
    write_csv(tmp_path / "sts.csv", ("text", "text2", "score"), [("one", "two", i) for i in range(40)])
    settings = {"init": "scratch", "task.sts": f"csv:{tmp_path / 'sts.csv'}", "eval.batches": 1}
    with pytest.raises(UserError, match=r"config.eval.batches is 1 with config.task.sts"):
        finetune.main(tiny_config("finetune/sentence_embedding", settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_causal_model_is_not_read_off_its_first_token(tiny_config):
    config = tiny_config("finetune/sentence_embedding", {"task.pool": "first"}).to_dict()
    config["model"] = tiny_config("gpt_clm").to_dict()["model"]
    with pytest.raises(UserError, match=r"config.task.pool is 'first', but the first token of a causal model"):
        SentenceEmbedding.abstract(config)
    config["task"]["pool"] = "last"
    objective, _ = SentenceEmbedding.abstract(config)
    assert objective.flops({"tokens": (4, 32)}) < dataclasses.replace(objective, task=SentenceEmbeddingConfig()).flops(
        {"tokens": (4, 32)}
    )


def test_a_run_beats_chance_and_reports(tiny_config, made_up_texts, tmp_path):
    halves = [(" ".join(t.split()[:20]), " ".join(t.split()[10:30])) for t in made_up_texts]
    write_csv(tmp_path / "sts.csv", ("text", "text2", "score"), [(*half, i % 5) for i, half in enumerate(halves[:12])])
    settings = {
        "init": "scratch",
        "task.sts": f"csv:{tmp_path / 'sts.csv'}",
        "steps": 30,
        "eval.every_steps": 30,
        "eval.examples": 2,
        "model.layers": 1,
        "optimizer.layer_decay": 1.0,
    }
    run = tmp_path / "run"
    finetune.main(tiny_config("finetune/sentence_embedding", settings), run)
    report = json.loads((run / "report.json").read_text())
    assert report["eval/loss"] < math.log(16) - 0.7
    assert report["eval/uniformity"] < 0 < report["eval/alignment"]
    assert -1 <= report["eval/sts_spearman"] <= 1
    assert report["sentences"] > 10

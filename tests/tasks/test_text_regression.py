"""Text regression: its loss and scores against NumPy; rows of pairs in models with and without token types."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import REPOSITORY

from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.tasks.text_regression import TextRegression, TextRegressionConfig
from sslx.train.initialise import objective_class
from sslx.train.sharding import unbox

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=32, dropout=0.0, attention_dropout=0.0)


@pytest.fixture
def batch(packed_rows):
    rows = packed_rows(8, 24, paired=True)
    rows.pop("sentence_label")
    return rows | {"label": np.linspace(0, 5, 8, dtype=np.float32)}


def objective_with(vocabulary, model=MODEL):
    return TextRegression(TextRegressionConfig(pool="first", dropout=0.0), model, vocabulary.size, None)


def parameters(objective, batch):
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    return jax.tree.map(lambda array: array * 5.0, params)


def test_the_loss_is_the_squared_error_of_the_outputs(vocabulary, batch):
    objective = objective_with(vocabulary)
    params = parameters(objective, batch)
    viewed = objective.views(batch, jax.random.key(0), 0, train=True)
    outputs = np.float64(objective.predict(params, {}, viewed)["output"])
    assert outputs.shape == (8,)
    assert outputs.std() > 0
    out = objective.loss(params, {}, viewed, jax.random.key(0), jnp.int32(0), train=True)
    assert out.terms["squared_error"].sum == pytest.approx(((outputs - batch["label"]) ** 2).sum(), rel=1e-5)
    viewed["weights"]["squared_error"] = viewed["weights"]["squared_error"].at[3].set(0.0)  # a row that pads
    out = objective.loss(params, {}, viewed, jax.random.key(0), jnp.int32(0), train=True)
    assert out.terms["squared_error"].sum == pytest.approx(
        (np.delete(outputs - batch["label"], 3) ** 2).sum(), rel=1e-5
    )


def test_scores_are_pearsons_and_spearmans_correlation(vocabulary):
    objective = objective_with(vocabulary)
    outputs, labels = np.float32([0.1, 0.4, 0.2, 9.0, 0.3]), np.float32([1.0, 2.0, 2.0, 3.0, 0.5])

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a @ b) / np.sqrt((a @ a) * (b @ b))

    found = objective.score({"output": outputs, "label": labels})
    assert found["pearson"] == pytest.approx(correlation(outputs, labels), rel=1e-5)
    ranks = np.array([1.0, 4, 2, 5, 3]), np.array([2.0, 3.5, 3.5, 5, 1])  # ties share their mean rank
    assert found["spearman"] == pytest.approx(correlation(*ranks))
    assert objective.score({"output": np.ones(5), "label": labels}) == {"pearson": 0.0, "spearman": 0.0}
    report = objective.report({"output": outputs, "label": labels})
    assert report.values["root_mean_squared_error"] == pytest.approx(np.sqrt(((outputs - labels) ** 2).mean()))


@pytest.mark.parametrize(("types", "differs"), [(2, True), (1, False)])
def test_a_model_of_one_token_type_takes_pairs_and_does_not_see_their_types(vocabulary, batch, types, differs):
    objective = objective_with(vocabulary, dataclasses.replace(MODEL, token_types=types))
    params = parameters(objective, batch)
    assert params["encoder"]["embeddings"]["token_type"].shape == (types, 32)
    outputs, plain = (
        np.asarray(objective.predict(params, {}, batch | {"token_types": kinds})["output"])
        for kinds in (batch["token_types"], np.zeros_like(batch["token_types"]))
    )
    assert np.isfinite(outputs).all()
    assert (np.abs(outputs - plain).max() > 1e-3) == differs


@pytest.mark.parametrize("name", ["text_classification", "text_regression"])
def test_the_first_token_of_a_causal_model_is_no_row(name):
    written = load_config(REPOSITORY / "configs/gpt_clm.py").to_dict()
    del written["pretext"]
    written["data"]["label_type"] = {"text_classification": "class", "text_regression": "number"}[name]
    for pool in ("last", "mean", "first"):
        written["task"] = {"name": name, "pool": pool}
        if pool != "first":
            objective_class(written).abstract(written)
    with pytest.raises(UserError, match=r"config.task.pool is 'first'.* expected last or mean"):
        objective_class(written).abstract(written)


def test_labels_of_the_other_kind_are_refused(tiny_config):
    config = tiny_config("finetune/text_pairs", {"data.pair_field": ""}).to_dict()
    config["task"] = {"name": "text_regression"}
    with pytest.raises(UserError, match=r"label_type is 'class'; text_regression expects 'number'"):
        TextRegression.prepare(config)
    config["data"]["label_type"] = "number"
    with pytest.raises(UserError, match=r"jsonl:1: label '.*' is no number"):
        TextRegression.prepare(config)
    config["data"]["source"] = "text:" + config["data"]["source"].partition(":")[2]
    with pytest.raises(UserError, match=r"has no labels that are numbers; expected a column 'label'"):
        TextRegression.prepare(config)

"""The training step: the same numbers on any mesh and with any number of micro-batches."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_step import MESHES, assert_close, one_step, prepared, recording

from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.objective import Mean, Objective, Out, Rows, Sum, Term
from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig
from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.step import finish_means, make_eval_step, make_train_step


@pytest.fixture(scope="module")
def batch(packed_rows):
    return packed_rows(32, 24, paired=True)


@pytest.fixture(scope="module")
def make_objective(vocabulary):
    """BERT with the sentence loss: two terms, one a mean over tokens and one over rows."""

    def make(dropout: float) -> MaskedLanguageModel:
        size = dict(layers=2, width=32, heads=4, mlp_width=64, max_length=24, unroll=False)
        model = BertConfig(**size, dropout=dropout, attention_dropout=dropout)
        return MaskedLanguageModel(MaskedLanguageModelConfig(sentence="nsp"), model, vocabulary, None)

    return make


@pytest.fixture(scope="module")
def variables(make_objective, batch):
    """One set of boxed initial variables, on the host."""
    return jax.device_get(jax.jit(lambda: make_objective(0.1).init(jax.random.key(5), batch))())


@pytest.fixture(scope="module")
def on_one_device(make_objective, variables, batch):
    return one_step(make_objective(0.1), variables, batch)


@pytest.mark.parametrize("mesh", MESHES)
def test_one_device_and_eight_give_the_same_loss_and_gradients_with_dropout(
    make_objective, variables, batch, on_one_device, mesh
):
    after, metrics = on_one_device
    eight_after, eight_metrics = one_step(make_objective(0.1), variables, batch, MESHES[mesh], 8)
    terms = {"loss", "mlm", "sentence", "accuracy", "sentence_accuracy"}
    parts = {"encoder/embeddings", "encoder/transformer", "mlm_head", "pooler", "sentence_head"}
    norms = {f"grad_norm/{part}" for part in parts}
    assert set(metrics) == terms | norms | {"grad_norm", "learning_rate"}
    assert sum(metrics[name] ** 2 for name in norms) == pytest.approx(metrics["grad_norm"] ** 2, rel=1e-5)
    assert_close(metrics, eight_metrics)
    largest = jax.tree.map(lambda gradient: np.abs(gradient).max(), after.opt_state)
    largest["encoder"]["transformer"]["layers"]["attention"]["key"].pop("bias")  # 0: softmax ignores what it adds
    assert min(jax.tree.leaves(largest)) > 1e-7
    assert_close(after.opt_state, eight_after.opt_state)


def test_accumulation_equals_the_full_batch(make_objective, variables, batch):
    # Rows of 5 to 23 tokens have 1 to 3 picked ones, so the micro-batches' weights differ.
    lengths = (batch["segment_ids"] > 0).sum(axis=1)
    assert len({lengths[part::4].sum() for part in range(4)}) > 1
    after, metrics = one_step(make_objective(0.0), variables, batch)
    split_after, split_metrics = one_step(make_objective(0.0), variables, batch, MESHES["all"], 8, micro_batches=4)
    assert_close(metrics, split_metrics)
    assert_close(after.opt_state, split_after.opt_state)


def test_the_step_constrains_its_activations(make_objective, variables, batch):
    # ``with mesh:`` in place of ``jax.set_mesh`` makes Linen's constraints vanish without a word.
    mesh = sharding.make_mesh(MESHES["all"])
    with sharding.on_mesh(mesh):
        step, state, placed = prepared(make_objective(0.1), variables, batch, mesh)
        jaxpr = str(jax.make_jaxpr(step)(state, placed))
    assert jaxpr.count("sharding_constraint") > 10
    assert "'tensor'" in jaxpr


TOY = {"params": {"w": np.float32(3)}, "state": {"queue": np.zeros(16, np.float32), "total": np.float32(0)}}


@dataclasses.dataclass(frozen=True)
class Toy(Objective):
    """Two terms with closed forms: ``w * mean(x)`` over rows and ``w**2 * mean(y)`` over weighted entries of rows."""

    coef: float = 0.5

    def init(self, key, batch):
        return TOY

    def views(self, batch, key, step, *, train):
        return batch | {"weights": {"rows": jnp.ones(len(batch["row"])), "entries": batch["entry_weights"]}}

    def loss(self, params, state, batch, key, step, *, train):
        weights = batch["weights"]
        terms = {
            "rows": Term(jnp.sum(weights["rows"] * batch["x"]) * params["w"]),
            "entries": Term(jnp.sum(weights["entries"] * batch["y"]) * params["w"] ** 2, self.coef),
        }
        metrics = {"mean_x": Mean(jnp.sum(batch["x"]), jnp.float32(len(batch["x"])))}
        return Out(terms, metrics, {"queue": Rows(batch["x"]), "total": Sum(jnp.sum(batch["x"]))})

    def after_update(self, params, state, stats, key, step):
        return {"queue": stats["queue"].value, "total": state["total"] + stats["total"].value}

    @classmethod
    def prepare(cls, config, tokenizer=None):
        raise NotImplementedError

    @classmethod
    def encoder(cls, params, state):
        raise NotImplementedError

    def encode(self, variables, batch):
        raise NotImplementedError

    def flops(self, batch_shapes):
        return 0.0


@dataclasses.dataclass(frozen=True)
class Contrastive(Toy):
    scope: ClassVar = "batch"


@pytest.fixture(scope="module")
def toy_batch():
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (16, 5)).astype(np.float32)
    weights[::4] = 0  # micro-batch 0 of 4 has no weight at all
    return {
        "row": np.arange(16, dtype=np.int32),
        "x": rng.normal(size=16).astype(np.float32),
        "y": rng.normal(size=(16, 5)).astype(np.float32),
        "entry_weights": weights,
    }


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize(("mesh", "devices"), [(MeshConfig(), 1), (MeshConfig(data=2, fsdp=2), 4)], ids=["1", "4"])
def test_each_term_is_divided_by_its_own_weight_over_the_whole_batch(toy_batch, mesh, devices, micro_batches):
    after, metrics = one_step(Toy(), TOY, toy_batch, mesh, devices, micro_batches)
    x = toy_batch["x"].astype(np.float64)
    y = (toy_batch["y"] * toy_batch["entry_weights"]).sum(dtype=np.float64) / toy_batch["entry_weights"].sum()
    assert metrics["rows"] == pytest.approx(3 * x.mean(), rel=1e-5)
    assert metrics["entries"] == pytest.approx(9 * y, rel=1e-5)
    assert metrics["loss"] == pytest.approx(3 * x.mean() + 0.5 * 9 * y, rel=1e-5)
    assert metrics["mean_x"] == pytest.approx(x.mean(), rel=1e-5)
    assert after.opt_state["w"] == pytest.approx(x.mean() + 0.5 * 6 * y, rel=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_statistics_reach_after_update_once_in_row_order(toy_batch, micro_batches):
    after, _ = one_step(Toy(), TOY, toy_batch, MeshConfig(data=4), 4, micro_batches)
    np.testing.assert_array_equal(after.state["queue"], toy_batch["x"])
    assert after.state["total"] == pytest.approx(toy_batch["x"].sum(), rel=1e-5)
    assert int(after.step) == 4


def test_a_loss_of_the_whole_batch_refuses_accumulation():
    make_train_step(Contrastive(), recording(), optax.constant_schedule(0.1), seed=0, micro_batches=1)
    with pytest.raises(UserError, match=r"micro_batches is 2; Contrastive compares all rows"):
        make_train_step(Contrastive(), recording(), optax.constant_schedule(0.1), seed=0, micro_batches=2)


def test_evaluation_ignores_filled_up_rows_and_reports_terms_as_training_does(toy_batch):
    valid = (np.arange(16) < 11).astype(np.float32)
    evaluate = make_eval_step(Toy(), seed=0)
    # Two batches whose weights differ, as the last one of an evaluation does.
    parts = [
        evaluate(TOY["params"], {}, {name: array[rows] for name, array in (toy_batch | {"valid": valid}).items()})
        for rows in (slice(0, 8), slice(8, 16))
    ]
    found = finish_means(jax.tree.map(lambda a, b: a + b, *parts))
    kept = {name: array[:11].astype(np.float64) for name, array in toy_batch.items()}
    x, y = kept["x"].mean(), (kept["y"] * kept["entry_weights"]).sum() / kept["entry_weights"].sum()
    assert found["rows"] == pytest.approx(3 * x, rel=1e-5)
    assert found["entries"] == pytest.approx(9 * y, rel=1e-5)
    assert found["loss"] == pytest.approx(3 * x + 0.5 * 9 * y, rel=1e-5)

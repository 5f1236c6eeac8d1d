"""Causal language modelling: its term against NumPy, the same on eight devices; it learns and its samples show it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sslx.errors import UserError
from sslx.models.gpt import MODERN, GptConfig
from sslx.pretext.clm import CausalLanguageModel, CausalLanguageModelConfig
from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_train_step

MODEL = GptConfig(layers=2, width=32, heads=4, mlp_width=64, max_length=40, dropout=0.0, attention_dropout=0.0)
PRETEXT = CausalLanguageModelConfig(prompt_tokens=4, sample_tokens=6)


@pytest.fixture(scope="module")
def objective(vocabulary):
    return CausalLanguageModel(PRETEXT, MODEL, vocabulary, None)


@pytest.fixture(scope="module")
def batch(packed_rows):
    """Random documents with random targets: the objective must not care how they were made."""
    batch = packed_rows(16, 24)
    targets = np.random.default_rng(9).integers(0, 120, batch["tokens"].shape).astype(np.int32)
    return batch | {"targets": targets}


def test_the_term_is_the_mean_over_real_tokens(objective, batch):
    params = unbox(objective.init(jax.random.key(0), batch))["params"]
    viewed = objective.views(batch, jax.random.key(1), jnp.int32(0), train=True)
    out = objective.loss(params, {}, viewed, jax.random.key(2), jnp.int32(0), train=True)
    hidden = objective.model.encoder(120).apply({"params": params["encoder"]}, batch, deterministic=True)
    logits = np.float64(hidden) @ np.float64(params["encoder"]["embeddings"]["word"][:120]).T
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    real = batch["segment_ids"] > 0
    chosen = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
    assert out.terms["clm"].sum == pytest.approx(-chosen[real].sum(), rel=1e-5)
    assert float(viewed["weights"]["clm"].sum()) == real.sum()
    assert out.metrics["accuracy"].sum == (logits.argmax(-1) == batch["targets"])[real].sum()


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, sequence=4)], ids=str)
def test_one_device_and_eight_give_the_same_loss_and_parameters(vocabulary, batch, mesh, chunks):
    model = dataclasses.replace(MODEL, dropout=0.1, attention_dropout=0.1, unroll=False, **MODERN)
    objective = CausalLanguageModel(dataclasses.replace(PRETEXT, loss_chunks=chunks), model, vocabulary, None)
    boxed = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(0), batch))())
    found = []
    for config, devices in ((MeshConfig(), 1), (mesh, 8)):
        made = sharding.make_mesh(config, jax.devices()[:devices])
        with sharding.on_mesh(made):
            shardings, _ = sharding.parameter_shardings(boxed, made, tolerance=0.0)
            params = jax.device_put(sharding.unbox(boxed), shardings)["params"]
            optimizer = optax.sgd(1.0)
            step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(1.0), seed=3))
            state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
            state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(made)))
            found.append((jax.device_get(state.params), jax.device_get(metrics)))
    (params, metrics), (other_params, other_metrics) = found
    assert other_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(one).max())


def test_a_tiny_model_learns_to_count_and_its_samples_count(vocabulary):
    """Documents count upwards from anywhere; after them comes their end."""

    @dataclasses.dataclass
    class Decoder:
        def decode(self, tokens, skip_special_tokens=False):
            return " ".join(str(token) for token in tokens)

    objective = CausalLanguageModel(PRETEXT, MODEL, vocabulary, Decoder())
    starts = np.random.default_rng(0).integers(5, 100, 64)
    document = np.concatenate([starts[:, None] + np.arange(12), np.full((64, 1), 3)], axis=1).astype(np.int32)
    batch = {
        "tokens": document[:, :-1],
        "targets": document[:, 1:],
        "segment_ids": np.ones((64, 12), np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (64, 1)),
        "row": np.arange(64, dtype=np.int32),
    }
    optimizer = optax.adam(3e-3)
    params = unbox(objective.init(jax.random.key(0), batch))["params"]
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(1.0), seed=0))
    for _ in range(250):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.3  # of ln(120) = 4.8 at first
    viewed = objective.views(batch, jax.random.key(1), jnp.int32(0), train=False)
    predicted = jax.device_get(jax.jit(objective.predict)(state.params, {}, viewed))
    rows = objective.show(predicted)
    counted = sum(
        row["continued"] == " ".join(str(start + i) for i in range(4, 10))
        for row, start in zip(rows, starts, strict=True)
    )
    assert counted > 50
    assert rows[0]["prompt"] == " ".join(str(starts[0] + i) for i in range(4))


def test_samples_that_the_model_has_no_positions_for_are_refused(tiny_config):
    # Rows of 32: of the table's 64 positions, the last 32 stay as they were drawn.
    config = tiny_config("gpt_clm", {"model.positions": "learned", "model.max_length": 64, "eval.examples": 1})
    config.pretext.sample_tokens = 17
    with pytest.raises(UserError, match=r"are 33 together, longer than config.data.seq_len 32"):
        CausalLanguageModel.abstract(config.to_dict())
    config.pretext.sample_tokens = 16
    CausalLanguageModel.abstract(config.to_dict())


def test_a_run_trains_with_muon_and_a_frozen_part_samples_resumes_and_is_fine_tuned(
    tmp_path, entries, write_tiny_config
):
    changes = {"data.tokenizer": "bpe", "eval.examples": 2, "pretext.sample_tokens": 8}
    changes |= {"optimizer.name": "muon", "optimizer.freeze": ("final_norm",)}
    write_tiny_config(tmp_path / "gpt.py", "gpt_clm", changes)
    ended = entries.run("main", "--config=gpt.py", "--workdir=run", folder=tmp_path)
    assert ended.code == 0, ended.stderr
    assert "continued" in ended.stdout
    again = entries.run("main", "--config=gpt.py", "--workdir=run", "--config.steps=10", folder=tmp_path)
    assert again.code == 0, again.stderr
    assert "resumed at step 8 of 10" in again.stdout
    write_tiny_config(tmp_path / "task.py", "finetune/text_classification", {"task.pool": "last"})
    tuned = entries.run("finetune", "--config=task.py", "--config.init=run", "--workdir=task", folder=tmp_path)
    assert tuned.code == 0, tuned.stderr
    assert json.loads((tmp_path / "task" / "config.json").read_text())["model"]["name"] == "gpt"

"""The loop, in one process on eight devices: one compilation, donated state, early stop, broken losses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.session import Session, run_config, train
from sslx.settings import MeshConfig, RunConfig
from sslx.train import memory, sharding
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.console import Console
from sslx.train.hosts import Votes
from sslx.train.loop import Trainer
from sslx.train.metrics import read_metrics
from sslx.train.program import Program


@pytest.fixture
def run(tiny_config, tmp_path):
    """Trains a tiny config in this process."""

    def start(**changes) -> Session:
        written = tiny_config(changes={"mesh.fsdp": 2, "eval.batches": 2, **changes}).to_dict()
        return train(written, tmp_path / "run", part="pretext", tokenizer=None, title="test")

    return start


def test_a_run_compiles_its_step_once_and_leaves_what_it_promises(run, tmp_path):
    session = run(**{"eval.every_steps": 4})
    assert session.trained.compilations == 1
    assert int(session.trained.state.step) == 8
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "train/loss" in record] == list(range(1, 9))
    assert [record["step"] for record in records if "eval/loss" in record] == [4, 8]
    assert session.trained.metrics == {k: v for k, v in records[-1].items() if k != "step"}
    assert session.trained.metrics["eval/perplexity"] == pytest.approx(np.exp(session.trained.metrics["eval/loss"]))
    for name in ("config.json", "versions.json", "curves.png", "tokenizer/tokenizer.json"):
        assert (tmp_path / "run" / name).is_file()
    saved = read_variables(tmp_path / "run")["params"]
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(session.trained.state.params))


def test_the_state_is_donated_and_fresh_parameters_are_the_same_on_any_mesh(tiny_config):
    written = json.loads(json.dumps(tiny_config(changes={"mesh.fsdp": 2, "mesh.tensor": 2}).to_dict()))
    objective, data = MaskedLanguageModel.prepare(written)
    trainer = Trainer(run_config(written, "pretext"), objective, data)
    state = trainer.program.fresh()
    word = state.params["encoder"]["embeddings"]["word"]
    assert word.sharding.shard_shape(word.shape) == (word.shape[0] // 2, word.shape[1] // 2)
    key = jax.random.key(written["seed"])
    alone = sharding.unbox(jax.jit(lambda: objective.init(key, data.train.fetch(np.arange(1))))())["params"]
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with sharding.on_mesh(trainer.program.mesh):
        votes = Votes(trainer.program.mesh)(stop=0, save=False)
        trainer.program.train_step(state, trainer.batches.at(0), votes, trainer.program.nothing_held())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_training_stops_when_the_held_out_loss_stops_improving(run, tmp_path):
    # No evaluation can improve by ten nats on the first.
    patient = {"steps": 50, "eval.every_steps": 2, "eval.patience": 2, "eval.min_delta": 10.0}
    session = run(**patient)
    assert int(session.trained.state.step) == 6
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert int(run(**patient).trained.state.step) == 6  # the same command does not go on
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_broken_step_ends_the_run_and_is_never_saved(run, tmp_path):
    # Saved every step, logged never: without a look at every step, the checkpoints would be all NaN.
    broken = {"optimizer.learning_rate": 1e38, "checkpoint.every_steps": 1, "log.every_steps": 1000}
    with pytest.raises(FloatingPointError, match=r"the training loss is .* A lower learning rate"):
        run(**broken)
    for step in saved_steps(tmp_path / "run" / "checkpoints"):
        params = read_variables(tmp_path / "run", step)["params"]
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(params))


def out_of_memory(*arguments, **named):
    jax.block_until_ready(jnp.zeros(1 << 50, jnp.uint8))


ADVICE = (
    r"^a device has too little memory \(RESOURCE_EXHAUSTED: .*\); what needs less: --config.micro_batches=2, "
    r"--config.model.remat=dots, --config.mesh.data=1 --config.mesh.fsdp=8, or a smaller --config.batch_size or model; "
    r"for TPUs, python -m sslx.plan --search says which of them fits$"
)


def test_too_little_memory_to_compile_or_to_go_on_is_told_with_what_to_change(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(Program, "compile", out_of_memory)
        with pytest.raises(UserError, match=ADVICE):
            run(batch_size=16)
    monkeypatch.setattr(Console, "advance", lambda self, step: out_of_memory() if step == 3 else None)
    with pytest.raises(UserError, match=ADVICE):
        run(batch_size=16)


def test_only_what_would_help_is_advised_and_other_errors_of_the_runtime_stay():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.0G of 15.7G")
    with (
        pytest.raises(UserError, match=r"what needs less: a smaller --config.batch_size or model; for TPUs"),
        memory.explained(RunConfig(batch_size=8), {"remat": "full"}, mesh),
    ):
        raise error
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5000000 vs. 4194304)")
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(RunConfig(), {}, mesh):
        raise error


def test_more_patience_lets_a_stopped_run_go_on(run):
    stopping = {"steps": 12, "eval.every_steps": 2, "eval.min_delta": 10.0}
    assert int(run(**stopping, **{"eval.patience": 1}).trained.state.step) == 4
    assert int(run(**stopping, **{"eval.patience": 3}).trained.state.step) == 8


def test_another_metric_to_select_by_starts_a_new_search(run):
    first = run(steps=4, **{"eval.every_steps": 2}).trained
    second = run(
        steps=6, **{"eval.every_steps": 2, "checkpoint.best_metric": "eval/accuracy", "checkpoint.best_mode": "max"}
    )
    assert first.checkpoints.best_step() in (2, 4)
    assert second.trained.checkpoints.best_step() is not None


def test_changed_data_is_refused_on_resuming(run, corpus_file, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(corpus_file.read_bytes())
    source = {"data.source": f"text:{corpus}"}
    run(**source)
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "one more document, that moves all the others"}) + "\n")
    with pytest.raises(UserError, match="the training data has changed"):
        run(**source, steps=100)

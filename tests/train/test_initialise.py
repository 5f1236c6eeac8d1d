"""Starting from a run: all that it has trained goes on, and what it lacks is told."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.main import main
from sslx.session import run_config
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import inherited, load_encoder, objective_class, open_start
from sslx.train.loop import Trainer
from sslx.train.sharding import on_mesh


@pytest.fixture
def started(tiny_config):
    """A trainer that starts from a run, its state, and the notes: ``started("electra", run, changes)``."""

    def make(name, run, changes):
        written, tokenizer = inherited(tiny_config(name, changes | {"init": str(run)}).to_dict())
        objective, data = objective_class(written).prepare(written, str(tokenizer))
        trainer = Trainer(run_config(written, "pretext"), objective, data)
        params, notes = load_encoder(trainer.program.abstract.params, open_start(run))
        return trainer, trainer.program.started_from(params), notes

    return make


@pytest.mark.parametrize(
    ("name", "changes", "metrics"),
    [
        ("electra", {"model.layers": 1}, ("mlm", "discriminator")),
        ("span_context", {"model.layers": 1, "pretext.top_layers": 1}, ("error", "loss")),
    ],
)
def test_pretraining_goes_on_with_every_part_of_the_run(name, changes, metrics, started, tiny_config, tmp_path):
    changes |= {"steps": 4, "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 1}
    session = main(tiny_config(name, changes), tmp_path / "run")
    trainer, state, notes = started(name, tmp_path / "run", changes)
    assert notes == []
    there = read_variables(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), there["params"])
    # The teacher is no parameter: the first update makes it anew.
    with on_mesh(trainer.program.mesh):
        found, _ = trainer.evaluator(state.params, there["state"], trainer.data.eval)
    for metric in metrics:
        assert found[metric] == pytest.approx(session.trained.metrics[f"eval/{metric}"], rel=1e-5), metric


def test_parts_that_the_start_lacks_are_told(started, trained):
    folder = trained("bert_mlm")
    _, state, notes = started("electra", folder, {})
    assert notes == [
        f"config.init {folder}: there is no {part}, which starts anew" for part in ("discriminator_head", "generator")
    ]
    word = read_variables(folder)["params"]["encoder"]["embeddings"]["word"]
    np.testing.assert_array_equal(jax.device_get(state.params["encoder"]["embeddings"]["word"]), word)


def test_what_is_asked_for_by_name_is_not_passed_over(trained, tiny_config):
    folder = trained("bert_mlm")

    def started(keys, part="pretext", **changes):
        written = tiny_config("bert_mlm", changes | {"init": str(folder)}).to_dict()
        written |= {} if part == "pretext" else {"task": written.pop("pretext")}
        return inherited(written, keys)

    started(["steps", "init", "data.seq_len"])
    for key in ("data.tokenizer", "data.vocab_size"):
        with pytest.raises(UserError, match=f"config.{key} is given, and the tokenizer is that of .*bert_mlm"):
            started([key])
    started(["model.dtype", "model.layers"], "task")  # as it is there
    with pytest.raises(UserError, match=r"config.model.layers is 7, and the model is that of .*bert_mlm', which has "):
        started(["model.layers"], "task", **{"model.layers": 7})
    started([], "task", **{"model.layers": 7})  # of a config file, which was written for other starts too

"""The preview shows the rows and masks of step 0 as the training step draws them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from sslx import preview
from sslx.objective import Out, Term
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.session import run_config
from sslx.train import loop
from sslx.train.step import TrainState, make_train_step


@pytest.mark.parametrize("sentence", [None, "nsp"])
def test_rows_shown_are_those_that_training_sees(tiny_config, tmp_path, monkeypatch, capsys, sentence):
    config = tiny_config("bert_mlm", {"seed": 3, "pretext.sentence": sentence, "pretext.mask_ratio": 0.3})
    shown = preview.main(config, tmp_path)
    printed = capsys.readouterr().out

    written = config.to_dict()
    run = run_config(written, "pretext")
    objective, data = MaskedLanguageModel.prepare(written)
    batch = jax.device_get(loop.Trainer(run, objective, data).batches.at(0))
    seen = []

    def catch(self, params, state, viewed, key, number, *, train):
        jax.debug.callback(seen.append, viewed)
        return Out({name: Term(params) for name in viewed["weights"]})

    # The step that training compiles, with a loss that only tells what it was given.
    monkeypatch.setattr(MaskedLanguageModel, "loss", catch)
    optimizer = optax.sgd(0.0)
    train_step = make_train_step(objective, optimizer, optax.constant_schedule(0.0), seed=run.seed)
    params = jnp.zeros(())
    jax.jit(train_step)(TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params)), batch)
    jax.effects_barrier()

    expected = objective.preview(batch, jax.device_get(seen[0]))[: preview.ROWS]
    assert shown == expected
    assert "<-" in shown[0]["text"]
    assert ("sentence label" in shown[0]) == (sentence is not None)
    for fields in shown:
        assert fields["tokens"] in printed
    assert "unigram_entropy" in printed
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_task_are_shown_too(tiny_config, tmp_path):
    shown = preview.main(tiny_config("finetune/text_classification", {"init": "scratch"}), tmp_path)
    assert len(shown) == preview.ROWS
    assert all(row["text"].startswith("[CLS] ") and row["label"] for row in shown)

"""Steps that are not finite: what they leave as it is, what is kept of them, and going on without them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.objective import Term
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.session import train
from sslx.train import nonfinite
from sslx.train.checkpoint import read_variables
from sslx.train.metrics import read_metrics
from sslx.train.nonfinite import kept_steps, read_captured
from sslx.train.step import step_key


class BreaksSometimes(MaskedLanguageModel):
    """Its loss is NaN in the steps (from 0) of ``BROKEN``."""

    def loss(self, params, state, batch, key, step, *, train):
        out = super().loss(params, state, batch, key, step, train=train)
        broken = jnp.isin(step, jnp.array(BROKEN)) & train
        return dataclasses.replace(out, terms={"mlm": Term(out.terms["mlm"].sum * jnp.where(broken, jnp.nan, 1.0))})


BROKEN = (3, 4, 7)


@pytest.fixture
def run(tiny_config, tmp_path):
    """Trains on eight devices, saved every four steps, evaluated every other."""

    def start(folder="run", **changes):
        settings = {"mesh.fsdp": 2, "pretext.name": f"{__name__}:BreaksSometimes", "on_nonfinite": "skip"}
        settings |= {"eval.every_steps": 2, "eval.batches": 1, "checkpoint.every_steps": 4, "checkpoint.keep": 9}
        written = tiny_config(changes={**settings, **changes}).to_dict()
        return train(written, tmp_path / folder, part="pretext", tokenizer=None, title="test")

    return start


def test_broken_steps_are_left_out_kept_and_counted(run, tmp_path, capsys):
    session = run()
    assert session.trained.compilations == 1
    state = session.trained.state
    assert int(state.step) == 8
    # Adam's and the schedule's counts: neither the three nor what was sent after them has counted.
    assert [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0] == [5, 5]
    records = read_metrics(tmp_path / "run")
    assert [(r["step"], r["train/nonfinite"]) for r in records if "train/nonfinite" in r] == [(4, 1), (5, 2), (8, 3)]
    # What is due at a step is due without its update, too.
    assert [r["step"] for r in records if "eval/loss" in r] == [2, 4, 6, 8]
    before, after = (next(r for r in records if r["step"] == n and "eval/loss" in r) for n in (4, 8))
    assert after["eval/loss"] != before["eval/loss"]
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [2, 4, 6, 8]
    assert "at step 5; its update is left out (2 in this run)" in capsys.readouterr().out

    assert kept_steps(tmp_path / "run") == [4, 5, 8]
    captured = read_captured(tmp_path / "run", 5)
    assert (captured.step, captured.loss) == (5, "nan")
    np.testing.assert_array_equal(captured.key, jax.random.key_data(step_key(0, 4)))
    for name, array in session.trainer.batches.at(4).items():
        np.testing.assert_array_equal(captured.batch[name], array)
    saved = read_variables(tmp_path / "run", 4)["params"]  # nothing was updated since step 3
    jax.tree.map(np.testing.assert_array_equal, captured.params, saved)
    assert read_captured(tmp_path / "run").step == 4


def test_skipping_is_the_same_to_the_bit_when_the_run_is_cut_between_broken_steps(run, tmp_path):
    whole = jax.device_get(run("whole").trained.state)
    run("cut", steps=4, **{"optimizer.schedule_steps": 8})
    resumed = run("cut", **{"optimizer.schedule_steps": 8}).trained
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(resumed.state))
    kept = json.loads((tmp_path / "cut" / "checkpoints" / "8" / "progress" / "metadata").read_text())
    assert (kept["skipped"], kept["last_skipped"], kept["in_succession"]) == (3, 8, 1)


def test_too_many_in_succession_stop_the_run_and_no_more_are_kept_than_it_says(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nonfinite, "MOST_KEPT", 1)
    with pytest.raises(FloatingPointError, match=r"at step 5, the last of 2 in succession; the newest .* is 4") as end:
        run(skip_at_most=1)
    assert kept_steps(tmp_path / "run") == [4]
    assert "sslx.replay --run=" in capsys.readouterr().out
    assert "sslx.replay" not in str(end.value)


def test_a_run_stops_at_the_first_one_unless_told_otherwise_and_can_go_on_when_told(run, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"at step 4; the newest checkpoint is 2.*sslx.replay --run=.*--step=4"
    ):
        run(on_nonfinite="stop")
    assert int(run().trained.state.step) == 8


def test_a_step_that_was_not_kept_is_told_with_those_that_were(tmp_path):
    with pytest.raises(UserError, match=r"^no step to replay in "):
        read_captured(tmp_path)
    for step in (3, 12):
        (tmp_path / "nonfinite" / str(step)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"has kept no step 4; it has 3, 12$"):
        read_captured(tmp_path, 4)
    with pytest.raises(UserError, match="nonfinite/3 is not complete"):
        read_captured(tmp_path)

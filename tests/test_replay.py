"""Replaying what broke a run, from the command line: the operation, the module and the line are those that did."""

from __future__ import annotations

import pytest
from entries import simulated

OBJECTIVES = """
import dataclasses

import jax.numpy as jnp

from sslx.objective import Term
from sslx.pretext.mlm import MaskedLanguageModel


class LogOfZero(MaskedLanguageModel):
    def loss(self, params, state, batch, key, step, *, train):
        out = super().loss(params, state, batch, key, step, train=train)
        share = jnp.where(step == 2, 0.0, 1.0)
        surprise = jnp.log(share)
        return dataclasses.replace(out, terms={"mlm": Term(out.terms["mlm"].sum * (1.0 + 0.0 * surprise))})


class RootOfZero(MaskedLanguageModel):
    def loss(self, params, state, batch, key, step, *, train):
        out = super().loss(params, state, batch, key, step, train=train)
        length = jnp.sqrt(jnp.sum(params["mlm_head"]["bias"] ** 2))
        return dataclasses.replace(out, terms={"mlm": Term(out.terms["mlm"].sum + length)})
"""


@pytest.fixture
def folder(tmp_path, write_tiny_config):
    write_tiny_config(tmp_path / "pretrain.py", changes={"model.layers": 1, "steps": 4})
    (tmp_path / "broken.py").write_text(OBJECTIVES)
    return tmp_path


def line_of(text):
    return f"broken.py:{1 + next(n for n, line in enumerate(OBJECTIVES.splitlines()) if text in line)} "


def test_a_log_of_zero_on_eight_devices_is_replayed_on_one(entries, folder):
    ended = entries.run(
        "main",
        "--config=pretrain.py",
        "--workdir=run",
        "--config.pretext.name=broken:LogOfZero",
        "--config.mesh.fsdp=2",
        "--config.micro_batches=2",
        folder=folder,
        environment=simulated(8),
    )
    assert ended.code == 1
    assert "python -m sslx.replay --run=run --step=3 names the operation it comes from" in ended.stderr
    replayed = entries.run("replay", "--run=run", folder=folder)
    assert replayed.stderr == ""
    said = replayed.stdout.splitlines()
    assert said[0] == "step 3 of run: loss nan, gradient norm nan"
    assert said[1].startswith(f"first: log gives -inf, repetition 0 of a scan (from 0), {line_of('jnp.log')}")
    assert said[2].startswith("which turns to nan: mul gives nan")
    assert line_of("1.0 + 0.0 * surprise") in said[2]
    assert said[3].startswith("it reaches the loss and ")
    assert replayed.code == 0


def test_a_gradient_that_breaks_beside_a_finite_loss_is_named_with_its_parameter(entries, folder):
    arguments = ["--config=pretrain.py", "--workdir=run", "--config.pretext.name=broken:RootOfZero"]
    ended = entries.run("main", *arguments, folder=folder)
    assert ended.code == 1
    assert "(gradient norm nan) at step 1; the newest checkpoint is none" in ended.stderr
    said = entries.run("replay", "--run=run", "--step=1", folder=folder).stdout.splitlines()
    assert line_of("jnp.sqrt") in said[1]  # the derivative is made on the way forward
    assert said[2].startswith("which turns to nan: mul gives nan (backward pass), ")
    assert said[-1] == "the loss is finite; it reaches the gradients of mlm_head/bias"


def test_a_learning_rate_that_is_far_too_high_breaks_a_module_that_is_named(entries, folder):
    arguments = ["--config=pretrain.py", "--workdir=run", "--config.optimizer.learning_rate=1e30"]
    ended = entries.run("main", *arguments, folder=folder)
    assert ended.stderr.startswith("error: the training loss is ")
    assert ended.stderr.count("\n") == 1
    assert ended.code == 1
    said = entries.run("replay", "--run=run", folder=folder).stdout.splitlines()
    assert " in BertForPretraining/" in said[1]
    assert "sslx/models/" in said[1]


def test_a_run_without_such_a_step_is_refused_in_a_line(entries, folder, trained):
    ended = entries.run("replay", f"--run={trained('bert_mlm')}", folder=folder)
    assert ended.stderr.startswith("error: no step to replay in ")
    assert ended.code == 2
    assert entries.run("replay", folder=folder).stderr.startswith("error: no --run given")

"""Mean teacher: its loss against NumPy, which labels are seen, whose statistics the teacher has, and that it learns."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from one_step import one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx import finetune
from sslx.augment.policy import NONE
from sslx.config import build
from sslx.data.images import MappedRows
from sslx.errors import UserError
from sslx.models.resnet import ResnetConfig
from sslx.tasks.mean_teacher import MeanTeacher, MeanTeacherConfig, SomeLabels, consistency, ramp
from sslx.train.sharding import unbox

TASK = MeanTeacherConfig(ema=0.9, consistency=10.0, ramp_steps=4, augment=dataclasses.replace(NONE, solarise=0.5))
LABELS = np.array([2, -1, 0, -1, -1, 1, -1, -1], np.int32)


def objective(model=TINY_VIT):
    return MeanTeacher(TASK, model, ("a", "b", "c"), False)


def shares(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_consistency_is_the_mean_square_between_shares_and_rises_as_in_the_paper():
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = ((shares(student) - shares(teacher)) ** 2).mean(-1)
    np.testing.assert_allclose(consistency(np.float32(student), np.float32(teacher)), expected, rtol=1e-5)
    weights = [float(ramp(np.float32(step), 4)) for step in (0, 1, 4, 9)]
    np.testing.assert_allclose(weights, [np.exp(-5), np.exp(-5 * 0.75**2), 1, 1], rtol=1e-5)
    assert float(ramp(np.float32(0), 0)) == 1.0


def test_labelled_rows_are_repeated_to_their_share_and_all_others_have_no_label():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    rows = SomeLabels(MappedRows(images, np.arange(40), np.arange(40, dtype=np.int32) % 3), np.array([7, 8]), 0.25)
    found = rows.fetch(np.arange(len(rows)))
    labelled = found["label"] >= 0
    assert labelled.mean() == pytest.approx(0.25, abs=0.03)
    assert set(found["image"][labelled].reshape(-1)) == {7, 8}
    np.testing.assert_array_equal(found["label"][labelled], found["image"][labelled].reshape(-1) % 3)
    np.testing.assert_array_equal(found["image"][~labelled].reshape(-1), np.arange(40))


def test_the_loss_is_cross_entropy_on_labels_and_consistency_with_the_average_on_all_rows():
    task, batch = objective(), picture_rows(8) | {"label": LABELS}
    compiled = Compiled(task)
    variables = unbox(jax.device_get(jax.jit(lambda: task.init(jax.random.key(0), batch))()))
    params, state = variables["params"], variables["state"]
    state["ema"]["params"] = jax.tree.map(lambda array: 1.5 * array + 0.01, state["ema"]["params"])
    viewed = compiled.views(batch, True)
    assert np.abs(np.asarray(viewed["image"]) - np.asarray(viewed["other"])).max() > 0.1
    out = compiled.loss(params, state, viewed, True)

    def said():
        by_student = task.module.apply({"params": params}, viewed, deterministic=True)
        other = viewed | {"image": viewed["other"]}
        return by_student, task.module.apply({"params": state["ema"]["params"]}, other, deterministic=True)

    student, teacher = map(np.float64, jax.jit(said)())
    known = LABELS >= 0
    entropies = -np.log(shares(student)[known, LABELS[known]])
    assert out.terms["classification"].sum == pytest.approx(entropies.sum(), rel=1e-4)
    assert viewed["weights"]["classification"].sum() == 3
    apart = ((shares(student) - shares(teacher)) ** 2).mean(-1).sum() * np.exp(-5)
    assert out.terms["consistency"].sum == pytest.approx(apart, rel=1e-3)
    assert out.terms["consistency"].coef == 10.0


def test_the_teacher_takes_no_gradient_and_has_statistics_of_its_own_passes():
    task = objective(ResnetConfig(depth=10, width=2, stem="cifar", image_size=8))
    batch = picture_rows(8) | {"label": LABELS}
    variables = jax.device_get(jax.jit(lambda: task.init(jax.random.key(0), batch))())
    averages = variables["state"]["ema"]
    averages["params"] = jax.tree.map(lambda array: 3.0 * array + 0.1, averages["params"])
    (one, metrics), (eight, others) = (one_step(task, variables, batch, devices=n) for n in (1, 8))
    assert metrics["loss"] == pytest.approx(float(others["loss"]), rel=1e-4)
    stem = lambda tree: tree["batch_stats"]["encoder"]["stem_norm"]["var"]  # noqa: E731
    assert np.abs(stem(one.state["ema"]) - stem(one.state)).max() > 1e-3
    np.testing.assert_allclose(stem(one.state["ema"]), stem(eight.state["ema"]), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ema=0.0), "ema is 0, and a mean teacher is the moving average"),
        (dict(labels_per_class=0), "labels_per_class is 0; expected at least 1"),
        (dict(labelled_share=1.0), r"labelled_share is 1\.0; expected a share"),
        (dict(mixup=0.2), "do not go with a mean teacher"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build(MeanTeacherConfig, changes, "config.task")


def test_a_run_from_its_config_learns_from_some_labels_of_digits(tmp_path):
    given = dict(data__test_split="test", steps=60, task__labels_per_class=20, task__ema=0.9)
    config = tiny_images("finetune/mean_teacher", **given)
    session = finetune.main(config, tmp_path / "run")
    assert session.data.statistics["train_labelled"] == 200
    assert session.trained.metrics["eval/accuracy"] > 0.2  # a guess reaches 0.1
    assert (tmp_path / "run" / "report.json").exists()

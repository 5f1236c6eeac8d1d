"""Joint embedding as objectives: on any mesh the same, teachers and their statistics, queues, centres, refusals."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx.augment.policy import AugmentConfig
from sslx.errors import UserError
from sslx.inference.pictures import EmbedPictures
from sslx.models.heads import HeadConfig
from sslx.models.resnet import ResnetConfig
from sslx.models.teacher import MomentumConfig
from sslx.objective import Sum
from sslx.pretext.barlow_twins import BarlowTwins, BarlowTwinsConfig
from sslx.pretext.byol import Byol, ByolConfig
from sslx.pretext.dino import Dino, DinoConfig
from sslx.pretext.ibot import Ibot, IbotConfig
from sslx.pretext.infomax import Infomax, InfomaxConfig
from sslx.pretext.moco_v3 import MocoV3, MocoV3Config
from sslx.pretext.picture_views import MultiCrop, PictureViews, TwoViews
from sslx.pretext.simclr import SimClr, SimClrConfig
from sslx.pretext.simsiam import SimSiam, SimSiamConfig
from sslx.pretext.swav import Swav, SwavConfig
from sslx.pretext.vicreg import Vicreg, VicregConfig
from sslx.session import _told_apart
from sslx.settings import RunConfig
from sslx.train.initialise import objective_class
from sslx.train.sharding import unbox
from sslx.train.step import finish_means, make_eval_step, make_train_step

ROWS = 8
PLAIN = AugmentConfig(crop_area=(0.3, 1.0))  # what compiles fast
TWO = TwoViews(PLAIN, dataclasses.replace(PLAIN, solarise=0.5))
CROPS = MultiCrop(PLAIN, PLAIN, PLAIN, local_count=1, local_size=4)
HEAD = HeadConfig(layers=2, hidden=16, out=8)
FLAT = dataclasses.replace(HEAD, norm=False)
MOMENTUM = MomentumConfig(0.5, 1.0)
RESNET = ResnetConfig(depth=10, width=2, stem="cifar", image_size=8)

METHODS = {
    "simclr": (SimClr, SimClrConfig(projector=HEAD, views=TWO)),
    "byol": (Byol, ByolConfig(projector=HEAD, predictor=HEAD, momentum=MOMENTUM, views=TWO)),
    "simsiam": (SimSiam, SimSiamConfig(projector=HEAD, predictor=HEAD, views=TWO)),
    "barlow_twins": (BarlowTwins, BarlowTwinsConfig(projector=HEAD, views=TWO)),
    "vicreg": (Vicreg, VicregConfig(projector=HEAD, views=TWO)),
    "moco_v3": (MocoV3, MocoV3Config(projector=HEAD, predictor=HEAD, momentum=MOMENTUM, views=TWO, queue=16)),
    "swav": (Swav, SwavConfig(prototypes=16, projector=HEAD, views=CROPS, queue=16)),
    "dino": (Dino, DinoConfig(prototypes=16, projector=HEAD, momentum=MOMENTUM, views=CROPS)),
    "ibot": (Ibot, IbotConfig("ibot", prototypes=16, projector=FLAT, momentum=MOMENTUM, views=CROPS)),
    "dinov2": (
        Ibot,
        IbotConfig("ibot", "sinkhorn", 16, koleo=0.1, projector=FLAT, momentum=MOMENTUM, views=CROPS),
    ),
    "infomax": (Infomax, InfomaxConfig(projector=HEAD, place_head=HEAD, views=TWO)),
    "dino_sinkhorn": (Dino, DinoConfig("dino", "sinkhorn", 16, projector=HEAD, momentum=MOMENTUM, views=CROPS)),
}


def method(name, model=TINY_VIT, **changes):
    cls, pretext = METHODS[name]
    pretext = dataclasses.replace(pretext, **changes)
    return cls(pretext, PictureViews(model, pretext.views), ROWS, 10)


def fresh(objective, batch):
    """Variables as ``init`` makes them, but drawn here: compiling it takes as long as a training step."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        names = [str(getattr(key, "key", "")) for key in path]
        if {"bias", "mean", "queue", "centre", "patch_centre", "filled"} & set(names):
            return np.zeros(leaf.shape, leaf.dtype)
        if {"scale", "var"} & set(names):
            return np.ones(leaf.shape, leaf.dtype)
        return rng.normal(0.0, np.prod(leaf.shape[:-1][-3:]) ** -0.5, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(5), batch))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def agree(expected, found):
    """Every array to 1e-4 of its largest value, but for rounding.

    What batch normalisation takes away again, such as a shift of all features, has gradients of 0 but for that.
    """
    rounding = 1e-5 * max((np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected)), default=0.0)
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        error = np.max(np.abs(value - other))
        assert error <= 1e-4 * np.max(np.abs(value)) + rounding, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dino_sinkhorn"}))  # whose Sinkhorn dinov2 has
def test_losses_gradients_and_state_are_the_same_on_eight_devices(name):
    objective, batch = method(name), picture_rows(ROWS)
    variables = fresh(objective, batch)
    if "queue" in variables["state"]:  # half of it has been used already, and counts
        rows = np.random.default_rng(0).normal(size=variables["state"]["queue"].shape).astype(np.float32)
        variables["state"] |= {"queue": rows / np.linalg.norm(rows, axis=-1, keepdims=True), "filled": np.int32(16)}
    (one, metrics), (eight, others) = (one_step(objective, variables, batch, devices=n) for n in (1, 8))
    agree(one.opt_state, eight.opt_state)
    agree(metrics, others)
    agree(one.state, eight.state)
    assert np.abs(one.opt_state["encoder"]["patches"]["kernel"]).max() > 0
    assert np.isfinite(metrics["loss"])
    assert jax.tree.map(np.shape, one.state) == jax.tree.map(np.shape, unbox(variables["state"]))
    assert objective.scope == {"ibot": "row", "dinov2": "representations"}.get(name, "batch")


def test_views_have_keys_of_their_own_and_small_ones_are_small():
    objective, batch = method("dino"), picture_rows(ROWS)
    viewed = Compiled(objective).views(batch, True)
    assert [view["image"].shape for view in viewed["views"]] == [(8, 8, 8, 3), (8, 8, 8, 3), (8, 4, 4, 3)]
    assert np.abs(viewed["views"][0]["image"] - viewed["views"][1]["image"]).max() > 0.1
    assert "image" not in viewed
    again = Compiled(objective).views({name: array[4:] for name, array in batch.items()}, True)
    for whole, part in zip(viewed["views"], again["views"], strict=True):
        np.testing.assert_allclose(whole["image"][4:], part["image"], atol=1e-6)


@pytest.mark.parametrize("name", ["simclr", "swav"])
def test_what_fills_up_a_batch_of_an_evaluation_counts_nothing(name):
    changes = {"queue": 0} if name == "swav" else {}
    objective, batch = method(name, **changes), picture_rows(ROWS)
    variables = unbox(fresh(objective, batch))
    step = jax.jit(make_eval_step(objective, seed=0))
    valid = np.array([1] * 5 + [0] * 3, np.float32)
    results = []
    for fill in (0, 7):
        rows = batch | {"image": np.where(valid[:, None, None, None] > 0, batch["image"], fill).astype(np.uint8)}
        results.append(finish_means(jax.device_get(step(*variables.values(), rows | {"valid": valid}))))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_teacher_has_statistics_of_its_own_passes_and_starts_as_its_student():
    objective, batch = method("byol", RESNET), picture_rows(ROWS)
    variables = fresh(objective, batch)
    # A student and a teacher that differ, at step 3.
    teacher = variables["state"]["teacher"]
    teacher["params"] = jax.tree.map(lambda array: 3.0 * array + 0.1, teacher["params"])
    after, _ = one_step(objective, variables, batch)
    own, students = after.state["teacher"]["batch_stats"], after.state["batch_stats"]
    assert set(own) == {"encoder", "projector"}
    assert set(students) == {"encoder", "projector", "predictor"}
    difference = lambda a, b: max(map(np.max, map(np.abs, jax.tree.leaves(jax.tree.map(np.subtract, a, b)))))  # noqa: E731
    assert difference(own["encoder"], students["encoder"]) > 1e-3
    # What its own pass in training mode leaves, and nothing of the student's.
    before = unbox(teacher)

    def passes():
        key = jax.random.split(jax.random.fold_in(jax.random.key(7), 3), 3)[0]
        views = objective.views(batch, key, 3, train=True)["views"]
        given = {"params": before["params"], "batch_stats": before["batch_stats"]}
        return objective.teacher_network.apply(given, views, deterministic=False, mutable=["batch_stats"])[1]

    assert_close(jax.device_get(jax.jit(passes)())["batch_stats"], own, share=1e-4)
    momentum = 1.0 - 0.5 * (math.cos(math.pi * 3 / 10) + 1) / 2
    kernel = lambda tree: tree["projector"]["layer_0"]["kernel"]  # noqa: E731
    expected = momentum * kernel(before["params"]) + (1 - momentum) * kernel(after.params)
    np.testing.assert_allclose(kernel(after.state["teacher"]["params"]), expected, rtol=1e-4, atol=1e-6)


def test_the_first_update_copies_the_student_with_its_statistics():
    objective = method("byol", RESNET)
    student = {"encoder": {"w": jnp.float32(2.0)}, "predictor": {"w": jnp.float32(1.0)}}
    state = {
        "batch_stats": {"encoder": {"m": jnp.float32(5.0)}},
        "teacher": {
            "params": {"encoder": {"w": jnp.float32(9.0)}},
            "batch_stats": {"encoder": {"m": jnp.float32(9.0)}},
        },
    }
    stats = {
        "batch_stats": Sum({"encoder": {"m": jnp.float32(6.0)}}),
        "teacher_statistics": Sum({"encoder": {"m": jnp.float32(8.0)}}),
    }
    first, later = (objective.after_update(student, state, stats, None, jnp.int32(step)) for step in (0, 1))
    assert float(first["teacher"]["params"]["encoder"]["w"]) == 2.0
    assert float(first["teacher"]["batch_stats"]["encoder"]["m"]) == 6.0
    assert float(later["teacher"]["params"]["encoder"]["w"]) > 8.0 / 2
    assert float(later["teacher"]["batch_stats"]["encoder"]["m"]) == 8.0


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_no_gradient_comes_through_the_targets(name):
    objective, batch = method(name), picture_rows(ROWS)
    variables = unbox(fresh(objective, batch))
    viewed = Compiled(objective).views(batch, True)

    def of_projector(objective):
        def total(params, state):
            out = objective.loss(params, state, viewed, jax.random.key(0), 0, train=True)
            return next(iter(out.terms.values())).sum

        return jax.device_get(jax.jit(jax.grad(total, argnums=(0, 1)))(*variables.values()))

    by_params, by_state = of_projector(objective)
    assert np.abs(by_params["projector"]["layer_0"]["kernel"]).max() > 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(by_state.get("teacher", {})))
    if name == "simsiam":
        through, _ = of_projector(method(name, stop_gradient=False))
        assert np.abs(through["projector"]["layer_0"]["kernel"] - by_params["projector"]["layer_0"]["kernel"]).max() > 0


def test_a_queue_takes_the_teachers_keys_and_drops_the_oldest():
    objective, batch = method("moco_v3"), picture_rows(ROWS)
    after, _ = one_step(objective, fresh(objective, batch), batch)
    assert int(after.state["filled"]) == ROWS
    lengths = np.linalg.norm(after.state["queue"], axis=-1)
    np.testing.assert_allclose(lengths, [1.0] * ROWS + [0.0] * ROWS, atol=1e-5)


def test_a_centre_moves_towards_the_mean_of_the_teachers_scores():
    objective, batch = method("dino", centre_momentum=0.75), picture_rows(ROWS)
    variables = fresh(objective, batch)
    after, _ = one_step(objective, variables, batch)

    def scores():
        key = jax.random.split(jax.random.fold_in(jax.random.key(7), 3), 3)[0]
        views = objective.views(batch, key, 3, train=True)["views"][:2]
        own = unbox(variables)["state"]["teacher"]
        options = dict(deterministic=False, mutable=["batch_stats"], rngs={"dropout": key})
        seen, _ = objective.teacher_network.apply(own, views, **options)
        return jnp.concatenate([view.scores for view in seen])

    expected = 0.25 * np.asarray(jax.jit(scores)()).mean(0)
    np.testing.assert_allclose(after.state["centre"], expected, rtol=1e-3, atol=1e-5)
    encoder = objective.encoder(after.params, after.state)
    assert encoder["params"] is after.state["teacher"]["params"]["encoder"]


def test_without_batch_norm_dino_may_be_accumulated_and_the_others_may_not():
    head = HeadConfig(layers=2, hidden=16, out=8, norm=False)
    assert method("dino", projector=head).scope == "row"
    assert method("dino_sinkhorn").scope == "batch"
    assert method("infomax", projector=head, place_head=head).scope == "representations"
    assert method("infomax", projector=head).scope == "batch"  # places are normalised by all of the batch's
    make_train_step(method("dino", projector=head), None, None, seed=0, micro_batches=2)
    with pytest.raises(UserError, match="micro_batches is 2; SimClr compares all rows of a batch"):
        make_train_step(method("simclr"), None, None, seed=0, micro_batches=2)


def test_pictures_are_embedded_by_a_run_of_any_method():
    objective = method("simclr")
    assert EmbedPictures.serves(objective)
    variables = objective.encoder(*unbox(fresh(objective, picture_rows(2))).values())
    shape = jax.eval_shape(objective.encode, variables, {"image": picture_rows(3)["image"]}).shape
    assert shape == (3, TINY_VIT.width)


def test_one_row_has_no_spread_and_few_rows_no_directions():
    objective, batch = method("vicreg"), picture_rows(ROWS)
    variables = unbox(fresh(objective, batch))
    evaluate = jax.jit(make_eval_step(objective, seed=0))
    for rows, measured in ((1, set()), (7, {*objective.spreads}), (8, {*objective.spreads, *objective.ranks})):
        found = evaluate(*variables.values(), batch | {"valid": np.float32(np.arange(ROWS) < rows)})
        watched = (*objective.spreads, *objective.ranks)
        assert set(watched) & set(finish_means(jax.device_get(found), watched)) == measured, rows


def test_held_out_rows_that_are_fewer_than_a_batch_compares_are_told():
    config = RunConfig(batch_size=ROWS)
    (note,) = _told_apart(method("simclr"), config, {"eval_rows": 3})
    assert note.startswith("3 rows are held out and a batch has 8: ")
    assert _told_apart(method("simclr"), config, {"eval_rows": 8}) == []
    # Chance is the same for any number, whether rows go by themselves or through batch normalisation.
    for one in (method("dino", projector=FLAT), method("byol")):
        assert _told_apart(one, config, {"eval_rows": 3}) == []


def test_chances_are_those_of_guessing():
    assert method("simclr").chance({}) == pytest.approx(math.log(15))
    assert method("moco_v3", temperature=0.2).chance({}) == pytest.approx(0.8 * math.log(24))
    assert method("dino").chance({}) == pytest.approx(math.log(16))
    assert method("vicreg").chance({}) == pytest.approx(24.75)
    assert (method("byol").chance({}), method("simsiam").chance({})) == (4, 0)


def test_chance_is_that_of_the_rows_that_are_compared():
    few, many = {"eval_rows": 3}, {"eval_rows": 100}
    assert method("simclr").chance(few) == pytest.approx(math.log(5))
    assert method("moco_v3", temperature=0.2).chance(few) == pytest.approx(0.8 * math.log(19))
    assert method("infomax").chance(few) == pytest.approx(math.log(3))
    width = method("barlow_twins").pretext.projector.width(0)
    assert method("barlow_twins", redundancy=0.0, scale=1.0).chance(few) == pytest.approx(width * 1.5)
    for name in ("simclr", "moco_v3", "infomax", "barlow_twins"):
        assert method(name).chance(many) == method(name).chance({})


@pytest.mark.parametrize("name", ["simclr", "dinov2"])
def test_micro_batches_through_a_cache_of_representations_give_the_gradients_of_the_whole_batch(name):
    objective, batch = method(name, projector=FLAT), picture_rows(ROWS)
    assert objective.scope == "representations"
    variables = fresh(objective, batch)
    (whole, metrics), (parts, others) = (one_step(objective, variables, batch, micro_batches=n) for n in (1, 4))
    agree(whole.opt_state, parts.opt_state)
    agree(metrics, others)
    agree(whole.state, parts.state)
    assert np.abs(whole.opt_state["encoder"]["patches"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("simclr", dict(batch_size=1), r"batch_size is 1; SimClr compares the rows of a batch"),
        ("simclr", dict(micro_batches=2), r"micro_batches is 2; SimClr normalises by all rows of a batch"),
        ("simclr", dict(data__crop="host"), r"crop is 'host'.*all its views would be of the same part"),
        ("simclr", dict(pretext__temperature=0.0), r"temperature is 0\.0; expected more than 0"),
        (
            "byol",
            dict(pretext__predictor__out=32),
            r"predictor\.out is 32 and what it predicts, the projection, has 64",
        ),
        ("dino", dict(pretext__teacher_temperature=0.1), r"temperature is 0\.1 at first; above 0\.07 DINO does not"),
        ("ibot", dict(pretext__views__local_size=5), r"views of 5 pixels do not fit the model"),
        ("dino", dict(pretext__balance="center"), r"'center'; did you mean 'centre'"),
        ("swav", dict(pretext__prototypes=3000), r"batch_size 64 is too small for config\.pretext\.prototypes 3000"),
        ("moco_v3", dict(pretext__queue=100), r"queue is 100, no multiple of config\.batch_size 64"),
    ],
)
def test_what_cannot_be_or_is_known_to_fail_is_refused(name, changes, message):
    written = tiny_images(name, **changes).to_dict()
    with pytest.raises(UserError, match=message):
        objective_class(written).abstract(written)


def test_a_teacher_temperature_that_rises_to_a_high_one_is_welcome():
    pretext = DinoConfig(teacher_temperature=0.1, teacher_temperature_steps=10)
    assert float(pretext.teacher_temperature_at(jnp.int32(5))) == pytest.approx(0.07)
    assert float(pretext.teacher_temperature_at(jnp.int32(99))) == pytest.approx(0.1)

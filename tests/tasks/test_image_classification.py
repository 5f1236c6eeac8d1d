"""Image classification: targets, moving averages, rates by layer, a probe that leaves the encoder alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, Compiled, picture_rows, tiny_images

from sslx.augment.policy import NONE
from sslx.errors import UserError
from sslx.models.resnet import ResnetConfig
from sslx.settings import OptimizerConfig
from sslx.tasks.image_classification import ImageClassification, ImageClassificationConfig
from sslx.train.optimizer import make_optimizer
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_train_step

KEY, STEP = jax.random.key(1), jnp.int32(0)
RESNET = ResnetConfig(depth=10, width=2, stem="cifar", image_size=8)
NAMES = ("red", "green", "blue")


def objective_with(model=TINY_VIT, **task):
    return ImageClassification(ImageClassificationConfig(augment=NONE, **task), model, NAMES, False)


def labelled(rows=8):
    return picture_rows(rows) | {"label": (np.arange(rows) % 3).astype(np.int32)}


def coloured(rows=64):
    """Pictures of the colour that their label names: the mean of a channel is the share of its class."""
    label = np.random.default_rng(0).integers(0, 3, rows).astype(np.int32)
    images = np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[label][:, None, None], (rows, 8, 8, 3))
    return {"image": images, "label": label, "row": np.arange(rows, dtype=np.int32)}


def fresh(objective, batch):
    return unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())


def log_softmax(logits):
    return np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))


def test_the_loss_is_the_cross_entropy_with_smoothed_targets_in_training_alone():
    objective, batch = objective_with(label_smoothing=0.3), labelled()
    params = jax.tree.map(lambda array: array * 5.0, fresh(objective, batch)["params"])
    compiled = Compiled(objective)
    for train, smoothing in ((True, 0.3), (False, 0.0)):
        viewed = compiled.views(batch, train)
        targets = (1 - smoothing) * np.eye(3)[batch["label"]] + smoothing / 3
        np.testing.assert_allclose(viewed["targets"], targets, atol=1e-6)
        out = compiled.loss(params, {}, viewed, train)
        logits = compiled.logits(params, {}, viewed)
        expected = -(targets * log_softmax(logits)).sum()
        assert out.terms["classification"].sum == pytest.approx(expected, rel=1e-5)
        assert out.metrics["accuracy"].sum == (np.asarray(logits).argmax(-1) == batch["label"]).sum()


@pytest.mark.parametrize("mixing", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_targets_are_the_shares_of_what_is_seen(mixing):
    objective, batch = objective_with(**mixing), coloured()
    compiled = Compiled(objective)
    viewed = compiled.views(batch, True)
    image, targets = np.asarray(viewed["image"]), np.asarray(viewed["targets"])
    np.testing.assert_allclose(image.mean(axis=(1, 2)), targets, atol=1e-5)
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-5)
    others = batch["label"] != np.roll(batch["label"], -1)
    mixed = targets.max(-1) < 0.999
    assert mixed[others].mean() > 0.5
    assert not mixed[~others].any()
    whole = (np.abs(image - image[:, :1, :1]) < 1e-6).all(axis=(1, 2, 3))  # blended and not pasted
    by_kind = {"mixup": whole[mixed].all(), "cutmix": not whole[mixed].any()}
    if len(mixing) == 1:
        assert by_kind[next(iter(mixing))]
    else:
        assert 0.2 < whole[mixed].mean() < 0.8  # each row takes one of them
    plain = compiled.views(batch, False)
    np.testing.assert_array_equal(plain["targets"], np.eye(3)[batch["label"]])


@pytest.mark.parametrize("model", [TINY_VIT, RESNET], ids=["vit", "resnet"])
def test_moving_averages_of_parameters_and_statistics_are_what_is_evaluated(model):
    objective, batch = objective_with(model, ema=0.75), labelled()
    variables = fresh(objective, batch)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(0.1), seed=0))
    # A run that starts from another's parameters: the average that was made with the fresh ones is not theirs.
    params = jax.tree.map(lambda array: array + 0.01, variables["params"])
    state = TrainState(jnp.int32(0), params, variables["state"], optimizer.init(params))
    kept = None
    for number in range(3):
        state, _ = step(state, batch)
        now = {"params": state.params, **{name: of for name, of in state.state.items() if name != "ema"}}
        kept = now if number == 0 else jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, kept, now)
    assert set(kept) == ({"params", "batch_stats"} if model is RESNET else {"params"})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.state["ema"], kept)

    compiled, plain = Compiled(objective), Compiled(objective_with(model))
    kept_state = {name: of for name, of in kept.items() if name != "params"}
    viewed = compiled.views(batch, False)
    found = compiled.loss(state.params, state.state, viewed, False).terms["classification"].sum
    expected = plain.loss(kept["params"], kept_state, viewed, False).terms["classification"].sum
    raw_state = {name: of for name, of in state.state.items() if name != "ema"}
    raw = plain.loss(state.params, raw_state, viewed, False).terms["classification"].sum
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(found - raw) > 1e-5
    encoder = objective.encoder(state.params, state.state)
    assert set(encoder) == ({"params", "batch_stats"} if model is RESNET else {"params"})
    for name, of in encoder.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of, kept[name]["encoder"])


def test_rates_fall_by_layer_from_the_head_to_the_patches():
    model = dataclasses.replace(TINY_VIT, layers=3, positions="learned", registers=1, pool="attention")
    objective, batch = objective_with(model), labelled(2)
    boxed = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))["params"]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, layer_decay=0.5, clip_norm=None)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), boxed)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), unbox(boxed))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    # Adam's first update of gradients of 1 is the rate.
    rates = jax.tree.map(lambda update: -np.asarray(update) / 0.1, updates)
    encoder = rates["encoder"]
    for name in ("patches", "class_token", "registers", "position"):
        for leaf in jax.tree.leaves(encoder[name]):
            np.testing.assert_allclose(leaf, 0.5**4, rtol=1e-3)
    for leaf in jax.tree.leaves(encoder["transformer"]["layers"]):
        for layer, rate in enumerate((0.5**3, 0.5**2, 0.5)):
            np.testing.assert_allclose(leaf[layer], rate, rtol=1e-3)
    for part in (encoder["transformer"]["final_norm"], encoder["attention_pool"], rates["head"]):
        for leaf in jax.tree.leaves(part):
            np.testing.assert_allclose(leaf, 1.0, rtol=1e-3)


@pytest.mark.parametrize("model", [TINY_VIT, RESNET], ids=["vit", "resnet"])
def test_a_probe_normalises_frozen_features_by_the_batch(model):
    objective, batch = objective_with(model, probe=True), labelled()
    variables = fresh(objective, batch)
    params, state = variables["params"], variables["state"]
    compiled = Compiled(objective)
    viewed = compiled.views(batch, True)
    features = np.float64(compiled.encode(objective.encoder(params, state), viewed))
    head = jax.tree.map(np.float64, params["head"])
    mean, variance = features.mean(0), features.var(0)
    normed = (features - mean) / np.sqrt(variance + 1e-6)
    expected = -log_softmax(normed @ head["kernel"] + head["bias"])[np.arange(8), batch["label"]].sum()
    out = compiled.loss(params, state, viewed, True)
    assert out.terms["classification"].sum == pytest.approx(expected, rel=1e-3)

    gradient = jax.jit(
        jax.grad(lambda p: objective.loss(p, state, viewed, KEY, STEP, train=True).terms["classification"].sum)
    )
    by_part = gradient(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_part["encoder"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(by_part["head"]))

    after = objective.after_update(params, state, out.stats, KEY, STEP)["batch_stats"]
    np.testing.assert_allclose(after["norm"]["mean"], 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(after["norm"]["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    if model is RESNET:
        jax.tree.map(np.testing.assert_array_equal, after["encoder"], state["batch_stats"]["encoder"])
    # Evaluation goes by the running ones.
    normed = (features - 0.1 * mean) / np.sqrt(0.9 + 0.1 * variance + 1e-6)
    np.testing.assert_allclose(
        compiled.logits(params, {"batch_stats": after}, viewed), normed @ head["kernel"] + head["bias"], atol=1e-4
    )
    # Exported, the head does it: one linear layer on the features.
    head = objective.parts(params, {"batch_stats": after})["head"]
    np.testing.assert_allclose(
        features @ head["kernel"] + head["bias"],
        normed @ np.float64(params["head"]["kernel"]) + params["head"]["bias"],
        atol=1e-4,
    )
    with pytest.raises(UserError, match="micro_batches is 2; ImageClassification compares all rows"):
        make_train_step(objective, None, None, seed=0, micro_batches=2)


@pytest.mark.parametrize(
    "objective",
    [
        objective_with(dataclasses.replace(TINY_VIT, drop_path=0.3), mixup=0.8, cutmix=1.0, dropout=0.1),
        objective_with(probe=True),
    ],
    ids=["full", "probe"],
)
def test_views_losses_and_gradients_are_the_same_on_eight_devices(objective):
    variables = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), labelled(2)))())
    (one, metrics), (eight, others) = (one_step(objective, variables, labelled(), devices=n) for n in (1, 8))
    assert_close(one.opt_state, eight.opt_state)
    assert_close(one.state, eight.state)
    assert_close(metrics, others)
    assert np.abs(one.opt_state["head"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("linear", dict(optimizer__freeze=()), r"config\.task\.probe leaves the encoder as it is"),
        ("full", dict(task__mixup=-1.0), r"task\.mixup is -1"),
        ("full", dict(task__ema=1.0), r"task\.ema is 1"),
        ("full", dict(model__name="resnt"), "did you mean 'resnet'"),
    ],
)
def test_what_cannot_be_is_refused(argument, changes, message):
    with pytest.raises(UserError, match=message):
        ImageClassification.abstract(tiny_images("finetune/image_classification", argument, **changes).to_dict())

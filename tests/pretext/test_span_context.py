"""Context prediction: targets, distances and metrics against NumPy, the teacher, and that it learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from entries import REPOSITORY
from one_step import MESHES, assert_close, one_step
from scipy.special import erf

from sslx.config import build
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.bert import MODERN, BertConfig
from sslx.pretext.latent_targets import distance, normalised, variance
from sslx.pretext.span_context import SpanContext, SpanContextConfig
from sslx.settings import OptimizerConfig
from sslx.train.optimizer import make_optimizer
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, finish_means, make_eval_step, make_train_step

SIZE = dict(layers=2, width=32, heads=4, mlp_width=64, max_length=32)


@pytest.fixture(scope="module")
def make_objective(vocabulary):
    def make(dropout: float = 0.0, **pretext) -> SpanContext:
        model = BertConfig(**SIZE, **MODERN, dropout=dropout, attention_dropout=dropout, unroll=False)
        return SpanContext(SpanContextConfig(**{"top_layers": 2, "span": 3} | pretext), model, vocabulary, None)

    return make


@pytest.fixture(scope="module")
def objective(make_objective):
    return make_objective(target_norm="instance")


@pytest.fixture(scope="module")
def batch(packed_rows):
    return packed_rows(32, 24)


@pytest.fixture(scope="module")
def viewed(objective, batch):
    return jax.jit(lambda b: objective.views(b, jax.random.key(1), jnp.int32(0), train=True))(batch)


@pytest.fixture(scope="module")
def variables(objective, batch):
    """Boxed variables on the host; the teacher is another than the student."""
    fresh = jax.jit(lambda: objective.init(jax.random.key(0), batch))()
    other = jax.jit(lambda: objective.init(jax.random.key(1), batch))()
    return jax.device_get(jax.tree.map(lambda array: array * 5.0, {"params": fresh["params"], "state": other["state"]}))


@pytest.fixture(scope="module")
def plain(variables):
    return unbox(variables)


def loss_of(objective, params, state, batch, key=2):
    return objective.loss(params, state, batch, jax.random.key(key), jnp.int32(0), train=True)


def standardised(x, axis):
    return (x - x.mean(axis=axis, keepdims=True)) / np.sqrt(x.var(axis=axis, keepdims=True) + 1e-5)


@pytest.mark.parametrize("kind", ["layer", "instance"])
def test_targets_are_the_mean_of_the_top_layers_normalised_mlp_outputs(make_objective, plain, viewed, batch, kind):
    # Without attention each layer is its MLP, which NumPy can follow.
    objective = make_objective(target_norm=kind)
    teacher = jax.tree.map(np.asarray, plain["state"]["teacher"])
    layers = teacher["layers"]
    layers["attention"]["out"]["kernel"] = np.zeros_like(layers["attention"]["out"]["kernel"])
    found = jax.jit(objective.targets)(plain["params"], {"teacher": teacher}, viewed)

    tables = plain["params"]["encoder"]["embeddings"]
    norm = lambda x, scale: standardised(x, -1) * scale  # noqa: E731
    x = norm(np.float64(tables["word"])[batch["tokens"]] + tables["token_type"][0], tables["norm"]["scale"])
    real, outputs = batch["segment_ids"] > 0, []
    for layer in range(2):
        at = jax.tree.map(lambda array, layer=layer: np.float64(array[layer]), layers)
        seen = norm(x, at["mlp_norm"]["scale"])
        up = seen @ at["mlp"]["up"]["kernel"]
        hidden = up * 0.5 * (1 + erf(up / np.sqrt(2))) * (seen @ at["mlp"]["gate"]["kernel"])
        y = hidden @ at["mlp"]["down"]["kernel"]
        x = x + y
        if kind == "layer":
            outputs.append(standardised(y, -1))
        else:
            outputs.append(np.zeros_like(y))
            for row in range(32):
                outputs[-1][row, real[row]] = standardised(y[row, real[row]], 0)
    expected = np.take_along_axis(np.mean(outputs, axis=0), np.asarray(viewed["picked"])[..., None], 1)
    filled = np.asarray(viewed["weights"]["regression"]) > 0
    assert 0 < filled.sum() < filled.size
    np.testing.assert_allclose(np.asarray(found)[filled], expected[filled], atol=2e-3)

    # The last layer alone is another target.
    top = dataclasses.replace(objective, pretext=dataclasses.replace(objective.pretext, top_layers=1))
    found = jax.jit(top.targets)(plain["params"], {"teacher": teacher}, viewed)
    expected = np.take_along_axis(outputs[-1], np.asarray(viewed["picked"])[..., None], 1)
    np.testing.assert_allclose(np.asarray(found)[filled], expected[filled], atol=2e-3)


def test_normalising_over_a_row_leaves_out_its_padding():
    x = np.random.default_rng(0).normal(3.0, 2.0, (2, 7, 5)).astype(np.float32)
    segments = np.array([[1, 1, 2, 2, 0, 0, 0], [1] * 7], np.int32)
    found = np.asarray(normalised(jnp.asarray(x), jnp.asarray(segments), "instance"))
    np.testing.assert_allclose(found[0, :4], standardised(x[0, :4], 0), atol=1e-5)
    np.testing.assert_allclose(found[1], standardised(x[1], 0), atol=1e-5)
    np.testing.assert_allclose(
        normalised(jnp.asarray(x), jnp.asarray(segments), "layer"), standardised(x, -1), atol=1e-5
    )


def test_distances_are_the_square_and_smooth_l1():
    d = np.array([-6.0, -4.0, -1.0, 0.0, 0.5, 3.9, 10.0], np.float32)
    np.testing.assert_allclose(distance(d, 0.0), d**2)
    smooth = [0.5 * v * v / 4 if abs(v) < 4 else abs(v) - 2 for v in d.tolist()]
    np.testing.assert_allclose(distance(d, 4.0), smooth, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_term_and_its_metrics_are_those_of_numpy(make_objective, plain, viewed, beta):
    objective = make_objective(target_norm="instance", smooth_beta=beta)
    out = jax.jit(loss_of, static_argnums=0)(objective, plain["params"], plain["state"], viewed)
    targets = np.float64(jax.jit(objective.targets)(plain["params"], plain["state"], viewed))
    module = objective.module
    predicted = jax.jit(lambda: module.apply({"params": plain["params"]}, viewed, deterministic=True))()
    filled = np.asarray(viewed["weights"]["regression"]) > 0
    difference = (np.float64(predicted) - targets)[filled]
    size = np.abs(difference)
    each = np.where(size < beta, 0.5 * size**2 / beta, size - beta / 2) if beta else difference**2
    assert out.terms["regression"].sum == pytest.approx(each.mean(axis=-1).sum(), rel=1e-4)
    assert out.terms["regression"].coef == 1.0
    found = {name: float(mean.sum) / float(mean.weight) for name, mean in out.metrics.items()}
    assert found["error"] == pytest.approx((difference**2).mean(), rel=1e-4)
    assert found["target_variance"] == pytest.approx(targets[filled].var(axis=0).mean(), rel=1e-4)
    assert found["prediction_variance"] == pytest.approx(np.float64(predicted)[filled].var(axis=0).mean(), rel=1e-4)
    assert 0.5 < found["target_variance"] < 1.1  # of each layer 1, over all real tokens of a row


def test_no_gradient_reaches_the_teacher_or_passes_through_the_targets(objective, plain, viewed):
    params, state = plain["params"], plain["state"]
    total = lambda params, state: loss_of(objective, params, state, viewed).terms["regression"].sum  # noqa: E731
    by_params, by_state = jax.jit(jax.grad(total, argnums=(0, 1)))(params, state)
    targets = jax.device_get(jax.jit(objective.targets)(params, state, viewed))

    def alone(params):
        predicted = objective.module.apply({"params": params}, viewed, deterministic=True)
        return jnp.sum(viewed["weights"]["regression"] * jnp.mean((predicted - targets) ** 2, axis=-1))

    # The teacher shares the embeddings, whose gradient is the student's alone.
    assert_close(jax.device_get(jax.jit(jax.grad(alone))(params)), jax.device_get(by_params))
    assert np.abs(by_params["encoder"]["embeddings"]["word"]).max() > 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.device_get(by_state)))


def test_the_teacher_does_not_drop_out(make_objective, plain, viewed):
    objective = make_objective(dropout=0.3, target_norm="instance")
    one, other = (jax.jit(loss_of, static_argnums=0)(objective, *plain.values(), viewed, key) for key in (2, 3))
    assert one.metrics["target_variance"].sum == other.metrics["target_variance"].sum
    assert one.metrics["prediction_variance"].sum != other.metrics["prediction_variance"].sum


def test_the_teacher_is_the_moving_average_of_the_student(make_objective):
    objective = make_objective(ema_start=0.5, ema_end=0.9, ema_steps=4)
    rng = np.random.default_rng(0)
    students = rng.normal(size=(8, 3)).astype(np.float32)
    state, expected = {"teacher": {"w": np.full(3, 100.0, np.float32)}}, None
    for step, student in enumerate(students):
        params = {"encoder": {"transformer": {"w": jnp.asarray(student)}, "embeddings": {"word": jnp.ones(2)}}}
        state = objective.after_update(params, state, {}, jax.random.key(0), jnp.int32(step))
        momentum = 0.5 + 0.4 * min(step / 4, 1.0)
        # The first update copies the student, whatever the teacher was.
        expected = np.float64(student) if step == 0 else momentum * expected + (1 - momentum) * student
        assert state["teacher"]["w"].dtype == jnp.float32
        np.testing.assert_allclose(state["teacher"]["w"], expected, rtol=1e-5)
    assert set(state["teacher"]) == {"w"}  # no embeddings


def test_a_small_step_towards_the_student_is_not_rounded_away(make_objective):
    objective = make_objective(ema_start=0.9999, ema_end=0.9999)
    state = {"teacher": {"w": np.float32(1.0)}}
    params = {"encoder": {"transformer": {"w": jnp.asarray(1.5, jnp.bfloat16)}}}
    after = objective.after_update(params, state, {}, jax.random.key(0), jnp.int32(9))
    assert float(after["teacher"]["w"]) == pytest.approx(1.00005, abs=1e-6)


def test_the_teacher_lies_where_its_student_lies(variables):
    names = lambda tree: [leaf.names for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))]  # noqa: E731
    assert names(variables["state"]["teacher"]) == names(variables["params"]["encoder"]["transformer"])


def test_one_device_and_eight_give_the_same_loss_gradients_and_teacher_with_dropout(make_objective, variables, batch):
    objective = make_objective(dropout=0.1, target_norm="instance")
    after, metrics = one_step(objective, variables, batch)
    eight_after, eight_metrics = one_step(objective, variables, batch, MESHES["all"], 8)
    assert_close(metrics, eight_metrics)
    assert_close(after.opt_state, eight_after.opt_state)
    assert_close(after.state, eight_after.state)


def test_accumulation_equals_the_full_batch_and_moves_the_teacher_once(objective, variables, batch):
    after, metrics = one_step(objective, variables, batch)
    split_after, split_metrics = one_step(objective, variables, batch, MESHES["data"], 8, micro_batches=4)
    for name in ("loss", "error", "grad_norm"):
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    assert_close(after.opt_state, split_after.opt_state)
    assert_close(after.state, split_after.state)
    old, student = unbox(variables)["state"]["teacher"], after.params["encoder"]["transformer"]
    moved = jax.tree.map(lambda a, b: 0.999 * np.float64(a) + 0.001 * np.float64(b), old, student)
    assert_close(moved, after.state["teacher"], share=1e-4)


def test_the_best_constant_explains_nothing_and_a_constant_has_no_variance(objective, plain, batch):
    viewed = jax.jit(lambda b: objective.views(b, jax.random.key(0), jnp.int32(0), train=False))(batch)
    targets = np.asarray(jax.jit(objective.targets)(plain["params"], plain["state"], viewed))
    weights = np.asarray(viewed["weights"]["regression"])
    mean = targets[weights > 0].mean(axis=0)
    head = {"kernel": jnp.zeros((64, 32)), "bias": jnp.asarray(mean)}
    params = plain["params"] | {"regression_head": plain["params"]["regression_head"] | {"down": head}}
    evaluate = jax.jit(make_eval_step(objective, seed=0))
    # Evaluation draws its masks from another key; the constant is the best one for one set of places alone.
    found = finish_means(evaluate(params, plain["state"], batch | {"valid": np.ones(32, np.float32)}))
    assert objective.derive(found)["explained"] == pytest.approx(0.0, abs=0.02)
    assert found["prediction_variance"] == pytest.approx(0.0, abs=1e-9)
    assert float(variance(jnp.asarray(targets), jnp.asarray(weights))) == pytest.approx(
        targets[weights > 0].var(axis=0).mean(), rel=1e-4
    )
    assert objective.chance({"unigram_entropy": 5.0}) is None


def test_the_product_is_the_student(objective, plain, batch):
    variables = objective.encoder(plain["params"], plain["state"])
    assert variables["params"] is plain["params"]["encoder"]
    assert jax.eval_shape(objective.encode, variables, batch).shape == (32, 32)


def test_the_published_size_steps_as_fairseq_does_whose_loss_is_a_sum_over_the_width():
    written = load_config(REPOSITORY / "configs" / "span_context.py", "base")
    width = written.model.width
    assert width == 768
    optimizer = make_optimizer(
        build(OptimizerConfig, written.optimizer.to_dict(), "config.optimizer"),
        optax.constant_schedule(1.0),
        params := {"kernel": jnp.zeros((3, 4))},
    )
    state, m, v = optimizer.init(params), 0.0, 0.0
    # The first gradient is clipped, the second is not; some columns are as small as eps.
    for step, size in enumerate((10.0, 1.0), 1):
        summed = size * np.random.default_rng(step).normal(size=(3, 4)) * np.array([1.0, 1.0, 1e-6, 1e-7])
        found, state = optimizer.update({"kernel": jnp.float32(summed / width)}, state, params)
        clipped = summed * min(1.0, 5.0 / np.linalg.norm(summed))
        assert (np.linalg.norm(summed) > 5.0) == (step == 1)
        m, v = 0.9 * m + 0.1 * clipped, 0.98 * v + 0.02 * clipped**2
        expected = -(m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-6)
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_is_refused(tiny_config):
    for change, message in {
        ("span", 0): "span is 0; expected at least 1",
        ("mask_ratio", 1.0): "mask_ratio is 1.0; expected a share",
        ("ema_end", 1.5): "ema_end is 1.5; expected 0 to 1",
        ("smooth_beta", -1.0): "smooth_beta is -1.0",
        ("target_norm", "instnce"): "did you mean 'instance'",
    }.items():
        with pytest.raises(UserError, match=message):
            SpanContextConfig(**dict([change]))
    written = tiny_config("span_context", {"pretext.top_layers": 3}).to_dict()
    with pytest.raises(UserError, match=r"top_layers 3 is more than config.model.layers 2"):
        SpanContext.abstract(written)


def test_a_tiny_student_explains_its_teacher(make_objective):
    # Rows count upwards, so a masked span follows from what is around it.
    rng = np.random.default_rng(0)
    tokens = (5 + (rng.integers(0, 40, (32, 1)) + np.arange(24)) % 40).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones((32, 24), np.int32),
        "positions": np.tile(np.arange(24, dtype=np.int32), (32, 1)),
        "row": np.arange(32, dtype=np.int32),
    }
    objective = make_objective(target_norm="instance", ema_start=0.95, ema_end=0.99, ema_steps=200)
    variables = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 30, 400))
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(0.0), seed=0), donate_argnums=0)
    state = TrainState(jnp.int32(0), variables["params"], variables["state"], optimizer.init(variables["params"]))
    history = []
    for _ in range(400):
        state, metrics = step(state, batch)
        history.append(metrics)
    last = {name: np.mean([m[name] for m in history[-20:]]) for name in history[0]}
    assert objective.derive(jax.device_get(history[0]))["explained"] < 0.1
    assert objective.derive(last)["explained"] > 0.5
    assert last["target_variance"] > 0.5
    assert last["prediction_variance"] > 0.25

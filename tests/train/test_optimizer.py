"""Optimizers and schedules against NumPy float64, on parameters of which some are stacks of layers."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sslx.errors import UserError
from sslx.settings import OptimizerConfig
from sslx.train.optimizer import make_decay, make_optimizer, make_schedule
from sslx.train.sharding import unbox

LAYERS = 3
SHAPES = {  # name: (shape, axis names)
    "encoder/embeddings/word": ((5, 4), ("vocab", "embed")),
    "encoder/embeddings/norm/scale": ((4,), ("norm",)),
    "encoder/transformer/layers/mlp/up/kernel": ((LAYERS, 4, 6), ("layers", "embed", "mlp")),
    "encoder/transformer/layers/mlp/up/bias": ((LAYERS, 6), ("layers", "mlp")),
    "encoder/transformer/layers/mlp_norm/scale": ((LAYERS, 4), ("layers", "norm")),
    "head/kernel": ((4, 2), ("embed", "types")),
    "head/bias": ((2,), ("types",)),
}
UNDECAYED = {name for name in SHAPES if name.endswith(("bias", "norm/scale"))}
BOXED = {
    name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
    for name, (shape, names) in SHAPES.items()
}
CONFIG = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.02, clip_norm=None)


def nested(flat):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat, sep="/")


def flat(tree):
    from flax.traverse_util import flatten_dict

    return {name: np.asarray(array) for name, array in flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def data():
    """Parameters, and gradients of five steps, of very different sizes from layer to layer."""
    rng = np.random.default_rng(0)
    sizes = {"layers": 10.0 ** np.arange(LAYERS)}

    def draw(shape, names):
        scale = sizes.get(names[0], np.ones(1)).reshape(-1, *(1,) * (len(shape) - 1))
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return [{name: draw(*SHAPES[name]) for name in SHAPES} for _ in range(6)]


def optimized(config, data, steps=5):
    """Parameters after each step."""
    schedule = make_schedule(config, 100)
    optimizer = make_optimizer(config, schedule, nested(BOXED), make_decay(config, 8))
    params = nested(jax.tree.map(jnp.asarray, data[0]))
    state, after = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradients in data[1 : steps + 1]:
        updates, state = update(nested(gradients), state, params)
        params = optax.apply_updates(params, updates)
        after.append(flat(params))
    return after


def layers_of(name, array):
    """Views of what is one tensor to the optimizer: each layer of a stack by itself."""
    return list(array) if SHAPES[name][1][0] == "layers" else [array]


def reference(config, data, steps=5, rate=lambda name, layer: 1.0):
    """AdamW (arXiv 1711.05101) and LAMB (arXiv 1904.00962, algorithm 2), tensor by tensor."""
    params = {name: array.astype(np.float64) for name, array in data[0].items()}
    first = {name: np.zeros_like(array) for name, array in params.items()}
    second = {name: np.zeros_like(array) for name, array in params.items()}
    after = []
    for t, gradients in enumerate(data[1 : steps + 1], 1):
        norm = math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in gradients.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name in params:
            g = clip * np.float64(gradients[name])
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            update = first[name] / (1 - config.beta1**t)
            update = update / (np.sqrt(second[name] / (1 - config.beta2**t)) + config.eps)
            if name not in UNDECAYED:
                update = update + config.weight_decay * params[name]
            for layer, (w, u) in enumerate(zip(layers_of(name, params[name]), layers_of(name, update), strict=True)):
                adapted = config.name == "lamb" and name not in UNDECAYED  # as in the authors' implementation
                trust = np.linalg.norm(w) / np.linalg.norm(u) if adapted else 1.0
                w -= config.learning_rate * rate(name, layer) * trust * u
        after.append({name: array.copy() for name, array in params.items()})
    return after


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=3e-5, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_are_the_papers_layer_by_layer(data, name, clip_norm):
    config = dataclasses.replace(CONFIG, name=name, clip_norm=clip_norm)
    assert_close(optimized(config, data), reference(config, data))


def orthogonalised(matrix):
    """Five quintic Newton-Schulz steps (Jordan et al. 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize(("name", "clip"), [("sgd", False), ("lars", False), ("lars", True)])
def test_sgd_and_lars_gather_momentum_of_decayed_gradients(data, name, clip):
    config = dataclasses.replace(CONFIG, name=name, momentum=0.9, trust=0.02, trust_clip=clip, unadapted_scale=0.3)
    params = {key: array.astype(np.float64) for key, array in data[0].items()}
    velocity = {key: np.zeros_like(array) for key, array in params.items()}
    expected = []
    for gradients in data[1:]:
        for key, param in params.items():
            decay = 0.0 if key in UNDECAYED else config.weight_decay
            parts = zip(*(layers_of(key, of) for of in (param, np.float64(gradients[key]), velocity[key])), strict=True)
            for w, g, v in parts:
                local = 1.0
                if name == "lars" and key not in UNDECAYED:  # arXiv 1708.03888, formula 6
                    local = 0.02 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
                    local = min(local / config.learning_rate, 1.0) if clip else local
                elif name == "lars":
                    local = 0.3
                v[...] = 0.9 * v + local * (g + decay * w)
                w -= config.learning_rate * v
        expected.append({key: array.copy() for key, array in params.items()})
    assert_close(optimized(config, data), expected)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_weight_decay_goes_to_its_end_by_half_a_cosine(data, name):
    config = dataclasses.replace(CONFIG, name=name, weight_decay=0.1, weight_decay_end=0.5, momentum=0.0, trust=0.02)
    still = [data[0]] + 5 * [{key: np.zeros(shape, np.float32) for key, (shape, _) in SHAPES.items()}]
    rates = [0.5 - 0.4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(5)]
    # LARS leaves the rate of what has no gradient as it is.
    left = np.prod([1 - config.learning_rate * rate for rate in rates])
    after = optimized(config, still)[-1]
    for key, array in data[0].items():
        np.testing.assert_allclose(after[key], array if key in UNDECAYED else left * array, rtol=1e-5, err_msg=key)


def test_what_is_constant_is_trained_at_the_peak_rate_throughout(data):
    config = dataclasses.replace(CONFIG, name="sgd", momentum=0.0, weight_decay=0.0, schedule="linear")
    after = optimized(dataclasses.replace(config, schedule_steps=5, constant=("^head/",)), data)[-1]
    for key, array in data[0].items():
        rates = np.full(5, 0.1) if key.startswith("head/") else 0.1 * (1 - np.arange(5) / 5)
        expected = array - sum(rate * step[key] for rate, step in zip(rates, data[1:], strict=True))
        np.testing.assert_allclose(after[key], expected, rtol=1e-4, atol=1e-4, err_msg=key)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam(data):
    config = dataclasses.replace(CONFIG, name="muon", momentum=0.9)
    after = optimized(config, data)
    expected = reference(config, data)
    name = "encoder/transformer/layers/mlp/up/kernel"
    params, momentum = np.float64(data[0][name]), np.zeros(SHAPES[name][0])
    for t, gradients in enumerate(data[1:6], 1):
        g = np.float64(gradients[name])
        momentum = 0.9 * momentum + 0.1 * g
        looked_ahead = 0.9 * momentum / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        for layer in range(LAYERS):
            update = 0.2 * math.sqrt(6) * orthogonalised(looked_ahead[layer])
            params[layer] -= config.learning_rate * (update + config.weight_decay * params[layer])
        expected[t - 1][name] = params.copy()
    assert_close(after, expected)
    moved = (after[0][name] - data[0][name]) / config.learning_rate + config.weight_decay * data[0][name]
    values = np.linalg.svd(moved / (0.2 * math.sqrt(6)), compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_biases_and_norms_of_stacked_layers_do_not_decay(data):
    still = [data[0], {name: np.zeros(shape, np.float32) for name, (shape, _) in SHAPES.items()}]
    (after,) = optimized(CONFIG, still, 1)
    moved = {name for name in SHAPES if (after[name] != data[0][name]).any()}
    assert moved == set(SHAPES) - UNDECAYED


def test_layer_decay_multiplies_the_rate_by_depth(data):
    def rate(name, layer):
        if "embeddings" in name:
            return 0.5 ** (LAYERS + 1)
        return 0.5 ** (LAYERS - layer) if "/layers/" in name else 1.0

    config = dataclasses.replace(CONFIG, layer_decay=0.5)
    assert_close(optimized(config, data), reference(config, data, rate=rate))


@pytest.mark.parametrize(
    "changes", [{}, {"name": "lamb"}, {"name": "muon"}, {"layer_decay": 0.5}, {"clip_norm": 1.0}], ids=str
)
def test_frozen_parameters_stay_bit_equal_and_the_others_train(data, changes):
    config = dataclasses.replace(CONFIG, freeze=("embeddings/", r"mlp/up/"), **changes)
    after = optimized(config, data)[-1]
    for name in SHAPES:
        frozen = "embeddings" in name or "mlp/up" in name
        assert frozen == (after[name].tobytes() == data[0][name].tobytes()), name
    trained = [{n: a for n, a in step.items() if not ("embeddings" in n or "mlp/up" in n)} for step in data]
    rate = lambda name, layer: 0.5 ** (LAYERS - layer) if "/layers/" in name else 1.0  # noqa: E731
    # Muon's only matrix in a stack is frozen here, so that AdamW is what remains.
    expected = reference(config, trained, rate=rate) if "layer_decay" in changes else reference(config, trained)
    assert_close([after], [expected[-1]])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "lamb"},
        {"name": "muon"},
        {"name": "sgd"},
        {"name": "lars"},
        {"freeze": ("head",)},
        {"layer_decay": 0.5},
        {"constant": ("head",)},
        {"weight_decay_end": 0.4},
        {"moments": "bfloat16"},
    ],
    ids=str,
)
def test_a_held_update_leaves_the_whole_state_as_it_is_to_the_bit(data, changes):
    config = dataclasses.replace(CONFIG, clip_norm=1.0, **changes)
    optimizer = make_optimizer(config, make_schedule(config, 100), nested(BOXED), make_decay(config, 100))
    params, update = nested(data[0]), jax.jit(optimizer.update)
    _, before = update(nested(data[1]), optimizer.init(params), params)
    broken = jax.tree.map(lambda gradient: gradient * np.nan, nested(data[2]))
    _, held = update(broken, before, params, held=jnp.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, held, before)
    found, after = update(nested(data[2]), before, params, held=jnp.bool_(False))
    expected, _ = update(nested(data[2]), before, params)
    assert_close([flat(found)], [flat(expected)])
    moved = [(one != other).any() for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert sum(moved) >= len(SHAPES) - 2 * ("freeze" in changes)


def formula(schedule, step, total, warmup, peak, final, share):
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min((step - warmup) / (total - warmup), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak + (final - 1) * peak * t
    if schedule == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * t)) / 2)
    fall = round(share * total)
    return peak * (1 - (1 - final) * min(max(step - (total - fall), 0) / fall, 1))


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "trapezoid"])
def test_schedules(schedule, warmup):
    config = OptimizerConfig(learning_rate=0.3, schedule=schedule, warmup_steps=warmup, final_scale=0.1)
    found = make_schedule(config, 50)
    for step in range(60):
        expected = formula(schedule, step, 50, warmup, 0.3, 0.1, 0.2)
        assert float(found(step)) == pytest.approx(expected, rel=1e-5), step


def test_the_schedule_keeps_its_written_length():
    config = OptimizerConfig(schedule_steps=50, warmup_steps=5)
    for step in (0, 20, 49):
        assert float(make_schedule(config, 1000)(step)) == float(make_schedule(config, 50)(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamv"}, "unknown config.optimizer.name 'adamv'; did you mean 'adamw'"),
        ({"freeze": ("embedings/",)}, "freeze pattern 'embedings/' matches no parameter"),
        ({"freeze": ("(",)}, r"config.optimizer.freeze '\(' is no regular expression"),
        ({"no_decay": ("[",)}, r"config.optimizer.no_decay '\[' is no regular expression"),
    ],
)
def test_mistakes_are_named(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=message):
        make_optimizer(config, make_schedule(config, 10), nested(BOXED))


def test_a_warm_up_as_long_as_the_schedule_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps 10 is not below the schedule's 10 steps; expected 0 to 9"):
        make_schedule(OptimizerConfig(warmup_steps=10), 10)


def test_layer_decay_needs_a_stack():
    alone = {"head": {"kernel": BOXED["head/kernel"]}}
    config = dataclasses.replace(CONFIG, layer_decay=0.5)
    with pytest.raises(UserError, match=r"layer_decay 0\.5 needs one stack of layers; the model has 0"):
        make_optimizer(config, make_schedule(config, 10), alone)


def test_moments_are_float32_and_lie_with_their_parameters():
    shapes = jax.eval_shape(make_optimizer(CONFIG, make_schedule(CONFIG, 10), nested(BOXED)).init, nested(unbox(BOXED)))
    arrays = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in arrays) == 2 * sum(math.prod(shape) for shape, _ in SHAPES.values())

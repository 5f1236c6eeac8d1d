"""Optimizer and schedule from the config; every rule that looks at a parameter as a matrix does so layer by layer.

Scanned layers are stacks ``[layers, ...]``. LAMB's and LARS's trust ratios, Muon's orthogonal updates, the decay mask
and layer-wise rates treat each layer of a stack by itself, so that scanning changes nothing about the training.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sslx.errors import UserError, choose, nearest
from sslx.settings import OptimizerConfig
from sslx.train.rounding import tree_rounded_at_random
from sslx.train.sharding import is_box, parameter_name

# Beside what the config says: colours of pixels, which nothing may change; and what the recipes of ViTs leave alone.
UNDECAYED = (
    r"/codebook$",
    r"layer_scale$",
    r"encoder/(class_token|registers|position)$",
    r"(^|/)(mask_token|probe)$",
)
# Of text encoders, and of a ViT: what comes before the layers.
_EMBEDDING = re.compile(r"embeddings/|encoder/(patches/|class_token|registers|position)")
OPTIMIZERS = ("adamw", "lamb", "muon", "sgd", "lars")
MOMENTS = ("float32", "bfloat16")
# The size of AdamW's updates: with Muon's scaled to it, learning rates and decay carry over (arXiv 2502.16982).
MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then ``config.schedule`` down to ``final_scale`` of the peak.

    Args:
      config: The optimizer's settings.
      steps: Length of the schedule if ``config.schedule_steps`` is None.

    Raises:
      UserError: the warm-up is as long as the schedule.
    """
    total, warmup, peak = config.schedule_steps or steps, config.warmup_steps, config.learning_rate
    if warmup >= total:
        raise UserError(
            f"config.optimizer.warmup_steps {warmup} is not below the schedule's {total} steps; "
            f"expected 0 to {total - 1}"
        )
    end, rest = peak * config.final_scale, total - warmup
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    else:
        fall = max(1, round(config.cooldown_share * total))
        after = optax.linear_schedule(peak, end, min(fall, rest), transition_begin=max(0, rest - fall))
    # Step 0 already moves: a first update at rate 0 would be a wasted batch.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_decay(config: OptimizerConfig, steps: int) -> optax.Schedule | None:
    """Weight decay by step, as DINO's rises (arXiv 2104.14294); None where it stays.

    Args:
      config: The optimizer's settings.
      steps: Length of the schedule if ``config.schedule_steps`` is None.
    """
    start, end, total = config.weight_decay, config.weight_decay_end, config.schedule_steps or steps
    if end is None:
        return None

    def decay(step: jax.Array) -> jax.Array:
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1.0)))

    return decay


def check_optimizer(config: OptimizerConfig) -> None:
    """Checks what can be wrong with an optimizer whatever the model, so that it is told before any data is prepared.

    Raises:
      UserError: it is unknown, or a pattern is no regular expression.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown config.optimizer.name {config.name!r}; {nearest(config.name, OPTIMIZERS)}")
    choose(config.moments, MOMENTS, "config.optimizer.moments")
    if config.moments != "float32" and config.name in ("sgd", "lars"):
        raise UserError(
            f"config.optimizer.moments is {config.moments}, and {config.name} has momentum alone; expected float32"
        )
    _compiled(config.no_decay, "no_decay")
    _compiled(config.freeze, "freeze")
    _compiled(config.constant, "constant")


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, boxed_params: Any, decay: optax.Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """The chain: clip, moments, decay, trust ratio (LAMB), layer-wise rates, learning rate, freezing.

    Of SGD and LARS: clip, decay, trust ratio (LARS), momentum, layer-wise rates, learning rate, freezing. Its
    ``update`` also takes ``held`` bool[]: where it is True, the state stays as it is and the updates mean nothing.

    Args:
      config: The optimizer's settings.
      schedule: Learning rate by step.
      boxed_params: Abstract parameters with logical axis names; they say which arrays are stacks of layers.
      decay: Weight decay by step; None: as the config says throughout.

    Raises:
      UserError: as `check_optimizer`, or a pattern matches no parameter.
    """
    check_optimizer(config)
    stacked = _map_boxed(lambda _, leaf: (getattr(leaf, "names", None) or (None,))[0] == "layers", boxed_params)
    decayed = jax.tree.map(
        lambda hit: not hit, _matches((*config.no_decay, *UNDECAYED), boxed_params, "no_decay", required=False)
    )
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decaying = _decaying(decay, decayed) if decay else optax.add_decayed_weights(config.weight_decay, mask=decayed)
    kinds = jax.tree.map(_Adapted, stacked, decayed)
    if config.name == "lars":
        chain += [_scale_by_lars(config, schedule, decay, kinds), _holding(optax.trace(config.momentum))]
    elif config.name == "sgd":
        chain += [decaying, _holding(optax.trace(config.momentum))]
    else:
        moments = _scale_by_adam(config.beta1, config.beta2, config.eps, config.moments)
        chain.append(_muon(config, moments, boxed_params) if config.name == "muon" else moments)
        chain.append(decaying)
    if config.name == "lamb":
        chain.append(_scale_by_layer_trust_ratio(kinds))
    if config.layer_decay != 1.0:
        chain.append(_scale_by_layer_rate(_layer_rates(config.layer_decay, stacked, boxed_params)))
    if config.constant:
        constant = _matches(config.constant, boxed_params, "constant")
        chain.append(_scale_by_rates(schedule, config.learning_rate, constant))
    else:
        chain.append(_holding(optax.scale_by_learning_rate(schedule)))
    optimizer = optax.chain(*chain)
    if config.freeze:
        # Zero gradients alone would not do: weight decay would still move a frozen weight.
        labels = jax.tree.map(
            lambda hit: "frozen" if hit else "trained", _matches(config.freeze, boxed_params, "freeze")
        )
        optimizer = optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    return optax.with_extra_args_support(optimizer)


def unless(held: jax.Array | bool, new: Any, old: Any) -> Any:
    """A tree as it was where ``held``, else the new one."""
    return jax.tree.map(lambda after, before: jnp.where(held, before, after), new, old)


def _holding(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner``, whose state stays as it is where ``held``."""

    def update(
        updates: Any, state: Any, params: Any = None, *, held: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state, params)
        return updates, unless(held, after, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _scale_by_adam(beta1: float, beta2: float, eps: float, kept_in: str) -> optax.GradientTransformationExtraArgs:
    """As ``optax.scale_by_adam``, whose state stays as it is where ``held`` and may be bfloat16, rounded at random.

    Updates are made of the moments that are kept. Made of others, these would have to be there beside the old ones: XLA
    then copied three quarters of the optimizer's state in each step (a BERT of 3 layers took 6 % longer).
    """
    moment, of_squares = optax.tree.update_moment, optax.tree.update_moment_per_elem_norm
    inner = optax.scale_by_adam(beta1, beta2, eps)

    def init(params: Any) -> optax.ScaleByAdamState:
        state = inner.init(params)
        return state._replace(mu=optax.tree.cast(state.mu, kept_in), nu=optax.tree.cast(state.nu, kept_in))

    def kept(moments: Any, count: jax.Array, number: int) -> Any:
        if kept_in == "float32":
            return moments
        # Of the update's number, so that a resumed run rounds as it would have.
        return tree_rounded_at_random(moments, jax.random.fold_in(jax.random.key(number), count))

    def update(
        updates: Any, state: Any, params: Any = None, *, held: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, Any]:
        mu, nu = (optax.tree.cast(of, jnp.float32) for of in (state.mu, state.nu))
        mu = unless(held, kept(moment(updates, mu, beta1, 1), state.count, 1), state.mu)
        nu = unless(held, kept(of_squares(updates, nu, beta2, 2), state.count, 2), state.nu)
        count = optax.safe_increment(state.count)
        moments = ((optax.tree.cast(of, jnp.float32), beta) for of, beta in ((mu, beta1), (nu, beta2)))
        first, second = (optax.tree.bias_correction(of, beta, count) for of, beta in moments)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return updates, optax.ScaleByAdamState(jnp.where(held, state.count, count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _muon(config: OptimizerConfig, moments: optax.GradientTransformation, boxed: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the stacks of layers, ``moments`` for everything else."""
    # Kernels of a stack are [layers, in, out]: each layer is orthogonalised by itself.
    of_stack = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def numbers(updates: Any) -> Any:
        return jax.tree.map(lambda _: of_stack, updates)

    def to_size(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda update: update * (MUON_RMS * max(update.shape[1:]) ** 0.5), updates)

    momentum = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=numbers)
    orthogonal = optax.chain(_holding(momentum), optax.stateless(to_size))

    def label(_: Any, leaf: Any) -> str:
        names = getattr(leaf, "names", None) or (None,)
        return "matrix" if names[0] == "layers" and len(names) == 3 else "other"

    return optax.multi_transform({"matrix": orthogonal, "other": moments}, _map_boxed(label, boxed))


def _map_boxed(function: Any, boxed: Any) -> Any:
    return jax.tree_util.tree_map_with_path(function, boxed, is_leaf=is_box)


def _compiled(patterns: tuple[str, ...], field: str) -> list[re.Pattern]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"config.optimizer.{field} {error.pattern!r} is no regular expression: {error}") from None


def _matches(patterns: tuple[str, ...], boxed: Any, field: str, *, required: bool = True) -> Any:
    compiled = _compiled(patterns, field)
    hits = _map_boxed(lambda path, _: any(p.search(parameter_name(path)) for p in compiled), boxed)
    if required:
        names = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)]
        for pattern in compiled:
            if not any(pattern.search(name) for name in names):
                raise UserError(
                    f"config.optimizer.{field} pattern {pattern.pattern!r} matches no parameter; "
                    f"{nearest(pattern.pattern, names)}"
                )
    return hits


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """How LAMB and LARS treat an array: each layer of a stack by itself; not at all if it is not decayed."""

    stacked: bool
    adapted: bool


def _scale_by_layer_trust_ratio(kinds: Any) -> optax.GradientTransformation:
    """LAMB's ``|w| / |u|`` (You et al. 2019, arXiv 1904.00962), one ratio for each layer of a stack."""

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        weight_norm, update_norm = jnp.linalg.norm(param), jnp.linalg.norm(update)
        usable = (weight_norm > 0) & (update_norm > 0)
        return update * jnp.where(usable, weight_norm / jnp.where(usable, update_norm, 1.0), 1.0)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(update: jax.Array, kind: _Adapted, param: jax.Array) -> jax.Array:
            if not kind.adapted:
                return update
            return (jax.vmap(scale) if kind.stacked else scale)(update, param)

        return _map_trained(one, updates, kinds, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _counting(change: Callable[[jax.Array, Any, Any], Any]) -> optax.GradientTransformationExtraArgs:
    """What ``change(step, updates, params)`` makes of updates."""

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> tuple[Any, Any]:
        return change(state.count, updates, params), optax.ScaleByScheduleState(state.count + 1)

    inner = optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)
    return _holding(inner)


def _decaying(decay: optax.Schedule, decayed: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.add_decayed_weights`` by a schedule."""

    def change(step: jax.Array, updates: Any, params: Any) -> Any:
        rate = decay(step)
        return _map_trained(lambda u, hit, param: u + rate * param if hit else u, updates, decayed, params)

    return _counting(change)


def _scale_by_rates(schedule: optax.Schedule, peak: float, constant: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_learning_rate``, but for what is trained at the peak throughout (SimSiam's predictor)."""

    def change(step: jax.Array, updates: Any, params: Any) -> Any:
        rate = schedule(step)
        return _map_trained(lambda u, hit: -(peak if hit else rate) * u, updates, constant)

    return _counting(change)


def _scale_by_lars(
    config: OptimizerConfig, schedule: optax.Schedule, decay: optax.Schedule | None, kinds: Any
) -> optax.GradientTransformationExtraArgs:
    """LARS's decay and local rate ``trust |w| / (|g| + decay |w|)`` (You et al. 2017, arXiv 1708.03888).

    With ``trust_clip`` a layer's whole rate is at most the scheduled one (LARC). What is not decayed, biases and norms,
    is not adapted either and has the rate times ``unadapted_scale``. Momentum comes after: it gathers updates that are
    scaled already.
    """

    def change(step: jax.Array, updates: Any, params: Any) -> Any:
        rate, weight_decay = schedule(step), decay(step) if decay else config.weight_decay

        def scale(gradient: jax.Array, param: jax.Array) -> jax.Array:
            weight_norm, gradient_norm = jnp.linalg.norm(param), jnp.linalg.norm(gradient)
            usable = (weight_norm > 0) & (gradient_norm > 0)
            below = jnp.where(usable, gradient_norm + weight_decay * weight_norm, 1.0)
            local = jnp.where(usable, config.trust * weight_norm / below, 1.0)
            if config.trust_clip:
                local = jnp.minimum(local / jnp.maximum(rate, 1e-12), 1.0)
            return local * (gradient + weight_decay * param)

        def one(gradient: jax.Array, kind: _Adapted, param: jax.Array) -> jax.Array:
            if not kind.adapted:
                return config.unadapted_scale * gradient
            return (jax.vmap(scale) if kind.stacked else scale)(gradient, param)

        return _map_trained(one, updates, kinds, params)

    return _counting(change)


def _layer_rates(decay: float, stacked: Any, boxed: Any) -> Any:
    """Multipliers: embeddings are layer 0, the stack's layers 1 to L, everything after them L + 1 (as in BEiT)."""
    depths = {
        leaf.value.shape[0] if is_box(leaf) else leaf.shape[0]
        for leaf, stack in zip(jax.tree.leaves(boxed, is_leaf=is_box), jax.tree.leaves(stacked), strict=True)
        if stack
    }
    if len(depths) != 1:
        raise UserError(f"config.optimizer.layer_decay {decay} needs one stack of layers; the model has {len(depths)}")
    (layers,) = depths

    def rate(path: Any, leaf: Any, stack: bool) -> Any:
        if stack:
            powers = jnp.arange(layers, 0, -1, dtype=jnp.float32)
            return (decay**powers).reshape((layers,) + (1,) * (len(leaf.names) - 1))
        return decay ** (layers + 1) if _EMBEDDING.search(parameter_name(path)) else 1.0

    return jax.tree_util.tree_map_with_path(rate, boxed, stacked, is_leaf=is_box)


def _scale_by_layer_rate(rates: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return _map_trained(lambda u, r: u * r, updates, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _map_trained(function: Any, updates: Any, *rest: Any) -> Any:
    """Maps over the updates; where parameters are frozen Optax puts a ``MaskedNode``, which stays."""
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    skipping = lambda update, *others: update if masked(update) else function(update, *others)  # noqa: E731
    return jax.tree.map(skipping, updates, *rest, is_leaf=masked)

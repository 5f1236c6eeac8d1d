"""One sharded training step and one evaluation step, for any objective.

The training step draws the views of the whole batch, totals the terms' weights, then takes gradients over
micro-batches of sums divided by those totals. So a masked loss is the same number whatever the mesh and the number of
micro-batches. Where a loss compares rows with each other by their representations alone, the gradient of these is taken
from the whole batch, and then that of the parameters micro-batch by micro-batch (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from sslx.errors import UserError
from sslx.objective import Batch, Mean, Objective, Out, Rows, Sum
from sslx.train.optimizer import unless


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. There is no random key in it: keys come from the seed and ``step``."""

    step: jax.Array  # int32[], updates made so far
    params: Any
    state: Any  # the objective's own: EMA teacher, centre, codebook, queue; {} for most
    opt_state: Any


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key that all randomness of a training step comes from."""
    return jax.random.fold_in(jax.random.key(seed), step)


def train_keys(seed: int, step: jax.Array) -> jax.Array:
    """Keys of a training step for the views, the loss (dropout) and ``after_update``."""
    return jax.random.split(step_key(seed, step), 3)


def eval_keys(seed: int) -> jax.Array:
    """Keys of every evaluation step, whatever the training step, for the views and the loss."""
    return jax.random.split(jax.random.key(seed))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    micro_batches: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds ``train_step(TrainState, batch, held) -> (TrainState, metrics)``, for ``jax.jit`` with the state donated.

    The metrics are float32 scalars: ``loss``, each term by its name when there are several, the objective's metrics,
    ``grad_norm``, that of each part of the model (``grad_norm/encoder/transformer``) and ``learning_rate``.

    ``held`` bool[] is the ``metrics["held"]`` of the step before, False for the first. From the first loss or gradient
    on that is not finite it is True and the state stays as it is: the steps that the host has sent after the broken
    one, before it could know, are void, and the state is the one that the broken step began with. Nothing waits for the
    host, and what it does about it does not depend on when it sees it. Without ``held``, nothing is looked at.

    Raises:
      UserError: micro-batches for an objective whose loss depends on the whole batch.
    """
    if micro_batches > 1 and objective.scope == "batch":
        raise UserError(
            f"config.micro_batches is {micro_batches}; {type(objective).__name__} compares all rows of a batch, "
            f"expected 1"
        )

    gradients_of = make_gradient(objective, micro_batches)

    def train_step(
        train_state: TrainState, batch: Batch, held: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        step, held_before = train_state.step, held
        view_key, loss_key, update_key = train_keys(seed, step)
        loss, grads, out, totals = gradients_of(
            train_state.params, train_state.state, batch, (view_key, loss_key), step
        )
        grad_norm = optax.global_norm(grads)
        held = jnp.bool_(False) if held is None else held | ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, train_state.opt_state, train_state.params, held=held)
        # Each is held before the next is made of it, so that none is needed beside its old self (see `_scale_by_adam`).
        params = unless(held, optax.apply_updates(train_state.params, updates), train_state.params)
        state = objective.after_update(params, train_state.state, out.stats, update_key, step)
        state = unless(held, state, train_state.state)
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": schedule(step)}
        # Of the same sums of squares as the norm of all, so that the compiler adds none.
        metrics |= {f"grad_norm/{part}": optax.global_norm(leaves) for part, leaves in parts_of(grads).items()}
        if len(out.terms) > 1:
            metrics |= {name: term.sum / totals[name] for name, term in out.terms.items()}
        metrics |= {name: mean.sum / jnp.maximum(mean.weight, 1e-6) for name, mean in out.metrics.items()}
        metrics = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)
        metrics |= {} if held_before is None else {"held": held}
        return TrainState(jnp.where(held, step, step + 1), params, state, opt_state), metrics

    return train_step


def make_gradient(
    objective: Objective, micro_batches: int = 1
) -> Callable[..., tuple[jax.Array, Any, Out, dict[str, jax.Array]]]:
    """Builds ``gradient(params, state, batch, keys, step) -> (loss, gradients, Out, totals)``; it moves nothing.

    ``keys`` are those of the views and the loss, ``totals`` float32[] the weight of each term over the batch.
    """

    def gradients_of(
        params: Any, state: Any, batch: Batch, keys: tuple[jax.Array, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Any, Out, dict[str, jax.Array]]:
        view_key, loss_key = keys
        batch = objective.views(batch, view_key, step, train=True)
        totals = {name: jnp.maximum(jnp.sum(weight), 1e-6) for name, weight in batch["weights"].items()}

        def loss_of(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, Out]:
            out = objective.loss(params, state, micro, key, step, train=True)
            return _total({name: term.coef * term.sum / totals[name] for name, term in out.terms.items()}), out

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if micro_batches == 1:
            (loss, out), grads = gradient(params, batch, loss_key)
        elif objective.scope == "representations":

            def represent(params: Any, micro: Batch, key: jax.Array) -> Any:
                return objective.represent(params, state, micro, key, step, train=True)

            def loss_from(represented: Any) -> tuple[jax.Array, Out]:
                out = objective.compare_rows(represented, params, state, batch, step)
                return _total({name: term.coef * term.sum / totals[name] for name, term in out.terms.items()}), out

            loss, out, grads = _through_cache(represent, loss_from, params, batch, loss_key, micro_batches)
        else:
            loss, out, grads = _accumulate(gradient, params, batch, loss_key, micro_batches)
        return loss, grads, out, totals

    return gradients_of


def parts_of(params: Any) -> dict[str, Any]:
    """The parts of a model by name: what is directly below ``encoder`` by itself, everything else by its first key."""
    parts = {}
    for name, tree in params.items() if isinstance(params, Mapping) else ():
        inner = tree.items() if name == "encoder" and isinstance(tree, Mapping) else [("", tree)]
        parts |= {f"{name}/{below}".rstrip("/"): leaves for below, leaves in inner}
    return parts


def make_eval_step(objective: Objective, *, seed: int) -> Callable[[Any, Any, Batch], dict[str, Mean]]:
    """Builds ``eval_step(params, state, batch) -> {name: Mean}``; the means of all batches add up.

    ``batch["valid"]`` float32[batch] is 0 for the rows that only fill up the last batch. The views depend on the row
    and the seed and not on the training step, and schedules are at their end, so that evaluations can be compared.
    """

    def eval_step(params: Any, state: Any, batch: Batch) -> dict[str, Mean]:
        step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
        view_key, loss_key = eval_keys(seed)
        batch = objective.views(batch, view_key, step, train=False)
        weights = {
            name: weight * batch["valid"].reshape(-1, *(1,) * (weight.ndim - 1))
            for name, weight in batch["weights"].items()
        }
        out = objective.loss(params, state, batch | {"weights": weights}, loss_key, step, train=False)
        totals = {name: jnp.sum(weight) for name, weight in weights.items()}
        terms = {f"term:{name}": Mean(term.sum, totals[name]) for name, term in out.terms.items()}
        parts = {f"part:{name}": Mean(term.coef * term.sum, totals[name]) for name, term in out.terms.items()}
        return terms | parts | out.metrics

    return eval_step


def finish_means(means: dict[str, Mean], watched: Sequence[str] = ()) -> dict[str, float]:
    """Divides summed evaluation means; ``loss`` adds up the terms, each times its coefficient and over its weight.

    What alarms watch is left out where it has no weight: of too few rows to tell, which is no collapse.
    """
    values = divided({name: mean for name, mean in means.items() if name not in watched or mean.weight})
    terms = {name.removeprefix("term:"): value for name, value in values.items() if name.startswith("term:")}
    loss = sum(value for name, value in values.items() if name.startswith("part:"))
    rest = {name: value for name, value in values.items() if not name.startswith(("term:", "part:"))}
    return {"loss": loss} | (terms if len(terms) > 1 else {}) | rest


def divided(means: dict[str, Mean]) -> dict[str, float]:
    """Each sum over its weight."""
    return {name: float(mean.sum) / max(float(mean.weight), 1e-6) for name, mean in means.items()}


def _total(values: dict[str, jax.Array]) -> jax.Array:
    return sum(values.values(), start=jnp.zeros((), jnp.float32))


def _split(array: jax.Array, parts: int) -> jax.Array:
    # Strided: row r goes to micro-batch r % parts, so every device keeps its rows. A contiguous split would gather
    # the whole batch onto each device first.
    micro = jnp.swapaxes(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 0, 1)
    return nn.with_logical_constraint(micro, (None, "act_batch", *(None,) * (micro.ndim - 2)))


def _join(stacked: jax.Array) -> jax.Array:
    return jnp.swapaxes(stacked, 0, 1).reshape(-1, *stacked.shape[2:])


def _through_cache(
    represent: Callable, loss_from: Callable, params: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[jax.Array, Out, Any]:
    """Loss, outputs and gradients of a loss over all rows, with the activations of one micro-batch at a time.

    Each micro-batch goes forward twice, with the same key: once for its representations, and once more for its part of
    the gradient, given that of the loss with respect to these.
    """
    micro_batches, numbers = jax.tree.map(lambda array: _split(array, parts), batch), jnp.arange(parts)

    def forward(_: None, scanned: tuple) -> tuple[None, Any]:
        part, micro = scanned
        return None, represent(params, micro, jax.random.fold_in(key, part))

    _, represented = jax.lax.scan(forward, None, (numbers, micro_batches))
    (loss, out), wanted = jax.value_and_grad(loss_from, has_aux=True)(jax.tree.map(_join, represented))

    def backward(grads: Any, scanned: tuple) -> tuple[Any, None]:
        part, micro, share = scanned
        _, pull = jax.vjp(lambda params: represent(params, micro, jax.random.fold_in(key, part)), params)
        return jax.tree.map(jnp.add, grads, pull(share)[0]), None

    shares = jax.tree.map(lambda array: _split(array, parts), wanted)
    grads, _ = jax.lax.scan(backward, jax.tree.map(jnp.zeros_like, params), (numbers, micro_batches, shares))
    return loss, out, grads


def _accumulate(
    gradient: Callable, params: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[jax.Array, Out, Any]:
    """Sums loss, gradients and outputs over micro-batches by ``lax.scan``."""

    def body(carry: tuple, scanned: tuple) -> tuple[tuple, dict]:
        part, micro = scanned
        (loss, out), grads = gradient(params, micro, jax.random.fold_in(key, part))
        rows = {name: stat for name, stat in out.stats.items() if isinstance(stat, Rows)}
        sums = {name: stat for name, stat in out.stats.items() if isinstance(stat, Sum)}
        added = (loss, grads, out.replace(stats=sums))
        return jax.tree.map(jnp.add, carry, added), rows

    micro_batches = jax.tree.map(lambda array: _split(array, parts), batch)
    first = jax.tree.map(lambda array: array[0], micro_batches)
    (loss, out), grads = jax.eval_shape(gradient, params, first, key)
    sums = {name: stat for name, stat in out.stats.items() if isinstance(stat, Sum)}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, grads, out.replace(stats=sums)))
    (loss, grads, out), rows = jax.lax.scan(body, zeros, (jnp.arange(parts), micro_batches))
    return loss, out.replace(stats=out.stats | jax.tree.map(_join, rows)), grads

"""The compiled side of a run: abstract state, shardings and jitted steps of one objective on one mesh.

In: the run's config, an objective, the shapes of a row, a mesh. Out: steps that can be lowered for any device, there or
not. It touches neither data nor files, so that ``sslx.plan`` compiles for a pod exactly what the loop will run on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from sslx.compiler import compiler_options
from sslx.objective import Batch, Objective
from sslx.settings import RunConfig
from sslx.train import sharding
from sslx.train.initialise import overlay
from sslx.train.optimizer import make_decay, make_optimizer, make_schedule
from sslx.train.step import TrainState, eval_keys, make_eval_step, make_train_step


class Program:
    """Shapes, shardings and steps. Building it computes nothing on the devices.

    ``train_step(TrainState, batch, votes, held) -> (TrainState, metrics)`` donates the state.

    - ``votes`` int32[devices, 2] are the hosts' wishes (see `hosts.Votes`); their maximum comes back in
      ``metrics["votes"]``, the same on every host.
    - ``held`` bool[] is the ``metrics["held"]`` of the step before (see `make_train_step`), at first `nothing_held`.

    ``notes`` are on dimensions of parameters that the mesh does not divide, ``undivided``, known once the training step
    is lowered, on those of activations.

    Raises:
      UserError: the batch or the parameters do not divide over the mesh, or the optimizer is not configured right.
    """

    def __init__(self, config: RunConfig, objective: Objective, row: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh):
        """``row`` holds the shapes and dtypes of one row, without the batch axis and without the row's id."""
        sharding.check_batch(config.batch_size, config.micro_batches, mesh)
        self.config, self.objective, self.mesh = config, objective, mesh
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.batch_shapes = {name: (config.batch_size, *leaf.shape) for name, leaf in row.items()}
        self.batch_shapes["row"] = (config.batch_size,)
        dtypes = {name: leaf.dtype for name, leaf in row.items()} | {"row": jnp.int32}
        self.abstract_batch = {
            name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=self.batch_sharding)
            for name, shape in self.batch_shapes.items()
        }
        everywhere = sharding.replicated(mesh)
        with sharding.on_mesh(mesh):
            boxed = jax.eval_shape(self._boxed_variables)
        self._shardings, self.notes = sharding.parameter_shardings(boxed, mesh, config.mesh.tolerance)
        self.undivided: list[str] = []
        self.schedule = make_schedule(config.optimizer, config.steps)
        self.optimizer = make_optimizer(
            config.optimizer, self.schedule, boxed["params"], make_decay(config.optimizer, config.steps)
        )
        # Not on the mesh: optax makes a scalar here, and a planned mesh has no device to make it on.
        self.abstract = self._abstract_state(sharding.unbox(boxed))
        step = make_train_step(
            objective, self.optimizer, self.schedule, seed=config.seed, micro_batches=config.micro_batches
        )

        def train_step(
            state: TrainState, batch: Batch, votes: jax.Array, held: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            state, metrics = step(state, batch, held)
            return state, metrics | {"votes": jnp.max(votes, axis=0)}

        def predict(params: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
            viewed = objective.views(batch, eval_keys(config.seed)[0], jnp.zeros((), jnp.int32), train=False)
            return objective.predict(params, state, viewed) | {"valid": batch["valid"]}

        def features(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            encoder, views = objective.encoder(params, state), config.diagnostics.views
            keys = jax.random.split(eval_keys(config.seed)[0], views) if views else ()
            whole = objective.encode(encoder, batch)
            seen = [objective.encode(encoder, objective.variant(batch, key)) for key in keys]
            return whole, jnp.stack(seen, axis=1) if seen else jnp.zeros((len(whole), 0, whole.shape[-1]))

        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        options = compiler_options(mesh.devices.flat[0].platform)
        self.train_step = jax.jit(
            train_step, donate_argnums=0, out_shardings=(state_shardings, everywhere), compiler_options=options
        )
        # Replicated, so that every host reads all sums and all rows.
        several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

        def compiled(step: Callable[..., Any]) -> Any:
            jitted = jax.jit(step, out_shardings=everywhere, compiler_options=options)
            return _OneAtATime(jitted) if several else jitted

        self.eval_step = compiled(make_eval_step(objective, seed=config.seed))
        self.predict_step = compiled(predict)
        self.features_step = compiled(features)
        self.remember_step = compiled(objective.remember)
        self.compare_step = compiled(objective.compare)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract.params))

    @property
    def flops(self) -> float:
        """Model FLOPs of one training step."""
        return self.objective.flops(self.batch_shapes)

    def lower_train(self) -> jax.stages.Lowered:
        """The training step, ready to compile for the mesh's devices."""
        votes = jax.ShapeDtypeStruct((self.mesh.size, 2), jnp.int32, sharding=sharding.one_per_device(self.mesh))
        held = jax.ShapeDtypeStruct((), jnp.bool_, sharding=sharding.replicated(self.mesh))
        with sharding.on_mesh(self.mesh):
            traced = self.train_step.trace(self.abstract, self.abstract_batch, votes, held)
            self.undivided = sharding.undivided(traced.jaxpr, self.mesh, self._split_over_tensor())
            return traced.lower()

    def lower_eval(self) -> jax.stages.Lowered:
        """The evaluation step, ready to compile for the mesh's devices."""
        valid = jax.ShapeDtypeStruct((self.config.batch_size,), jnp.float32, sharding=self.batch_sharding)
        with sharding.on_mesh(self.mesh):
            return self.eval_step.lower(
                self.abstract.params, self.abstract.state, self.abstract_batch | {"valid": valid}
            )

    def compile(self) -> float:
        """Compiles the training step ahead of the first batch; returns the seconds it took."""
        begin = time.monotonic()
        self.lower_train().compile()
        return time.monotonic() - begin

    def nothing_held(self) -> jax.Array:
        """What the first step takes as ``held``."""
        return jax.jit(lambda: jnp.zeros((), jnp.bool_), out_shardings=sharding.replicated(self.mesh))()

    def fresh(self) -> TrainState:
        """A new state from the seed, made on the devices where it stays; the same numbers on any mesh."""

        def variables() -> Any:
            return sharding.unbox(self._boxed_variables())

        with sharding.on_mesh(self.mesh):
            made = jax.jit(variables, out_shardings=self._shardings)()
            return self._with_optimizer(made["params"], made["state"])

    def started_from(self, given: Any, statistics: Any = None) -> TrainState:
        """A new state in which some subtrees of the parameters are given, and of the state's running averages."""
        state = self.fresh()
        kept = {name: overlay(state.state[name], tree) for name, tree in (statistics or {}).items()}
        return state.replace(
            params=overlay(state.params, given), state={**state.state, **kept} if kept else state.state
        )

    def _split_over_tensor(self) -> dict[int, str]:
        """The sizes that the config gives the axes that activations are split over tensor by, with their keys."""
        model = getattr(self.objective, "model", None)
        keys = {name: getattr(model, name, None) for name in ("heads", "mlp_width")}
        return {size: f"config.model.{name}" for name, size in keys.items() if isinstance(size, int)}

    def _boxed_variables(self) -> Any:
        rows = sharding.batch_shards(self.mesh)
        batch = {name: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in self.abstract_batch.items()}
        return self.objective.init(jax.random.key(self.config.seed), batch)

    def _with_optimizer(self, params: Any, state: Any) -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.opt_state)
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings)(params)
        step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=sharding.replicated(self.mesh))()
        return TrainState(step, params, state, opt_state)

    def _abstract_state(self, variables: Any) -> TrainState:
        """Shapes, dtypes and shardings of the whole state; moments lie where their parameters lie."""
        everywhere = sharding.replicated(self.mesh)

        def place(leaf: Any, at: NamedSharding) -> Any:
            # Where an optimizer keeps nothing for a parameter (a frozen one, or another's), there is nothing to place.
            return leaf if masked(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

        def masked(leaf: Any) -> bool:
            return isinstance(leaf, optax.MaskedNode)

        placed = jax.tree.map(place, variables, self._shardings)
        opt_state = jax.eval_shape(self.optimizer.init, variables["params"])
        opt_state = optax.tree.map_params(
            self.optimizer,
            place,
            opt_state,
            self._shardings["params"],
            transform_non_params=lambda leaf: place(leaf, everywhere),
            is_leaf=masked,
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(step, placed["params"], placed["state"], opt_state)


class _OneAtATime:
    """A jitted step that waits for its own end, for several CPU devices.

    These share a pool of about as many threads. Steps of which none needs another's results, as those of an evaluation,
    can each hold some of them while they wait for the others in a collective: for ever, which XLA ends after 40 seconds
    by aborting the process. Training steps need each other's state, and never do.
    """

    def __init__(self, step: Any):
        self._step, self.lower, self.eval_shape = step, step.lower, step.eval_shape

    def __call__(self, *arguments: Any) -> Any:
        return jax.block_until_ready(self._step(*arguments))

"""The training loop: one for every objective, on any mesh, resumable at any step.

Reads top to bottom: mesh, batches, abstract shapes, shardings, compiled step, start (own checkpoint, else given
parameters, else fresh), loop, end. It knows nothing of any method.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sslx.config import RunConfig
from sslx.data.batches import TrainBatches
from sslx.data.rows import RowOrder
from sslx.errors import UserError
from sslx.objective import Objective
from sslx.train import sharding
from sslx.train.checkpoint import Checkpoints
from sslx.train.chips import peak_flops
from sslx.train.console import Console
from sslx.train.evaluation import Evaluator
from sslx.train.initialise import overlay
from sslx.train.metrics import MetricsWriter, draw_curves
from sslx.train.optimizer import make_optimizer, make_schedule
from sslx.train.signals import StopRequest, stop_on_signals
from sslx.train.step import TrainState, make_train_step

# Steps handed to the device ahead of the one whose numbers are read: the device never waits for the host, and the host
# does not run away from a stop request.
IN_FLIGHT = 2


@dataclasses.dataclass
class Trained:
    """What a finished, stopped or saved run leaves in memory."""

    state: TrainState
    evaluator: Evaluator
    checkpoints: Checkpoints
    metrics: dict[str, float]  # the last evaluation
    signal: str  # the signal that ended it, or ""
    compilations: int  # entries in the jitted step's cache


class Trainer:
    """Everything built before the first step; ``run`` is the loop. Building it writes nothing.

    Raises:
      UserError: the mesh, the batch, the optimizer or the data do not fit together.
    """

    def __init__(self, config: RunConfig, objective: Objective, data: Any):
        self.config, self.objective, self.data = config, objective, data
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch_size, config.micro_batches, self.mesh)
        rows_sharding = sharding.batch_sharding(self.mesh)
        order = RowOrder(len(data.train), seed=config.seed)
        self.batches = TrainBatches(data.train, order, config.batch_size, rows_sharding)
        self.evaluator = Evaluator(objective, batch_size=config.batch_size, sharding=rows_sharding, seed=config.seed)

        sample = data.train.fetch(np.zeros(1, np.int64)) | {"row": np.zeros(1, np.int32)}
        self.batch_shapes = {name: (config.batch_size, *array.shape[1:]) for name, array in sample.items()}
        self._abstract_batch = {
            name: jax.ShapeDtypeStruct(self.batch_shapes[name], array.dtype, sharding=rows_sharding)
            for name, array in sample.items()
        }
        with sharding.on_mesh(self.mesh):
            boxed = jax.eval_shape(self._boxed_variables)
            self._shardings, self.notes = sharding.parameter_shardings(boxed, self.mesh)
            self.schedule = make_schedule(config.optimizer, config.steps)
            self.optimizer = make_optimizer(config.optimizer, self.schedule, boxed["params"])
            self.abstract = self._abstract_state(sharding.unbox(boxed))
            step = make_train_step(
                objective, self.optimizer, self.schedule, seed=config.seed, micro_batches=config.micro_batches
            )
            state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
            self.train_step = jax.jit(
                step, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(self.mesh))
            )

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract.params))

    def fresh(self) -> TrainState:
        """A new state from the seed, made on the devices where it stays; the same numbers on any mesh."""

        def variables() -> Any:
            return sharding.unbox(self._boxed_variables())

        with sharding.on_mesh(self.mesh):
            made = jax.jit(variables, out_shardings=self._shardings)()
            return self._with_optimizer(made["params"], made["state"])

    def started_from(self, given: Any) -> TrainState:
        """A new state in which some subtrees of the parameters are given, as host arrays."""
        state = self.fresh()
        return state.replace(params=overlay(state.params, given))

    def compile(self) -> float:
        """Compiles the step ahead of the first batch; returns the seconds it took."""
        begin = time.monotonic()
        with sharding.on_mesh(self.mesh):
            self.train_step.lower(self.abstract, self._abstract_batch).compile()
        return time.monotonic() - begin

    def _boxed_variables(self) -> Any:
        rows = sharding.batch_shards(self.mesh)
        batch = {name: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in self._abstract_batch.items()}
        return self.objective.init(jax.random.key(self.config.seed), batch)

    def _with_optimizer(self, params: Any, state: Any) -> TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.opt_state)
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings)(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(self.mesh))
        return TrainState(step, params, state, opt_state)

    def _abstract_state(self, variables: Any) -> TrainState:
        """Shapes, dtypes and shardings of the whole state; moments lie where their parameters lie."""
        everywhere = sharding.replicated(self.mesh)

        def place(leaf: Any, at: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

        placed = jax.tree.map(place, variables, self._shardings)
        opt_state = jax.eval_shape(self.optimizer.init, variables["params"])
        opt_state = optax.tree.map_params(
            self.optimizer,
            place,
            opt_state,
            self._shardings["params"],
            transform_non_params=lambda leaf: place(leaf, everywhere),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(step, placed["params"], placed["state"], opt_state)

    def run(
        self, workdir: Path, console: Console, written: dict[str, Any], start: Callable[[], TrainState] | None = None
    ) -> Trained:
        """Trains until ``config.steps``, an early stop or a signal, and saves.

        Args:
          workdir: The run folder; exists.
          console: Where to print.
          written: The resolved config, for the logs.
          start: Makes the first state of a run without a checkpoint; None: fresh from the seed.

        Raises:
          UserError: the disk is full, or every checkpoint is damaged.
          FloatingPointError: the loss is not finite.
        """
        with sharding.on_mesh(self.mesh), stop_on_signals() as request:
            checkpoints = Checkpoints(workdir, self.config.checkpoint)
            # Where a run starts: its own newest checkpoint; else what it was given (config.init); else fresh.
            restored = checkpoints.restore(self.abstract, say=console.say)
            state, saved = restored or ((start or self.fresh)(), {})
            step = int(state.step)
            progress = Progress.resumed(saved, self.config, self.data.statistics.get("fingerprint", ""))
            if restored:
                console.say(f"resumed at step {step} of {self.config.steps}")
            if step >= self.config.steps or progress.exhausted(self.config.eval.patience):
                return Trained(state, self.evaluator, checkpoints, {}, "", 0)
            if restored and float(self.schedule(self.config.steps - 1)) <= 0.0:
                console.say(
                    f"note: the learning rate is 0 from step {self.config.optimizer.schedule_steps} on, where the "
                    f"schedule ends; --config.optimizer.schedule_steps={self.config.steps} stretches it"
                )
            seconds = self.compile()
            console.say(f"compiled the training step in {seconds:.1f} s")
            log = self.config.log
            writer = MetricsWriter(workdir, step if restored else 0, log.wandb, written)
            loop = _Loop(self, checkpoints, writer, console, progress, request)
            try:
                state = loop.run(state, step)
            finally:
                console.stop()
                writer.close()
            checkpoints.wait()
            if jax.process_index() == 0:
                draw_curves(workdir, self.objective.chance(self.data.statistics))
        return Trained(state, self.evaluator, checkpoints, loop.evaluated, request.name, self.train_step._cache_size())


@dataclasses.dataclass
class Progress:
    """What resuming needs beside the arrays; saved with every checkpoint as JSON."""

    metric: str = ""  # what ``best`` is a value of, and which way is better: "eval/loss min"
    best: float | None = None
    best_step: int | None = None
    failures: int = 0  # evaluations since the best
    data: str = ""  # fingerprint of the prepared data

    def exhausted(self, patience: int | None) -> bool:
        """Whether the run has failed to improve for too long; asked anew on resuming, since patience may be raised."""
        return patience is not None and self.failures >= patience

    @classmethod
    def resumed(cls, saved: dict[str, Any], config: RunConfig, fingerprint: str) -> Progress:
        """What was saved, as this config goes on with it: another metric to select by starts a new search.

        Raises:
          UserError: the data is not that of the run.
        """
        progress = cls(**{name: value for name, value in saved.items() if name in cls.__dataclass_fields__})
        metric = f"{config.checkpoint.best_metric} {config.checkpoint.best_mode}"
        if saved and progress.metric != metric:
            progress = cls(data=progress.data)
        progress.metric = metric
        if progress.data and progress.data != fingerprint:
            raise UserError(
                "the training data has changed since this run was started (files, splits or package versions), so its "
                "rows would not be the same; restore the data or give another --workdir"
            )
        progress.data = fingerprint
        return progress


class _Loop:
    """One pass of the loop, with the host's bookkeeping."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        console: Console,
        progress: Progress,
        request: StopRequest,
    ):
        self._trainer, self._config = trainer, trainer.config
        self._checkpoints, self._writer, self._console = checkpoints, writer, console
        self._progress, self._request = progress, request
        self._pending: collections.deque = collections.deque()  # (step, device metrics), oldest first
        self._clock, self._counted = time.monotonic(), 0
        flops = trainer.objective.flops(trainer.batch_shapes)
        peak = peak_flops(jax.devices()[0])
        self._mfu_per_rate = flops / (peak * jax.device_count()) if peak else None
        self._tokens_per_row = trainer.data.statistics.get("tokens_per_row")
        self.evaluated: dict[str, float] = {}

    def run(self, state: TrainState, start: int) -> TrainState:
        config, saved_at, saved_step = self._config, time.monotonic(), start
        self._console.start(start, config.steps)
        self._restart_clock()
        batches = self._trainer.batches.stream(start, config.steps)
        try:
            for step, batch in enumerate(batches, start + 1):
                state, metrics = self._trainer.train_step(state, batch)
                self._pending.append((step, metrics))
                if len(self._pending) > IN_FLIGHT:
                    self._read_one()
                last = step == config.steps or bool(self._request.name)
                evaluated = None
                if step % config.eval.every_steps == 0 or step == config.steps:
                    evaluated = self._evaluate(state, step)
                    last = last or self._progress.exhausted(config.eval.patience)
                improved = evaluated is not None and self._progress.best_step == step
                due = step % config.checkpoint.every_steps == 0
                due = due or time.monotonic() - saved_at > 60 * config.checkpoint.every_minutes
                if due or improved or last:
                    self._drain()
                    self._checkpoints.save(state, step, dataclasses.asdict(self._progress), evaluated)
                    saved_at, saved_step = time.monotonic(), step
                    self._restart_clock()
                if last:
                    break
        finally:
            batches.close()
        self._drain()
        assert saved_step == step
        return state

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        self._drain()
        config, trainer = self._config, self._trainer
        metrics, _ = trainer.evaluator(state.params, state.state, trainer.data.eval, config.eval.batches)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        self.evaluated = metrics
        self._writer.scalars(step, metrics)
        self._console.say(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if config.eval.examples:
            rows = trainer.evaluator.examples(state.params, state.state, trainer.data.eval, config.eval.examples)
            self._console.table(f"held-out examples at step {step}", rows)
            self._writer.table(step, "eval/examples", rows)
        self._judge(metrics, step)
        self._restart_clock()
        return metrics

    def _judge(self, metrics: dict[str, float], step: int) -> None:
        """Keeps the best and decides about stopping early."""
        checkpoint, progress = self._config.checkpoint, self._progress
        value, delta = metrics[checkpoint.best_metric], self._config.eval.min_delta
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{checkpoint.best_metric} is {value} at step {step}, while the training loss is finite"
            )
        better = progress.best is None or (
            value < progress.best - delta if checkpoint.best_mode == "min" else value > progress.best + delta
        )
        if better:
            progress.best, progress.best_step, progress.failures = value, step, 0
            return
        progress.failures += 1
        if progress.exhausted(self._config.eval.patience):
            self._console.say(
                f"stopping early at step {step}: {checkpoint.best_metric} has not improved on {progress.best:.4f} "
                f"(step {progress.best_step}) for {progress.failures} evaluations"
            )

    def _drain(self) -> None:
        while self._pending:
            self._read_one()

    def _read_one(self) -> None:
        """Waits for the oldest step in flight, and logs it if it is its turn."""
        step, metrics = self._pending.popleft()
        metrics = jax.device_get(metrics)
        # Of every step, logged or not: a checkpoint must not hold what a broken step has left.
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self._checkpoints.wait()  # one may be half written
            raise FloatingPointError(
                f"the training loss is {metrics['loss']} (gradient norm {metrics['grad_norm']}) at step {step}; "
                f"the newest checkpoint is {(self._checkpoints.steps() or ['none'])[-1]}. "
                "A lower learning rate or a longer warm-up often helps."
            )
        self._counted += 1
        self._console.advance(step)
        if step % self._config.log.every_steps and step != self._config.steps and not self._last_before_stop(step):
            return
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        rate = self._counted / elapsed
        shown = {"loss": values["train/loss"]}
        values["rows_per_second"] = rate * self._config.batch_size
        if self._tokens_per_row:
            values["tokens_per_second"] = values["rows_per_second"] * self._tokens_per_row
            shown["tokens/s"] = values["tokens_per_second"]
        if self._mfu_per_rate:
            values["mfu"] = shown["MFU"] = rate * self._mfu_per_rate
        self._writer.scalars(step, values)
        self._console.numbers(step, shown, (self._config.steps - step) / rate)
        self._restart_clock()

    def _last_before_stop(self, step: int) -> bool:
        stopping = self._request.name or self._progress.exhausted(self._config.eval.patience)
        return bool(stopping) and not self._pending

    def _restart_clock(self) -> None:
        self._clock, self._counted = time.monotonic(), 0

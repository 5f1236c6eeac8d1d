"""The training loop: one for every objective, on any mesh, resumable at any step.

Reads top to bottom: program, batches, start (own checkpoint, else given parameters, else fresh), compiled step, loop,
end. It knows nothing of any method. Every host runs it alike: what one host alone knows (a signal, the clock) becomes a
vote, and all act on the votes that a step has counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sslx.data.batches import TrainBatches
from sslx.errors import Alarmed
from sslx.objective import Objective
from sslx.runtime import display
from sslx.settings import RunConfig
from sslx.train import memory, sharding
from sslx.train.alarms import Alarms
from sslx.train.checkpoint import Checkpoints
from sslx.train.chips import peak_flops
from sslx.train.console import Console
from sslx.train.evaluation import Evaluator
from sslx.train.hosts import agree, progress, together
from sslx.train.kept import Progress
from sslx.train.metrics import MetricsWriter, draw_curves
from sslx.train.nonfinite import capture
from sslx.train.program import Program
from sslx.train.signals import StopRequest, stop_on_signals
from sslx.train.step import TrainState
from sslx.train.steps import Steps


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

    def __init__(self, config: RunConfig, objective: Objective, data: Any, mesh: Mesh | None = None):
        """``mesh`` is None for one of all devices, as the config has it."""
        self.config, self.objective, self.data = config, objective, data
        sample = data.train.fetch(np.zeros(1, np.int64))
        row = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in sample.items()}
        self.program = Program(config, objective, row, sharding.make_mesh(config.mesh) if mesh is None else mesh)
        order = data.train.order(config.seed)
        packed = getattr(data, "layout", "documents") != "documents"  # which only rows of text have
        self.batches = TrainBatches(
            data.train, order, config.batch_size, self.program.batch_sharding, config.seed, packed=packed
        )
        self.evaluator = Evaluator(self.program, data.train)
        self.evaluator.check_variants(data.eval)

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
          UserError: the disk is full, a device has too little memory, or every checkpoint is damaged.
          Alarmed: there is an alarm, and the config says to stop.
          FloatingPointError: a loss or a gradient is not finite, and the config does not say to skip its step.
        """
        program = self.program
        explained = functools.partial(memory.explained, self.config, written["model"], program.mesh)
        with sharding.on_mesh(program.mesh), stop_on_signals() as request, explained():
            checkpoints = Checkpoints(workdir, self.config.checkpoint)
            # Where a run starts: its own newest checkpoint; else what it was given (config.init); else fresh.
            restored = checkpoints.restore(program.abstract, say=console.say)
            state, saved = restored or ((start or program.fresh)(), {})
            step = int(state.step)
            kept = Progress.resumed(saved, self.config, self.data.statistics.get("fingerprint", ""))
            if restored:
                console.say(f"resumed at step {step} of {self.config.steps}")
            if kept.alarms["raised"] and self.config.alarms.stop and step < self.config.steps:
                raise Alarmed(f"{_stopped_by(kept, step)}; --config.alarms.stop=False goes on")
            if step >= self.config.steps or kept.exhausted(self.config.eval.patience):
                return Trained(state, self.evaluator, checkpoints, {}, "", 0)
            if restored and float(program.schedule(self.config.steps - 1)) <= 0.0:
                console.say(
                    f"note: the learning rate is 0 from step {self.config.optimizer.schedule_steps} on, where the "
                    f"schedule ends; --config.optimizer.schedule_steps={self.config.steps} stretches it"
                )
            progress("compiling", step, limited=False)
            with together("compiling"), explained():  # or the first to be done would take the others for lost
                seconds = program.compile()
            console.say(f"compiled the training step in {seconds:.1f} s")
            for note in program.undivided:
                console.say(f"note: {note}")
            progress("the first step", step)
            log = self.config.log
            writer = MetricsWriter(workdir, step if restored else 0, log.wandb, written)
            loop = _Loop(self, workdir, checkpoints, writer, console, kept, request)
            try:
                state = loop.run(state, step)
            finally:
                console.stop()
                writer.close()
            progress("waiting for the last checkpoint", limited=False)
            checkpoints.wait()
            if jax.process_index() == 0:
                draw_curves(workdir, self.objective.chance(self.data.statistics), self.objective.unit)
            if kept.alarms["raised"] and self.config.alarms.stop:
                raise Alarmed(f"{_stopped_by(kept, int(state.step))}, which is saved")
        return Trained(
            state, self.evaluator, checkpoints, loop.evaluated, loop.stopped_by, program.train_step._cache_size()
        )


def _stopped_by(kept: Progress, step: int) -> str:
    raised = kept.alarms["raised"]
    return f"the run was stopped by its alarm{'s' * (len(raised) > 1)} {' and '.join(raised)} at step {step}"


class _NotFinite(Exception):
    """A step has been read whose loss or gradient is not finite; it and those sent after it have changed nothing."""

    def __init__(self, step: int, metrics: dict[str, float]):
        self.step, self.metrics = step, metrics


def beside_chance(loss: float, chance: float | None) -> str:
    """`` (2.202 below chance)``, or nothing where that is not known."""
    if chance is None:
        return ""
    return f" ({abs(chance - loss):.3f} {'below' if loss < chance else 'above'} chance)"


class _Loop(Steps):
    """One pass of the loop, with the host's bookkeeping."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        console: Console,
        kept: Progress,
        request: StopRequest,
    ):
        super().__init__(trainer.program, trainer.batches)
        self._trainer, self._config, self._workdir = trainer, trainer.config, workdir
        self._checkpoints, self._writer, self._console = checkpoints, writer, console
        self._progress, self._request = kept, request
        self._clock, self._counted = time.monotonic(), 0
        self.stopped_by, self._save_voted = "", False  # what the hosts have decided
        peak = peak_flops(jax.devices()[0])
        self._mfu_per_rate = trainer.program.flops / (peak * jax.device_count()) if peak else None
        self._tokens_per_row = trainer.data.statistics.get("tokens_per_row")
        self._row_unit = trainer.data.statistics.get("row_unit", "rows")
        self.evaluated: dict[str, float] = {}

    def run(self, state: TrainState, start: int) -> TrainState:
        self._console.start(start, self._config.steps)
        self.state, self._saved_at, self._last = state, time.monotonic(), False
        self._restart_clock()
        left_out = False
        while not self._last:
            try:
                if left_out:
                    self.after(start)  # what is due at a step is due without its update, too
                if not self._last:
                    self.drive(start, self._config.steps)
            except _NotFinite as found:
                self._leave_out(found)
                start, left_out = found.step, True
        self.drain()
        return self.state

    def votes(self) -> jax.Array:
        """A signal to stop for, and whether it is time to save."""
        # The clock of host 0 counts for all: those of others may differ, and a save takes everyone.
        waited = time.monotonic() - self._saved_at
        overdue = jax.process_index() == 0 and waited > 60 * self._config.checkpoint.every_minutes
        return self._votes(stop=self._request.number, save=overdue)

    def after(self, step: int) -> bool:
        """Evaluates and saves, if it is time to."""
        config, evaluated, exhausted = self._config, None, False
        if step % config.eval.every_steps == 0 or step == config.steps:
            evaluated = self._evaluate(step)
            exhausted = self._progress.exhausted(config.eval.patience)
        alarmed = config.alarms.stop and bool(self._progress.alarms["raised"])
        last = step == config.steps or exhausted or alarmed or bool(self.stopped_by)
        improved = evaluated is not None and self._progress.best_step == step
        due = step % config.checkpoint.every_steps == 0 or self._save_voted
        if due or improved or last:
            self.drain()
            self._writer.flush()
            self._checkpoints.save(self.state, step, dataclasses.asdict(self._progress), evaluated)
            progress("saving", step)
            self._saved_at, self._save_voted = time.monotonic(), False
            self._restart_clock()
        self._last = last
        return last

    def _leave_out(self, found: _NotFinite) -> None:
        """Keeps a step that is not finite, and passes over it if the config says so.

        Raises:
          FloatingPointError: it does not, or there were too many in succession.
        """
        config, kept, step, metrics = self._config, self._progress, found.step, found.metrics
        self._pending.clear()
        self._checkpoints.wait()  # one may be half written
        progress("keeping a step", step, limited=False)
        batch = self._trainer.batches.at(step - 1)
        folder, written = capture(self._workdir, step, self.state, batch, metrics, config.seed)
        kept.skip(step)
        self._writer.scalars(step, {"train/nonfinite": float(kept.skipped)})
        what = f"the training loss is {metrics['loss']} (gradient norm {metrics['grad_norm']}) at step {step}"
        how = f"python -m sslx.replay --run={display(self._workdir)} --step={step} names the operation it comes from"
        if config.on_nonfinite == "stop" or kept.in_succession > config.skip_at_most:
            many = f", the last of {kept.in_succession} in succession" if kept.in_succession > 1 else ""
            raise FloatingPointError(
                f"{what}{many}; the newest checkpoint is {(self._checkpoints.steps() or ['none'])[-1]}. "
                f"A lower learning rate or a longer warm-up often helps{'; ' + how if written else ''}."
            )
        seen = f"kept in {display(folder)}; {how}" if written else "not kept, as the run has kept others"
        self._console.say(f"note: {what}; its update is left out ({kept.skipped} in this run). It is {seen}")
        next_step = jax.jit(lambda step: step + 1, out_shardings=self.state.step.sharding)
        self.state = self.state.replace(step=next_step(self.state.step))
        self._restart_clock()

    def _evaluate(self, step: int) -> dict[str, float]:
        self.drain()
        config, trainer, state = self._config, self._trainer, self.state
        progress("evaluating", step, limited=False)  # the first time, it compiles
        found, _ = trainer.evaluator(state.params, state.state, trainer.data.eval, config.eval.batches)
        metrics = {f"eval/{name}": value for name, value in found.items()}
        due = step % (config.diagnostics.every * config.eval.every_steps) == 0 or step == config.steps
        if config.diagnostics.rows and due:
            metrics |= trainer.evaluator.diagnose(state.params, state.state, trainer.data.eval)
        # Scores are made on each host's processor, and what follows from them must be the same on all.
        metrics = agree("an evaluation", metrics)[0]
        self.evaluated = metrics
        self._writer.scalars(step, metrics)
        chance = trainer.objective.chance(trainer.data.statistics)
        said = {name: f"{name} {value:.4f}" for name, value in metrics.items()}
        said["eval/loss"] += beside_chance(metrics["eval/loss"], chance)
        self._console.say(f"step {step}  " + "  ".join(said.values()))
        self._sound(metrics, chance, step)
        if config.eval.examples:
            found = trainer.evaluator.examples(state.params, state.state, trainer.data.eval, config.eval.examples)
            rows = trainer.objective.show(found) if found else []
            self._console.table(f"held-out examples at step {step}", rows)
            self._writer.table(step, "eval/examples", rows)
            for name, picture in (trainer.objective.pictures(found) if found else {}).items():
                self._writer.picture(step, name, picture)
        self._judge(metrics, step)
        self._restart_clock()
        return metrics

    def _sound(self, metrics: dict[str, float], chance: float | None, step: int) -> None:
        """Raises the alarms that an evaluation gives reason to, once the warm-up is over."""
        config, alarms = self._config, Alarms.of(self._progress.alarms)
        if step <= config.optimizer.warmup_steps:
            return
        before = list(alarms.raised)
        lines = alarms.judge(metrics, self._trainer.objective, chance, config.alarms)
        for name, line in lines.items():
            self._console.say(line)
            self._writer.alarm(step, name, line)
        for name in before:
            if name not in alarms.raised:
                self._console.say(f"note: the alarm {name} is over")
                self._writer.scalars(step, {f"alarm/{name}": 0.0})
        self._progress.alarms = dataclasses.asdict(alarms)

    def _judge(self, metrics: dict[str, float], step: int) -> None:
        """Keeps the best and decides about stopping early."""
        checkpoint, kept = self._config.checkpoint, self._progress
        value, delta = metrics[checkpoint.best_metric], self._config.eval.min_delta
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{checkpoint.best_metric} is {value} at step {step}, while the training loss is finite"
            )
        better = kept.best is None or (
            value < kept.best - delta if checkpoint.best_mode == "min" else value > kept.best + delta
        )
        if better:
            kept.best, kept.best_step, kept.failures = value, step, 0
            return
        kept.failures += 1
        if kept.exhausted(self._config.eval.patience):
            self._console.say(
                f"stopping early at step {step}: {checkpoint.best_metric} has not improved on {kept.best:.4f} "
                f"(step {kept.best_step}) for {kept.failures} evaluations"
            )

    def landed(self, step: int, votes: Any, held: bool, metrics: dict[str, jax.Array]) -> None:
        """Acts on the votes of a step, and logs it if it is its turn.

        Raises:
          _NotFinite: its loss or gradient is.
        """
        stop, save = votes
        # Of every step, logged or not: a checkpoint must not hold what a broken step would have left.
        if held:
            raise _NotFinite(step, {name: float(metrics[name]) for name in ("loss", "grad_norm")})
        self.stopped_by = self.stopped_by or (signal.Signals(int(stop)).name if stop else "")
        self._save_voted = self._save_voted or bool(save)
        progress("training", step)
        self._counted += 1
        self._console.advance(step)
        if step % self._config.log.every_steps and step != self._config.steps and not self._last_before_stop(step):
            return
        metrics = jax.device_get(metrics)
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        rate = self._counted / elapsed
        shown = {"loss": values["train/loss"]}
        values["rows_per_second"] = rate * self._config.batch_size
        if self._tokens_per_row:
            values["tokens_per_second"] = values["rows_per_second"] * self._tokens_per_row
            shown["tokens/s"] = values["tokens_per_second"]
        else:
            shown[f"{self._row_unit}/s"] = values["rows_per_second"]
        if self._mfu_per_rate:
            values["mfu"] = shown["MFU"] = rate * self._mfu_per_rate
        self._writer.scalars(step, values)
        self._console.numbers(step, shown, (self._config.steps - step) / rate)
        self._restart_clock()

    def _last_before_stop(self, step: int) -> bool:
        stopping = self.stopped_by or self._progress.exhausted(self._config.eval.patience)
        return bool(stopping) and not self._pending

    def _restart_clock(self) -> None:
        self._clock, self._counted = time.monotonic(), 0

"""Held-out evaluation: sums on the devices, one division at the end, and predictions where a metric needs all rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sslx.data.batches import EvalBatches, RandomAccessRows, SomeRows
from sslx.errors import UserError
from sslx.probing.diagnostics import measured
from sslx.train.hosts import progress
from sslx.train.program import Program
from sslx.train.step import divided, finish_means


class Evaluator:
    """Evaluation by a program's steps; enter ``on_mesh`` before calling it.

    ``train_rows`` are those that an objective with ``bank_rows`` compares held-out rows with.
    """

    def __init__(self, program: Program, train_rows: RandomAccessRows):
        self._program, self._objective, self._train_rows = program, program.objective, train_rows
        self._batch_size, self._sharding = program.config.batch_size, program.batch_sharding

    def __call__(
        self, params: Any, state: Any, rows: RandomAccessRows, batches: int | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics over ``rows`` and, where the objective scores them, the predictions of all rows.

        Args:
          params: Parameters.
          state: The objective's state.
          rows: Held-out rows.
          batches: At most this many batches; None: all rows.
        """
        source = EvalBatches(rows, self._batch_size, self._sharding, batches)
        means, collected, last = None, [], None
        for batch in source:
            found = self._program.eval_step(params, state, batch)
            means = found if means is None else jax.tree.map(lambda a, b: a + b, means, found)
            if self._objective.scored:
                # One behind: the devices go on, and none holds more than two batches of predictions.
                predicted, last = last, self._program.predict_step(params, state, batch)
                collected += [jax.device_get(predicted)] if predicted else []
            progress("evaluating")
        collected += [jax.device_get(last)] if last else []
        metrics = finish_means(jax.device_get(means), (*self._objective.spreads, *self._objective.ranks))
        predictions = _join(collected)
        if predictions:
            metrics |= self._objective.score(predictions)
        if self._objective.bank_rows:
            metrics |= self._compared(params, state, rows)
        return metrics | self._objective.derive(metrics), predictions

    def _compared(self, params: Any, state: Any, rows: RandomAccessRows) -> dict[str, float]:
        """What the objective says of some held-out rows beside some of the training data: always the same ones."""
        seed, objective = self._program.config.seed, self._objective
        remembered = SomeRows(self._train_rows, objective.bank_rows, seed)
        held = SomeRows(rows, objective.compared_rows, seed)
        parts = []
        for batch in EvalBatches(remembered, self._batch_size, self._sharding):
            parts.append(self._program.remember_step(params, state, batch))
            progress("evaluating")
        # Without those that only fill up the last batch.
        bank = jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[: len(remembered)], *parts)
        means = None
        for batch in EvalBatches(held, self._batch_size, self._sharding):
            found = self._program.compare_step(params, state, batch, bank)
            means = found if means is None else jax.tree.map(lambda a, b: a + b, means, found)
            progress("evaluating")
        return divided(jax.device_get(means))

    def diagnose(self, params: Any, state: Any, rows: RandomAccessRows) -> dict[str, float]:
        """What `diagnostics` says of the features of some held-out rows, always the same ones."""
        config, parts = self._program.config, []
        held = SomeRows(rows, config.diagnostics.rows, config.seed)
        for batch in EvalBatches(held, self._batch_size, self._sharding):
            del batch["valid"]  # the rows that fill up the last batch stand at its end
            found = jax.device_get(self._program.features_step(params, state, batch))
            parts.append([np.asarray(of, np.float32)[: len(held) - len(parts) * self._batch_size] for of in found])
            progress("evaluating")
        return measured(*(np.concatenate(of) for of in zip(*parts, strict=True)))

    def check_variants(self, rows: RandomAccessRows) -> None:
        """Refuses views for diagnostics of an objective that draws none.

        Raises:
          UserError: it does not.
        """
        views = self._program.config.diagnostics.views
        if not views:
            return
        batch = EvalBatches(rows, self._batch_size, self._sharding).at(0)
        if jax.eval_shape(self._objective.variant, batch, jax.random.key(0)) is None:
            raise UserError(
                f"config.diagnostics.views is {views}; {type(self._objective).__name__} draws no random views of a "
                "row, expected 0"
            )

    def metric_names(self, params: Any, state: Any, rows: RandomAccessRows) -> list[str]:
        """The names of the metrics that a call gives, without computing them; params and state may be abstract."""
        batch = EvalBatches(rows, self._batch_size, self._sharding).at(0)

        def zeros(function: Any, *more: Any) -> Any:
            shapes = function.eval_shape(params, state, batch, *more)
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

        metrics = finish_means(zeros(self._program.eval_step))
        if self._objective.scored:
            metrics |= self._objective.score(zeros(self._program.predict_step))
        if self._objective.bank_rows:
            metrics |= divided(zeros(self._program.compare_step, zeros(self._program.remember_step)))
        return sorted(metrics | self._objective.derive(metrics))

    def examples(self, params: Any, state: Any, rows: RandomAccessRows, count: int) -> dict[str, np.ndarray]:
        """Predictions of the first ``count`` held-out rows, for ``Objective.show`` and ``pictures``."""
        batch = EvalBatches(rows, self._batch_size, self._sharding).at(0)
        predictions = jax.device_get(self._program.predict_step(params, state, batch))
        count = min(count, len(rows))
        return {name: np.asarray(value)[:count] for name, value in predictions.items() if name != "valid"}


def _join(collected: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not collected:
        return {}
    joined = {name: np.concatenate([np.asarray(part[name]) for part in collected]) for name in collected[0]}
    valid = joined.pop("valid") > 0
    return {name: column[valid] for name, column in joined.items()}

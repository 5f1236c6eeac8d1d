"""Held-out evaluation: sums on the devices, one division at the end, and predictions where a metric needs all rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sslx.data.batches import EvalBatches, RandomAccessRows
from sslx.objective import Batch, Objective
from sslx.train.step import eval_keys, finish_means, make_eval_step


class Evaluator:
    """Jitted evaluation of one objective on one mesh; enter ``on_mesh`` before calling it."""

    def __init__(self, objective: Objective, *, batch_size: int, sharding: jax.sharding.NamedSharding, seed: int):
        self._objective, self._batch_size, self._sharding = objective, batch_size, sharding
        self._step = jax.jit(make_eval_step(objective, seed=seed))
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

        def predict(params: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
            batch = objective.views(batch, eval_keys(seed)[0], jax.numpy.zeros((), jax.numpy.int32), train=False)
            return objective.predict(params, state, batch)

        # Replicated, so that every host can read all rows.
        self._predict = jax.jit(predict, out_shardings=everywhere)

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
        means, collected = None, []
        for batch in source:
            found = self._step(params, state, batch)
            means = found if means is None else jax.tree.map(lambda a, b: a + b, means, found)
            if self._objective.scored:
                collected.append((self._predict(params, state, batch), batch["valid"]))
        metrics = finish_means(jax.device_get(means))
        predictions = _join(collected)
        if predictions:
            metrics |= self._objective.score(predictions)
        return metrics | self._objective.derive(metrics), predictions

    def metric_names(self, params: Any, state: Any, rows: RandomAccessRows) -> list[str]:
        """The names of the metrics that a call gives, without computing them; params and state may be abstract."""
        batch = EvalBatches(rows, self._batch_size, self._sharding).at(0)

        def zeros(function: Any) -> Any:
            shapes = jax.eval_shape(function, params, state, batch)
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

        metrics = finish_means(zeros(self._step))
        if self._objective.scored:
            metrics |= self._objective.score(zeros(self._predict))
        return sorted(metrics | self._objective.derive(metrics))

    def examples(self, params: Any, state: Any, rows: RandomAccessRows, count: int) -> list[dict[str, str]]:
        """Rows of a table on the first ``count`` held-out rows; [] if the objective shows none."""
        batch = EvalBatches(rows, self._batch_size, self._sharding).at(0)
        predictions = jax.device_get(self._predict(params, state, batch))
        count = min(count, len(rows))
        return self._objective.show({name: np.asarray(value)[:count] for name, value in predictions.items()})


def _join(collected: list[tuple[dict[str, jax.Array], jax.Array]]) -> dict[str, np.ndarray]:
    if not collected:
        return {}
    valid = np.concatenate([np.asarray(jax.device_get(mask)) for _, mask in collected]) > 0
    columns = jax.device_get([predictions for predictions, _ in collected])
    return {name: np.concatenate([np.asarray(part[name]) for part in columns])[valid] for name in columns[0]}

"""Many inputs through one compiled function: batches of few shapes, so that few are compiled; results in input order.

Inputs are encoded before anything is compiled, so that whatever is wrong with one of them is told first. Neighbours
are sorted by length within a window. A batch is padded to a power of two of rows and of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sslx.compiler import compiler_options
from sslx.config import checked
from sslx.errors import UserError
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import InputError, OneRow, Row, TaskRows, Verb

WINDOW = 16  # batches whose inputs are sorted by length together
SHORTEST = 16  # tokens of the shortest batch


class Answerer:
    """Answers with one run; a verb's function is compiled once for each shape and each set of its options."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self._compiled: dict[Verb, Any] = {}

    def results(self, verb: Verb, records: Sequence[Mapping[str, Any]], batch_size: int) -> Iterator[Any]:
        """Answers to records, in their order, one batch after the other.

        Raises:
          UserError: the options do not fit the run.
          InputError: one of the records cannot be answered; before anything is computed.
        """
        if checked(int, batch_size, "batch_size") < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        verb.check(self.run)
        encode = verb.inputs if isinstance(verb, TaskRows) else verb.encode
        inputs = []
        for index, record in enumerate(records):
            try:
                inputs.append(encode(self.run, record))
            except UserError as error:
                raise InputError(index, str(error)) from None
        answers = self._task_answers if isinstance(verb, TaskRows) else self._answers
        return answers(verb, inputs, batch_size)

    def compiled(self, verb: Verb) -> Any:
        """The jitted function of a verb."""
        key = verb.compiled_as
        if key not in self._compiled:
            self._compiled[key] = jax.jit(
                lambda variables, batch: key.compute(self.run, variables, batch),
                compiler_options=compiler_options(jax.default_backend()),
            )
        return self._compiled[key]

    def _task_answers(self, verb: TaskRows, inputs: Sequence[Any], batch_size: int) -> Iterator[Any]:
        for start in range(0, len(inputs), WINDOW * batch_size):
            window = inputs[start : start + WINDOW * batch_size]
            rows = verb.rows(self.run, window)
            parts = []
            for first in range(0, len(rows), batch_size):
                ids = np.arange(first, min(first + batch_size, len(rows)))
                size = min(power_of_two(len(ids)), batch_size)
                padded = np.concatenate([ids, np.repeat(ids[-1:], size - len(ids))])
                batch = dict(rows.fetch(padded)) | {"row": padded.astype(np.int32)}
                found = jax.device_get(self.compiled(verb)(self.run.variables, batch))
                parts.append({name: array[: len(ids)] for name, array in found.items()})
            predictions = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            yield from verb.results(self.run, predictions, rows, window)

    def _answers(self, verb: OneRow, rows: Sequence[Row], batch_size: int) -> Iterator[Any]:
        for start in range(0, len(rows), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(rows)))
            by_length = sorted(window, key=lambda index: len(rows[index].tokens))
            found: dict[int, Any] = {}
            for first in range(0, len(by_length), batch_size):
                indices = by_length[first : first + batch_size]
                arrays = self._batch(verb, rows, indices, batch_size)
                for place, index in enumerate(indices):
                    own = {name: array[place] for name, array in arrays.items()}
                    found[index] = verb.result(self.run, rows[index], own)
            yield from (found[index] for index in window)

    def _batch(
        self, verb: OneRow, rows: Sequence[Row], indices: Sequence[int], batch_size: int
    ) -> dict[str, np.ndarray]:
        size = min(power_of_two(len(indices)), batch_size)
        padded = [*indices, *[indices[-1]] * (size - len(indices))]  # a row of padding alone has nothing to attend to
        longest = max(len(rows[index].tokens) for index in indices)
        length = max(SHORTEST, power_of_two(longest))
        if self.run.longest is not None and longest <= self.run.longest:
            length = min(length, self.run.longest)
        batch = verb.batch([rows[index] for index in padded], padded, length)
        return jax.device_get(self.compiled(verb)(self.run.variables, batch))


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()

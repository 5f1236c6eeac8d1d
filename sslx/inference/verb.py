"""What a verb is: from records to rows of tokens, through one compiled function, to results.

A verb is a frozen dataclass of its options. `batching.Answerer` drives it. `OneRow`: ``encode`` each record, ``batch``
rows of like length, ``compute`` on the device, ``result`` for each row. `TaskRows`: the objective makes the rows, all
of one length, and reads what it predicts for them.
"""

from __future__ import annotations

import abc
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sslx.config import checked
from sslx.data.packing import text_pairs_plan
from sslx.errors import UserError, quoted
from sslx.inference.loading import LoadedRun
from sslx.objective import Objective


class InputError(UserError):
    """One of many inputs is refused; ``index`` counts from 0."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"input {index}: {reason}")
        self.index, self.reason = index, reason


@dataclasses.dataclass(frozen=True)
class Row:
    """One input as the model sees it."""

    tokens: Sequence[int]
    tokens_left_out: int = 0  # at its end, since the model sees no more
    token_types: Sequence[int] | None = None  # of pairs
    picked: tuple[int, ...] = ()  # positions that are asked about


class Verb(abc.ABC):
    """Something that a run can do; the fields of a subclass are its options."""

    fields: ClassVar[tuple[str, ...]] = ("text",)  # of a record, all needed
    optional: ClassVar[tuple[str, ...]] = ()  # of a record
    listed: ClassVar[str] = ""  # of a record, a list of texts that may stand in place of ``fields``
    # A number in each answer; how many are above 0 is told with ``note``. "": there is none.
    counted: ClassVar[str] = "tokens_left_out"

    @classmethod
    @abc.abstractmethod
    def serves(cls, objective: Objective) -> bool:
        """Whether runs of an objective can do it."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, field.name, checked(hints[field.name], value, field.name))

    def check(self, run: LoadedRun) -> None:  # noqa: B027
        """Refuses options that do not fit the run.

        Raises:
          UserError: they do not.
        """

    @classmethod
    @abc.abstractmethod
    def answer_fields(cls) -> tuple[str, ...]:
        """The names of what an answer holds."""

    def note(self, run: LoadedRun) -> str:
        """What is told of the answers that have some of `counted`."""
        return f"texts are longer than the {run.longest} tokens that the model sees; the rest of each was left out"

    @property
    def compiled_as(self) -> Verb:
        """The verb without options that ``compute`` does not depend on."""
        return self

    @abc.abstractmethod
    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """What the device does, pure; one entry a row in each array. ``variables`` are the run's, as arguments."""


class OneRow(Verb):
    """A verb that makes one row of each record."""

    @classmethod
    def answer_fields(cls) -> tuple[str, ...]:
        return _names(typing.get_type_hints(cls.result)["return"])

    @abc.abstractmethod
    def encode(self, run: LoadedRun, record: Mapping[str, Any]) -> Row:
        """Tokens of one record.

        Raises:
          UserError: the record cannot be answered.
        """

    def batch(self, rows: Sequence[Row], indices: Sequence[int], length: int) -> dict[str, Int[np.ndarray, "rows ..."]]:
        """Arrays for ``compute``: rows that begin at the left and are padded to ``length``, with their ``indices``."""
        batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "segment_ids", "positions")}
        if any(row.token_types is not None for row in rows):
            batch["token_types"] = np.zeros((len(rows), length), np.int32)
        for place, row in enumerate(rows):
            size = len(row.tokens)
            batch["tokens"][place, :size] = row.tokens
            batch["segment_ids"][place, :size] = 1
            batch["positions"][place, :size] = np.arange(size)
            if row.token_types is not None:
                batch["token_types"][place, :size] = row.token_types
        return batch | {"row": np.asarray(indices, np.int32)}

    @abc.abstractmethod
    def result(self, run: LoadedRun, row: Row, arrays: Mapping[str, np.ndarray]) -> Any:
        """The answer, a dataclass that a subclass names, from a row's part of what ``compute`` returned."""


class OneLabelledRow(OneRow):
    """A verb on a text or a pair, whichever the run has learned from, as fine-tuning sees it."""

    optional = ("pair",)

    def encode(self, run: LoadedRun, record: Mapping[str, Any]) -> Row:
        pair, paired = record.get("pair"), bool(run.written["data"].get("pair_field"))
        if paired and pair is None:
            raise UserError("no second text; the run has learned from pairs")
        if not paired and pair is not None:
            raise UserError("a second text, and the run has learned from single ones")
        return pair_of_texts(run, record["text"], pair) if paired else whole_document(run, record["text"])


class TaskRows(Verb):
    """A verb whose task makes the rows itself, perhaps several of a record, and reads its own predictions."""

    @classmethod
    def answer_fields(cls) -> tuple[str, ...]:
        return _names(*typing.get_args(typing.get_type_hints(cls.results)["return"]))

    def inputs(self, run: LoadedRun, record: Mapping[str, Any]) -> Any:
        """What the task makes rows of.

        Raises:
          UserError: the record cannot be answered.
        """

    @abc.abstractmethod
    def rows(self, run: LoadedRun, inputs: Sequence[Any]) -> Any:
        """The rows, with ``fetch`` and a length."""

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        viewed = run.objective.views(dict(batch), jax.random.key(0), jnp.zeros((), jnp.int32), train=False)
        return run.objective.predict(variables["params"], variables["state"], viewed)

    @abc.abstractmethod
    def results(self, run: LoadedRun, predictions: Mapping[str, np.ndarray], rows: Any, inputs: Sequence[Any]) -> list:
        """The answers, a list of a dataclass that a subclass names, from what ``compute`` returned for all rows."""


def _names(answer: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(answer))


def pair_of_texts(run: LoadedRun, text: str, pair: str) -> Row:
    """Two texts as fine-tuning sees them: ``[CLS] text [SEP] pair [SEP]``, the longer one cut first.

    Raises:
      UserError: one of them has no token.
    """
    words, ids = run.words, [run.tokens_of(one) for one in (text, pair)]
    for one, given in zip(ids, (text, pair), strict=True):
        if not one:
            raise UserError(f"there is no token in the text {quoted(given)}")
    a, b = map(len, ids)
    plan = text_pairs_plan(np.array([0, a + b]), np.array([b]), run.longest, words.pair_separators)
    first, second = (one[:length] for one, length in zip(ids, plan.piece_length.tolist(), strict=True))
    between = [words.sep_id] * words.pair_separators
    return Row(
        [words.cls_id, *first, *between, *second, words.sep_id],
        a + b - len(first) - len(second),
        token_types=[0] * (len(first) + 2) + [1] * (len(second) + len(between)),
    )


def whole_document(run: LoadedRun, text: str) -> Row:
    """A text as fine-tuning sees it: ``[CLS] text [SEP]``, cut where the run's rows end.

    Raises:
      UserError: there is no token in it.
    """
    ids = run.tokens_of(text)
    if not ids:
        raise UserError(f"there is no token in the text {quoted(text)}")
    kept = ids if run.longest is None else ids[: run.longest - 2]
    return Row([run.words.cls_id, *kept, run.words.sep_id], len(ids) - len(kept))

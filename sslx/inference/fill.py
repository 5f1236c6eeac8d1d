"""Fills masks: the likeliest tokens for each mask of a text, each by itself, from a masked language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sslx.data.files import without_halves
from sslx.errors import UserError, quoted
from sslx.inference.batching import power_of_two
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import OneRow, Row
from sslx.objective import Objective
from sslx.pretext.mlm import MaskedLanguageModel

MASK = "[MASK]"  # understood whatever the tokenizer's own mask is


@dataclasses.dataclass(frozen=True)
class Guess:
    """A token for a mask."""

    token: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Filled:
    """``masks`` has the guesses for each mask, likeliest first.

    ``filled`` is the text with the first of each in the place of its mask, and the rest as it was given.
    """

    filled: str
    masks: tuple[tuple[Guess, ...], ...]
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class MaskedRow(Row):
    """A row, its text, and where each mask begins in that and ends."""

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Fill(OneRow):
    """Fills the masks of texts."""

    top: int = 5  # guesses for each mask

    def __post_init__(self):
        super().__post_init__()
        if self.top < 1:
            raise UserError(f"top is {self.top}; expected at least 1")

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, MaskedLanguageModel)

    def check(self, run: LoadedRun) -> None:
        if self.top > run.words.size:
            raise UserError(f"top is {self.top}; expected at most {run.words.size}, the size of the vocabulary")

    def encode(self, run: LoadedRun, record: Mapping[str, Any]) -> MaskedRow:
        text, mask = without_halves(record["text"]), run.tokenizer.mask_token
        if mask not in text:
            text = text.replace(MASK, mask)
        words = run.words
        encoding = run.encoded_with_special(text)
        ids = encoding.ids
        kept = ids if run.longest is None else ids[: run.longest - 2]
        picked = tuple(place + 1 for place, token in enumerate(kept) if token == words.mask_id)
        beyond = ids[len(kept) :].count(words.mask_id)
        if beyond:
            raise UserError(f"{beyond} of {len(picked) + beyond} masks stand beyond the {len(kept)} tokens it can see")
        if not picked:
            raise UserError(f"no {MASK} in the text {quoted(text)}")
        spans = []
        for place in picked:
            start = text.index(mask, encoding.offsets[place - 1][0])  # a mask may stand for the spaces before it, too
            spans.append((start, start + len(mask)))
        tokens = [words.cls_id, *kept, words.sep_id]
        return MaskedRow(tokens, len(ids) - len(kept), picked=picked, text=text, spans=tuple(spans))

    def batch(self, rows: Sequence[Row], indices: Sequence[int], length: int) -> dict[str, Int[np.ndarray, "rows ..."]]:
        picked = np.zeros((len(rows), power_of_two(max(len(row.picked) for row in rows))), np.int32)
        for place, row in enumerate(rows):
            picked[place, : len(row.picked)] = row.picked
        return super().batch(rows, indices, length) | {"picked": picked}

    def compute(self, run: LoadedRun, variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        logits, _ = run.objective.module.apply({"params": variables["params"]}, dict(batch), deterministic=True)
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), self.top)
        return {"ids": ids, "probabilities": jnp.exp(values)}

    def result(self, run: LoadedRun, row: MaskedRow, arrays: Mapping[str, np.ndarray]) -> Filled:
        filled, end, masks = "", 0, []
        for (start, stop), ids, probabilities in zip(row.spans, arrays["ids"], arrays["probabilities"], strict=False):
            filled += row.text[end:start]
            filled += _in_text(run, int(ids[0]), after_space=filled == "" or filled[-1].isspace())
            end = stop
            masks.append(
                tuple(Guess(run.tokenizer.decode([i]), float(p)) for i, p in zip(ids, probabilities, strict=True))
            )
        return Filled(filled + row.text[end:], tuple(masks), row.tokens_left_out)


def _in_text(run: LoadedRun, token: int, *, after_space: bool) -> str:
    """A token's characters, without the mark of a piece inside a word, or a second space."""
    inside = getattr(run.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
    text = run.tokenizer.decode([token]).removeprefix(inside)
    return text.lstrip(" ") if after_space else text

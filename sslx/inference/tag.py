"""Tags words: names, parts of speech, from a run of token tagging; of a text, or of words that are split already.

Of a text signs are words of their own; words that are given stay what they are, whatever is in them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sslx.data.tagged_words import as_word
from sslx.errors import UserError, quoted
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import TaskRows
from sslx.objective import Objective
from sslx.tasks.token_tagging import TokenTagging

# Treebanks and CoNLL split like this: words, with the apostrophes and hyphens inside them, and each sign by itself.
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Tagged:
    """The words of a text and the tag of each; None where the model could not see the word."""

    words: tuple[str, ...]
    tags: tuple[str | None, ...]
    tokens_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Tag(TaskRows):
    """Tags of the words of texts, or of ``tokens``, a field named like that of the rows that tagging learns from."""

    listed = "tokens"

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, TokenTagging)

    def inputs(self, run: LoadedRun, record: Mapping[str, Any]) -> list[str]:
        if self.listed in record:
            return _given_words(record[self.listed])
        words = _WORD.findall(record["text"])
        if not words:
            raise UserError(f"there is no word in the text {quoted(record['text'])}")
        return words

    def rows(self, run: LoadedRun, inputs: Sequence[list[str]]) -> Any:
        return run.objective.rows_of(inputs)

    def results(
        self, run: LoadedRun, predictions: Mapping[str, np.ndarray], rows: Any, inputs: Sequence[list[str]]
    ) -> list[Tagged]:
        tags = run.objective.tags_of(predictions, rows, inputs)
        # As the rows are made: of the words joined by spaces, between [CLS] and [SEP].
        lengths = [len(run.tokens_of(" ".join(words))) for words in inputs]
        left_out = [max(0, length - (run.objective.seq_len - 2)) for length in lengths]
        return [Tagged(tuple(words), tuple(of), left) for words, of, left in zip(inputs, tags, left_out, strict=True)]


def _given_words(given: Any) -> list[str]:
    if not isinstance(given, list | tuple):
        raise UserError(f"the tokens are no list but {type(given).__name__}; expected a list of words")
    words = [as_word(word, f"tokens[{place}]") for place, word in enumerate(given)]
    if not any(word.strip() for word in words):
        raise UserError(f"there is no word in the tokens {words}")
    return words

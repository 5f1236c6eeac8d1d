"""Questions about contexts: from SQuAD's JSON (v1.1 and v2.0) or TFDS to rows of tokens.

In: a `QuestionsConfig`. Out: rows ``[CLS] question [SEP] part of the context [SEP]`` with token types, as BERT's
run_squad makes them: a context that is too long for one row is read through windows that begin ``doc_stride`` tokens
apart, and a window without the answer has it at [CLS], like a question without one. Where the tokenizer puts two [SEP]
between texts, as RoBERTa's does, so do rows. The tokenizer's character offsets lead from answers to tokens and back.

An answer whose text is not in the context at its place can be no label. Training skips it, and a question that has only
such answers; evaluation keeps both, since SQuAD's script scores by the texts alone, with [CLS] for a label where no
answer is at its place. Both are counted. Slices of SQuAD's files share no context; those of TFDS may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Int64

from sslx.data import python_questions
from sslx.data.cache import hash_of
from sslx.data.files import decoded, without_halves
from sslx.data.records import (
    Parser,
    PreparedRecords,
    Record,
    RecordsConfig,
    all_records,
    open_records,
)
from sslx.data.rows import RowOrder
from sslx.data.text import sources_and_tokenizer
from sslx.data.tokenizer import vocabulary
from sslx.data.tokens import encoding_backend
from sslx.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = 3  # [CLS], [SEP], [SEP]; a [SEP] more where two stand between texts
KEPT = "question_answering.json"


@dataclass(frozen=True)
class QuestionsConfig(RecordsConfig):
    """``config.data`` of question answering: ``python_questions``, ``squad:GLOB`` or ``tfds:NAME[/CONFIG]``."""

    seq_len: int = 384
    doc_stride: int = 128  # tokens from the beginning of one window to that of the next
    max_question_length: int = 64  # tokens; what is beyond is cut off

    def __post_init__(self):
        super().__post_init__()
        self.check_room(SPECIALS)

    def check_room(self, specials: int) -> None:
        """Refuses settings that leave too little room in rows with so many special tokens.

        Raises:
          UserError: no token of context, or fewer than ``doc_stride``, fit beside the longest question.
        """
        room = self.seq_len - specials - self.max_question_length
        if self.max_question_length < 1 or room < 1:
            raise UserError(
                f"config.data.max_question_length is {self.max_question_length}; expected 1 to "
                f"{self.seq_len - specials - 1}, or a question leaves no room for its context in rows of "
                f"config.data.seq_len={self.seq_len}"
            )
        if not 1 <= self.doc_stride <= room:
            raise UserError(
                f"config.data.doc_stride is {self.doc_stride}; expected 1 to {room}, the tokens of context beside a "
                f"question of {self.max_question_length} in rows of {self.seq_len}, or windows would leave tokens out"
            )


@dataclass(frozen=True)
class Question:
    """A question about a context. ``answers`` are texts and where they begin in it; none: it has no answer there."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()


class QuestionRows:
    """A window a row; those of a question are neighbours. Windows are numbered from ``first_window``.

    ``misplaced_answers`` are not in their context at their place, ``misplaced_questions`` have no others; with
    ``training`` both are left out.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerFast,
        config: QuestionsConfig,
        first_window: int = 0,
        *,
        training: bool = False,
    ):
        self.first_window, self._seq_len, self._vocabulary = first_window, config.seq_len, vocabulary(tokenizer)
        self._between = self._vocabulary.pair_separators
        specials = self._specials = 2 + self._between
        config.check_room(specials)
        backend = encoding_backend(tokenizer.backend_tokenizer.to_str())
        contexts = {text: i for i, text in enumerate(dict.fromkeys(question.context for question in questions))}
        self._contexts = [
            (np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
            for encoding in backend.encode_batch(list(contexts), add_special_tokens=False)
        ]
        asked = backend.encode_batch([question.question for question in questions], add_special_tokens=False)
        self.questions: list[Question] = []
        self._asked: list[np.ndarray] = []
        self._context: list[int] = []
        self.misplaced_answers, self.misplaced_questions, self.first_misplaced, self.questions_cut = 0, 0, "", 0
        windows = []  # (question, first token, tokens, the answer's first and last token in the context or -1)
        for question, encoding in zip(questions, asked, strict=True):
            context = contexts[question.context]
            offsets = self._contexts[context][1]
            good = [answer for answer in question.answers if _tokens_of(answer, question.context, offsets)]
            if len(good) < len(question.answers):
                self.misplaced_answers += len(question.answers) - len(good)
                self.misplaced_questions += not good
                self.first_misplaced = self.first_misplaced or question.question
                if training and not good:
                    continue
                if training:
                    question = Question(question.question, question.context, tuple(good))
            ids = np.array(encoding.ids, np.int32)
            self.questions_cut += len(ids) > config.max_question_length
            ids = ids[: config.max_question_length]
            span = _tokens_of(good[0], question.context, offsets) if good else (-1, -1)
            room, length = config.seq_len - specials - len(ids), len(offsets)
            for start in range(0, max(length - room, 0) + config.doc_stride, config.doc_stride):
                windows.append((len(self.questions), start, min(room, length - start), *span))
                if start + room >= length:
                    break
            self.questions.append(question)
            self._asked.append(ids)
            self._context.append(context)
        self._windows = np.array(windows, np.int64).reshape(-1, 5)
        self._asked_lengths = np.array([len(ids) for ids in self._asked], np.int64)

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def context_lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of context in each row."""
        return self._windows[:, 2]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int((self._asked_lengths[self._windows[:, 0]] + self._windows[:, 2] + self._specials).sum())

    @property
    def unanswerable(self) -> int:
        """How many questions have no answer."""
        return sum(not question.answers for question in self.questions)

    def order(self, seed: int) -> RowOrder:
        """Returns the order in which training takes the rows."""
        return RowOrder(len(self), seed)

    def question_of(self, window: int) -> int:
        """The number in ``questions`` of the question that a window (by its own number) belongs to."""
        return int(self._windows[window - self.first_window, 0])

    def characters(self, window: int, first: int, last: int) -> tuple[int, int]:
        """Where in the context the tokens at places ``first`` to ``last`` of a window begin and end."""
        question, start = self._windows[window - self.first_window, :2]
        offsets = self._contexts[self._context[question]][1]
        shift = start - self._begin(question)
        return int(offsets[first + shift, 0]), int(offsets[last + shift, 1])

    def most_context(self, window: int, places: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether a window is the one of its question where the tokens at some of its places have most context.

        As run_squad reckons: the smaller of the numbers of tokens on the two sides, and a hundredth of the window's
        length; of equal windows the first.
        """
        number = window - self.first_window
        question, start = self._windows[number, :2]
        first, stop = np.searchsorted(self._windows[:, 0], [question, question + 1])
        starts, lengths = self._windows[first:stop, 1:3].T
        before = (np.asarray(places) - self._begin(question) + start)[:, None] - starts
        context = np.minimum(before, lengths - 1 - before)
        score = np.where(context < 0, -np.inf, context + 0.01 * lengths)
        return first + np.argmax(score, axis=1) == number

    def _begin(self, question: int) -> int:
        """The place in a row where the context begins."""
        return int(self._asked_lengths[question]) + 1 + self._between

    def fetch(self, row_ids: Int64[np.ndarray, " n"]) -> Mapping[str, Int[np.ndarray, "n ..."]]:
        """Reads rows.

        Returns:
          int32 arrays. ``[n, seq_len]``: ``tokens``, ``segment_ids``, ``positions``, ``token_types``. ``[n]``:
          ``context_start`` and ``context_length``, ``answer_start`` and ``answer_end`` (places in the row, the end
          included; 0, which is [CLS], where there is none), and ``window``, the number of the row in this set.
        """
        shape = (len(row_ids), self._seq_len)
        names = ("segment_ids", "positions", "token_types")
        batch = {"tokens": np.full(shape, self._vocabulary.pad_id, np.int32)}
        batch |= {name: np.zeros(shape, np.int32) for name in names}
        singles = ("context_start", "context_length", "answer_start", "answer_end", "window")
        batch |= {name: np.zeros(len(row_ids), np.int32) for name in singles}
        for row, row_id in enumerate(np.asarray(row_ids).tolist()):
            question, start, length, first, last = self._windows[row_id].tolist()
            asked, (context, _) = self._asked[question], self._contexts[self._context[question]]
            begin = self._begin(question)
            end = begin + length + 1
            tokens = batch["tokens"][row]
            tokens[0], tokens[1 + len(asked) : end] = self._vocabulary.cls_id, self._vocabulary.sep_id
            tokens[1 : 1 + len(asked)], tokens[begin : end - 1] = asked, context[start : start + length]
            batch["segment_ids"][row, :end], batch["positions"][row, :end] = 1, np.arange(end)
            batch["token_types"][row, len(asked) + 2 : end] = 1
            inside = first >= start and last < start + length
            batch["answer_start"][row] = begin + first - start if inside else 0
            batch["answer_end"][row] = begin + last - start if inside else 0
            batch["context_start"][row], batch["context_length"][row] = begin, length
            batch["window"][row] = self.first_window + row_id
        return batch


def abstract_question_row(seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one row as ``QuestionRows.fetch`` gives it, without the axis of rows."""
    row = {name: (seq_len,) for name in ("tokens", "segment_ids", "positions", "token_types")}
    row |= {name: () for name in ("context_start", "context_length", "answer_start", "answer_end", "window")}
    return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in row.items()}


def prepare_questions(config: QuestionsConfig, tokenizer_override: str | None = None) -> PreparedRecords:
    """Prepares train, eval and, if asked for, test rows; their windows have numbers of their own.

    Raises:
      UserError: whatever the source, the splits or the tokenizer do not allow, or a split without a usable question.
    """
    parsers = {"squad": Parser((".json",), _read_squad, "context")}
    collection = open_records(
        config, parsers, _from_tfds, embedded={python_questions.NAME: python_questions.python_questions}
    )
    sources, tokenizer = sources_and_tokenizer(config, collection, tokenizer_override)
    words = vocabulary(tokenizer)
    rows: dict[str, QuestionRows] = {}
    statistics, taken = {}, 0
    for role in sorted(sources, key=("eval", "test", "train").index):
        questions = [Question(r["question"], r["context"], r["answers"]) for r in all_records(sources[role])]
        made = rows[role] = QuestionRows(questions, tokenizer, config, taken, training=role == "train")
        taken += len(made)
        if not len(made):
            raise UserError(
                f"split {sources[role].split!r} of {config.source}: no question has an answer that is in its context "
                f"at answer_start ({made.misplaced_answers:,} answers skipped)"
            )
        statistics |= {
            f"{role}_split": sources[role].split,
            f"{role}_questions": len(made.questions),
            f"{role}_unanswerable": made.unanswerable,
            f"{role}_rows": len(made),
            f"{role}_tokens": made.num_tokens,
            f"{role}_misplaced_answers": made.misplaced_answers,
            f"{role}_misplaced_questions": made.misplaced_questions,
            f"{role}_questions_cut": made.questions_cut,
        }
        if made.misplaced_answers:
            done = "skipped" if role == "train" else "scored by their text alone"
            print(
                f"{role}: {made.misplaced_answers:,} answers are not in their context at answer_start, and "
                f"{made.misplaced_questions:,} questions have no other; these are {done} "
                f"(first: {made.first_misplaced[:60]!r})",
                flush=True,
            )
    statistics["unread_splits"] = collection.unread(source.split for source in sources.values())
    statistics["tokens_per_row"] = statistics["train_tokens"] / statistics["train_rows"]
    statistics["uniform_loss"] = float(np.log(rows["eval"].context_lengths + 1.0).mean())
    fingerprints = {role: source.fingerprint for role, source in sources.items()}
    shape = (config.seq_len, config.doc_stride, config.max_question_length)
    statistics["fingerprint"] = hash_of("questions", fingerprints, words.fingerprint, shape)
    kept = {KEPT: {"unanswerable": any(made.unanswerable for made in rows.values())}}
    return PreparedRecords(rows["train"], rows["eval"], rows.get("test"), tokenizer, words, statistics, kept)


def saved_unanswerable(run: Path) -> bool:
    """Whether the questions that a run was trained on may have no answer.

    Raises:
      UserError: the folder does not say.
    """
    file = Path(run) / KEPT
    if not file.is_file():
        raise UserError(f"{run} has no {KEPT}; expected the folder of a run on questions")
    return bool(json.loads(file.read_text(encoding="utf8"))["unanswerable"])


def _tokens_of(answer: tuple[str, int], context: str, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token of an answer; None if it is not in the context at its place, or has no token."""
    text, start = answer
    if not text or start < 0 or context[start : start + len(text)] != text:
        return None
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _read_squad(path: str) -> list[Record]:
    try:
        with open(path, "rb") as file:
            given = without_halves(json.loads(decoded(file.read(), path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    records = []
    for a, article in enumerate(_part(given, "data", list, path, "the file")):
        where = f"data[{a}]"
        for p, paragraph in enumerate(_part(article, "paragraphs", list, path, where)):
            there = f"{where}.paragraphs[{p}]"
            context = _part(paragraph, "context", str, path, there)
            for q, item in enumerate(_part(paragraph, "qas", list, path, there)):
                place = f"{there}.qas[{q}]"
                question = _part(item, "question", str, path, place)
                impossible = item.get("is_impossible")
                # Some writers leave out the answers of a question that has none.
                left_out = impossible and item.get("answers") is None
                listed = [] if left_out else _part(item, "answers", list, path, place)
                answers = [
                    (
                        _part(answer, "text", str, path, f"{place}.answers[{i}]"),
                        _part(answer, "answer_start", int, path, f"{place}.answers[{i}]"),
                    )
                    for i, answer in enumerate(listed)
                ]
                records.append(_record(question, context, [] if impossible else answers))
    return records


def _part(given: Any, name: str, kind: type, path: str, where: str) -> Any:
    if not isinstance(given, dict) or not isinstance(given.get(name), kind):
        names = {list: "a list", str: "a text", int: "a number"}
        raise UserError(
            f"{path} is no SQuAD file: {where} has no {name!r} that is {names[kind]}; expected data > paragraphs > "
            "context, qas > question, answers > text, answer_start"
        )
    return given[name]


def _record(question: str, context: str, answers: Sequence[tuple[str, int]]) -> Record:
    return {"text": f"{question} {context}", "question": question, "context": context, "answers": tuple(answers)}


def _from_tfds(spec: str, features: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Record]:
    for name in ("question", "context", "answers"):
        if name not in features:
            raise UserError(f"{spec} has no field {name!r}; {nearest(name, features)}")

    def text(value: Any) -> str:
        return value if isinstance(value, str) else decoded(bytes(value), spec)

    def convert(example: Mapping[str, Any]) -> Record:
        answers = example["answers"]
        pairs = [(text(t), int(s)) for t, s in zip(answers["text"], answers["answer_start"], strict=True)]
        return _record(
            text(example["question"]), text(example["context"]), [] if example.get("is_impossible") else pairs
        )

    return convert

"""Extractive question answering: where in a context an answer begins and ends (BERT, arXiv 1810.04805, section 4.2).

In: windows ``[CLS] question [SEP] context [SEP]``. Out: one term, the mean of the cross-entropies of start and end
over [CLS], which stands for "no answer", and the row's context; padding and question take no probability. Answers are
the likeliest spans over all windows of a question, "" where [CLS] is likelier by more than ``null_threshold``; as in
run_squad a span counts only in the window where its first token has most context. Exact match and F1 over all questions
at once are SQuAD's, in percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sslx.data.questions import (
    KEPT,
    Question,
    QuestionRows,
    QuestionsConfig,
    abstract_question_row,
    prepare_questions,
    saved_unanswerable,
)
from sslx.data.records import PreparedRecords
from sslx.data.text import saved_tokenizer
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.models.layers import Dense, Dropout
from sslx.models.losses import softmax_cross_entropy
from sslx.objective import Batch, Mean, Out, Report, Term, Variables
from sslx.tasks.squad_scores import best_threshold, exact_match, f1
from sslx.tasks.text import TextTask

CANDIDATES = 20  # spans a window offers
IMPOSSIBLE = -1e9  # the logit of a place that no answer can begin or end at


@dataclasses.dataclass(frozen=True)
class QuestionAnsweringConfig:
    """``config.task`` of ``name="question_answering"``."""

    name: str = "question_answering"
    dropout: float = 0.1  # in the encoder and before the head, whatever pretraining used
    max_answer_length: int = 30  # tokens
    null_threshold: float = 0.0  # how much likelier "no answer" has to be than the best answer to be said

    def __post_init__(self):
        if self.max_answer_length < 1:
            raise UserError(f"config.task.max_answer_length is {self.max_answer_length}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A part of the context, ``context[start:stop]``, and its score: the sum of its two logits."""

    text: str
    score: float
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the model says to one question: ``text`` ("": no answer), the best spans, each text once, best first, and
    ``no_answer``, how much the score of "no answer" is above that of the best span."""

    text: str
    answers: tuple[Answer, ...]
    no_answer: float


class QuestionAnswerer(nn.Module):
    """Encoder, dropout, and two logits a token."""

    config: BertConfig
    task: QuestionAnsweringConfig
    vocab_size: int

    def setup(self):
        self.encoder = self.config.encoder(self.vocab_size)
        self.drop = Dropout(self.task.dropout)
        self.head = Dense(2, ("embed", "types"))

    def __call__(
        self, batch: Batch, *, deterministic: bool
    ) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
        x = self.encoder(batch, deterministic=deterministic)
        logits = self.head(self.drop(x, deterministic=deterministic)).astype(jnp.float32)
        return logits[..., 0], logits[..., 1]


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(TextTask):
    """The objective of ``config.task.name = "question_answering"``."""

    task_config = QuestionAnsweringConfig
    data_config = QuestionsConfig
    models = ("bert",)  # a causal model's [CLS] has seen nothing that could tell whether there is an answer

    data: QuestionsConfig
    unanswerable: bool  # whether a question may have no answer, as in SQuAD v2
    held_out: tuple[QuestionRows, ...] = dataclasses.field(default=(), repr=False)  # texts to score against

    head_reads = "spans"

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any], tokenizer: str | None = None
    ) -> tuple[QuestionAnswering, PreparedRecords]:
        task, model, data_config = cls._built(config)
        data = prepare_questions(data_config, tokenizer)
        held_out = tuple(rows for rows in (data.eval, data.test) if rows is not None)
        unanswerable = data.kept[KEPT]["unanswerable"]
        return cls(task, model, data.vocabulary.size, data.tokenizer, data_config, unanswerable, held_out), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[QuestionAnswering, dict[str, jax.ShapeDtypeStruct]]:
        task, model, data_config = cls._built(config)
        row = abstract_question_row(data_config.seq_len)
        return cls(task, model, data_config.vocab_size, None, data_config, True), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> QuestionAnswering:
        task, model, data_config = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(task, model, words.size, tokenizer, data_config, saved_unanswerable(run))

    @property
    def module(self) -> QuestionAnswerer:
        """The Linen module."""
        return QuestionAnswerer(self.model, self.task, self.vocab_size)

    def rows_of(self, questions: Sequence[Question]) -> QuestionRows:
        """Rows of questions, all of them at least one; ``predict`` of these goes into `answers_of`."""
        return QuestionRows(questions, self.tokenizer, self.data)

    def answers_of(self, predictions: Mapping[str, np.ndarray], rows: QuestionRows, count: int = 1) -> list[Answered]:
        """The best ``count`` answers to each of ``rows.questions``.

        Args:
          predictions: From ``predict`` of rows of this set, in any order; a question without any gets "".
          rows: The set: from `rows_of`, or one that is held out.
          count: At most `CANDIDATES`.
        """
        found: list[list[tuple[float, int, int, int]]] = [[] for _ in rows.questions]
        null = np.full(len(rows.questions), np.inf)
        for window, scores, starts, ends, score in zip(
            *(predictions[name] for name in ("window", "scores", "starts", "ends", "null")), strict=True
        ):
            question = rows.question_of(int(window))
            null[question] = min(null[question], score)  # as run_squad: the window that is least sure of it
            found[question] += [
                (float(s), int(window), int(first), int(last))
                for s, first, last, here in zip(
                    scores, starts, ends, rows.most_context(int(window), starts), strict=True
                )
                if s > IMPOSSIBLE / 2 and first > 0 and here
            ]
        answered = []
        for question, candidates, least in zip(rows.questions, found, null, strict=True):
            answers: dict[str, Answer] = {}
            for score, window, first, last in sorted(candidates, key=lambda candidate: -candidate[0]):
                start, stop = rows.characters(window, first, last)
                text = question.context[start:stop].strip()
                if text and text not in answers:
                    answers[text] = Answer(text, score, start, stop)
                if len(answers) == count:
                    break
            best = next(iter(answers.values()), None)
            no_answer = float(least) - best.score if best is not None else -IMPOSSIBLE
            silent = best is None or (self.unanswerable and no_answer > self.task.null_threshold)
            answered.append(Answered("" if silent else best.text, tuple(answers.values()), no_answer))
        return answered

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=False)
        return super().init(key, viewed)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        return batch | {"weights": {"answer": jnp.ones(batch["tokens"].shape[0], jnp.float32)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        start, end = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        possible = _in_context(batch) | (jnp.arange(start.shape[1]) == 0)
        start, end = (jnp.where(possible, logits, IMPOSSIBLE) for logits in (start, end))
        weights = batch["weights"]["answer"]
        losses = softmax_cross_entropy(start, batch["answer_start"]) + softmax_cross_entropy(end, batch["answer_end"])
        right = (jnp.argmax(start, axis=-1) == batch["answer_start"]) & (
            jnp.argmax(end, axis=-1) == batch["answer_end"]
        )
        accuracy = Mean(jnp.sum(weights * right.astype(jnp.float32)), jnp.sum(weights))
        return Out({"answer": Term(jnp.sum(weights * losses / 2))}, {"window_accuracy": accuracy})

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length 2"]:
        """Of each token, that the answer begins and that it ends there."""
        return jnp.stack(self.module.apply({"params": params}, batch, deterministic=True), axis=-1)

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        return 3.0 * rows * (self.model.flops_per_row(length) + 2 * length * self.model.width * 2)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        return statistics.get("uniform_loss")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        start, end = self.module.apply({"params": params}, batch, deterministic=True)
        scores, starts, ends = top_spans(start, end, _in_context(batch), self.task.max_answer_length, CANDIDATES)
        null = start[:, 0] + end[:, 0]
        return {"window": batch["window"], "scores": scores, "starts": starts, "ends": ends, "null": null}

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        answered = self._answered(predictions)
        gold = [[text for text, _ in question.answers] for question, _ in answered]
        said = [answer.text for _, answer in answered]
        has = np.array([bool(texts) for texts in gold])
        exact = np.array([exact_match(text, texts) for text, texts in zip(said, gold, strict=True)])
        overlap = np.array([f1(text, texts) for text, texts in zip(said, gold, strict=True)])
        values = {"exact_match": 100 * exact.mean(), "f1": 100 * overlap.mean()}
        if self.unanswerable:
            values["has_answer_exact_match"] = 100 * exact[has].mean() if has.any() else 0.0
            values["has_answer_f1"] = 100 * overlap[has].mean() if has.any() else 0.0
            values["no_answer_exact_match"] = 100 * exact[~has].mean() if not has.all() else 0.0
            # As SQuAD's script: the threshold that would have been best, were there only it to choose.
            best = [answer.answers[0].text if answer.answers else "" for _, answer in answered]
            no_answer = [answer.no_answer for _, answer in answered]
            for name, rule in (("exact_match", exact_match), ("f1", f1)):
                scores = [rule(text, texts) for text, texts in zip(best, gold, strict=True)]
                threshold, reached = best_threshold(scores, no_answer, has.tolist())
                values |= {f"best_{name}": 100 * reached, f"best_{name}_threshold": threshold}
        return {name: float(value) for name, value in values.items()}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        return [
            {
                "question": question.question,
                "answers": " | ".join(dict.fromkeys(text for text, _ in question.answers)) or "(none)",
                "guess": answer.text or "(none)",
            }
            for question, answer in self._answered(predictions)
        ]

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for row in range(len(batch["row"])):
            tokens, first, last = (batch[name][row] for name in ("tokens", "answer_start", "answer_end"))
            real = int((batch["segment_ids"][row] > 0).sum())
            answer = self.tokenizer.decode(tokens[first : last + 1]) if last else "(not in this window)"
            text = " ".join(self.tokenizer.convert_ids_to_tokens(tokens[:real]))
            rows.append({"text": text, "answer": answer, "tokens": f"{real} of {len(tokens)}"})
        return rows

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        scores = self.score(predictions)
        questions = len(self._answered(predictions))
        text = "\n".join(f"{name:<28}{value:>9.2f}" for name, value in scores.items())
        return Report(f"{questions:,} questions\n{text}", {"questions": questions}, {})

    def _answered(self, predictions: Mapping[str, np.ndarray]) -> list[tuple[Question, Answered]]:
        """The held-out questions of which there are predictions, and what was said."""
        windows = predictions["window"]
        rows = next(r for r in self.held_out if r.first_window <= windows[0] < r.first_window + len(r))
        answers = self.answers_of(predictions, rows)
        asked = sorted({rows.question_of(int(window)) for window in windows})
        return [(rows.questions[i], answers[i]) for i in asked]


def _in_context(batch: Batch) -> Bool[Array, "batch length"]:
    place, start = jnp.arange(batch["tokens"].shape[1]), batch["context_start"][:, None]
    return (place >= start) & (place < start + batch["context_length"][:, None])


def top_spans(
    start: Float[Array, "batch length"],
    end: Float[Array, "batch length"],
    possible: Bool[Array, "batch length"],
    longest: int,
    count: int,
) -> tuple[Float[Array, "batch count"], Int[Array, "batch count"], Int[Array, "batch count"]]:
    """The best spans of each row among all of 1 to ``longest`` tokens that begin and end at a possible place.

    Returns:
      Scores (the sum of the two logits; about `IMPOSSIBLE` where there are fewer spans), first and last places.
    """
    length = start.shape[1]
    longest = min(longest, length)
    start, end = (jnp.where(possible, logits, IMPOSSIBLE) for logits in (start, end))
    ahead = jnp.pad(end, ((0, 0), (0, longest)), constant_values=IMPOSSIBLE)
    pairs = jnp.stack([start + ahead[:, more : more + length] for more in range(longest)], axis=1)
    scores, places = jax.lax.top_k(pairs.reshape(start.shape[0], -1), min(count, longest * length))
    starts = places % length
    return scores, starts, starts + places // length

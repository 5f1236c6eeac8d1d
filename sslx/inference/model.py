"""The Python API: ``model = sslx.load("runs/bert_mlm")``, and a method a verb.

A method takes one input (a text; of runs on pictures, the path of one or its pixels) or a list of them and gives one
answer or a list in the same order (`Model.embed`: a vector or ``[n, width]``). A tuple of two texts is a pair to
`Model.classify` and `Model.score`; to every other method, which knows no pairs, it is a list of texts like any other.
Each is compiled once for a shape, of which there are few.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sslx.config import checked, load_class
from sslx.errors import UserError, choose
from sslx.inference import BY_MODALITY, VERBS
from sslx.inference.answer import AnswerQuestion, Answers
from sslx.inference.batching import Answerer
from sslx.inference.classify import Classified, Classify
from sslx.inference.embed import Embed
from sslx.inference.fill import Fill, Filled
from sslx.inference.generate import Generate, Generated
from sslx.inference.loading import LoadedRun, load_run
from sslx.inference.pictures import ClassifiedPicture, ClassifyPictures, EmbedPictures, Picture, is_picture
from sslx.inference.score import Score, Scored
from sslx.inference.tag import Tag, Tagged
from sslx.inference.verb import InputError, Verb

Texts = str | Sequence[str]
Pair = tuple[str, str] | list[str]
TextsOrPairs = str | Pair | Sequence[str | Pair]
Pictures = Picture | Sequence[Picture]
Words = tuple[str, ...] | list[str]


def load(run: str | os.PathLike[str], *, step: int | None = None) -> Model:
    """Loads a trained run.

    Args:
      run: Its folder.
      step: Which checkpoint; None: the best of a downstream task's run, the newest of any other.

    Raises:
      UserError: no run or no checkpoint there, or an objective that needs its data.
    """
    if not isinstance(run, str | os.PathLike) or not os.fspath(run):
        raise UserError(f"run is {run!r}; expected the folder of a run, such as 'runs/bert_mlm'")
    return Model(load_run(os.fspath(run), checked(int | None, step, "step")))


class Model:
    """A loaded run. What it cannot do is refused by a line that names what it can."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self._answerer = Answerer(run)

    @property
    def verbs(self) -> tuple[str, ...]:
        """What it can do; first what it was trained for."""
        objective = self.run.objective
        names = BY_MODALITY[objective.modality]
        return tuple(name for name in names if verb_class(name, objective.modality).serves(objective))

    def fill(self, texts: Texts, *, top: int = 5, batch_size: int = 32) -> Filled | list[Filled]:
        """The likeliest tokens for each ``[MASK]``.

        Raises:
          UserError: a text has no mask, or one beyond what the model can see.
        """
        return self._texts(Fill(top), texts, batch_size)

    def embed(
        self, inputs: Texts | Pictures, *, pool: str | None = None, normalise: bool = True, batch_size: int = 32
    ) -> Float[np.ndarray, "*n width"]:
        """A vector a text or picture; of none, an array of shape ``[0, width]``.

        Args:
          inputs: One or many.
          pool: Of texts: ``mean`` over tokens (None), ``first`` or ``last`` token, or ``own``: as the objective gives
            them to probes, which is how pictures are embedded.
          normalise: To length 1.
          batch_size: How many go through the model at once.

        Raises:
          UserError: a text without a token; what is no picture.
        """
        if self._of_pictures:
            if pool is not None:
                raise UserError(f"pool is {pool!r}, and of pictures it is the run's own (config.model.pool); leave it")
            verb = EmbedPictures(normalise)
            found = self._pictures(verb, inputs, batch_size)
        else:
            verb = Embed("mean" if pool is None else pool, normalise)
            found = self._texts(verb, inputs, batch_size)
        if not isinstance(found, list):
            return found.embedding
        vectors = [one.embedding for one in found]
        return np.stack(vectors) if vectors else np.zeros((0, verb.width(self.run)), np.float32)

    def generate(
        self,
        prompts: Texts,
        *,
        new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Generated | list[Generated]:
        """How texts go on.

        Raises:
          UserError: a prompt and ``new_tokens`` are more than the run has learned positions for.
        """
        return self._texts(Generate(new_tokens, temperature, top_k, top_p, seed), prompts, batch_size)

    def classify(
        self, inputs: TextsOrPairs | Pictures, *, batch_size: int = 32
    ) -> Classified | ClassifiedPicture | list[Classified] | list[ClassifiedPicture]:
        """Labels with probabilities. A pair is a tuple of two texts, or a list of two where the run takes pairs.

        Raises:
          UserError: a text without a token; a pair where the run has learned from single texts, or the reverse; what
            is no picture.
        """
        if self._of_pictures:
            return self._pictures(ClassifyPictures(), inputs, batch_size)
        return self._texts(Classify(), inputs, batch_size)

    def score(self, texts: TextsOrPairs, *, batch_size: int = 32) -> Scored | list[Scored]:
        """Numbers, of a run on labels that are numbers; texts and pairs as `classify` takes them.

        Raises:
          UserError: a text without a token; a pair where the run has learned from single texts, or the reverse.
        """
        return self._texts(Score(), texts, batch_size)

    def tag(self, texts: str | Sequence[str | Words], *, batch_size: int = 32) -> Tagged | list[Tagged]:
        """A tag for each word.

        Args:
          texts: One text, or a list in which each is a text or the list of its words: ``[["Anna", "sings"]]``, since
            ``["Anna", "sings"]`` are two texts.
          batch_size: How many go through the model at once.

        Raises:
          UserError: a text without a word, or a word that is none.
        """
        return self._texts(Tag(), texts, batch_size)

    def answer(self, question: Texts, context: Texts, *, top: int = 1, batch_size: int = 32) -> Answers | list[Answers]:
        """Answers to questions, each about a context of its own or all about one.

        Raises:
          UserError: as many contexts as questions were expected, or one of them has no token.
        """
        verb, alone = AnswerQuestion(top), isinstance(question, str)
        questions = [question] if alone else _listed(question, "a question")
        contexts = [context] * len(questions) if isinstance(context, str) else _listed(context, "a context")
        if alone and not isinstance(context, str):
            raise UserError("one question and several contexts; expected one context")
        if len(contexts) != len(questions):
            raise UserError(f"{len(questions)} questions and {len(contexts)} contexts; expected one for each")
        for index, given in enumerate(zip(questions, contexts, strict=True)):
            for name, text in zip(("question", "context"), given, strict=True):
                if not isinstance(text, str):
                    raise InputError(index, f"expected a {name}, got {_kind(text)}")
        found = self._answers(verb, questions, contexts, batch_size)
        return found[0] if alone else found

    def answers(self, verb: Verb, records: Sequence[Mapping[str, Any]], batch_size: int) -> Any:
        """An iterator over the answers to records, which hold the verb's fields.

        Raises:
          UserError: the run cannot do it, or a record cannot be answered; before anything is computed.
        """
        self.require(_name_of(verb))
        return self._answerer.results(verb, records, batch_size)

    def require(self, verb: str) -> None:
        """Refuses a verb that the run cannot do.

        Raises:
          UserError: it cannot; names what it can.
        """
        choose(verb, VERBS, "verb")
        if verb not in self.verbs:
            able = f"it can {', '.join(self.verbs)}" if self.verbs else "nor can it be asked for anything else"
            raise UserError(f"{self.run.name} is a run of {self.run.kind} and cannot {verb}; {able}")

    def _answers(
        self, verb: AnswerQuestion, questions: Sequence[str], contexts: Sequence[str], batch_size: int
    ) -> list[Answers]:
        records = [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
        found = list(self.answers(verb, records, batch_size))
        self._warn(verb, found)
        return found

    def _texts(self, verb: Verb, texts: Texts, batch_size: int) -> Any:
        self.require(_name_of(verb))  # before texts are asked for where there can be none
        pairs, records = "pair" in verb.optional, []
        alone = isinstance(texts, str) or (pairs and self._is_pair(texts))
        for index, text in enumerate([texts] if alone else _listed(texts, "a text")):
            if verb.listed and isinstance(text, tuple | list):
                records.append({verb.listed: text})
                continue
            parts = text if pairs and isinstance(text, tuple | list) else (text,)
            if not all(isinstance(part, str) for part in parts):
                raise InputError(index, f"expected a text, got {_kind(text)}")
            if parts is text and len(parts) != 2:
                raise InputError(index, f"expected a text or a pair of texts, got a {_kind(text)} of {len(parts)}")
            records.append(dict(zip(("text", "pair"), parts, strict=False)))
        found = list(self.answers(verb, records, batch_size))
        self._warn(verb, found)
        return found[0] if alone else found

    @property
    def _of_pictures(self) -> bool:
        return self.run.objective.modality == "images"

    def _pictures(self, verb: Verb, pictures: Pictures, batch_size: int) -> Any:
        alone = is_picture(pictures)
        records = [{"image": picture} for picture in ([pictures] if alone else _listed(pictures, "a picture"))]
        found = list(self.answers(verb, records, batch_size))
        return found[0] if alone else found

    def _is_pair(self, texts: Any) -> bool:
        """Whether these are one pair; a list of texts is, if there are two and the run takes nothing but pairs."""
        if isinstance(texts, list) and self.run.written["data"].get("pair_field"):
            return len(texts) == 2 and all(isinstance(text, str) for text in texts)
        return isinstance(texts, tuple) and len(texts) > 0 and all(isinstance(text, str) for text in texts)

    def _warn(self, verb: Verb, found: Sequence[Any]) -> None:
        count = sum(getattr(one, verb.counted) > 0 for one in found) if verb.counted else 0
        if count:
            warnings.warn(f"{count} of {len(found)} {verb.note(self.run)}", stacklevel=4)


def _listed(given: Any, one: str) -> list[Any]:
    """The inputs that were given together.

    Raises:
      UserError: it is nothing of that kind.
    """
    if not isinstance(given, bytes | Mapping):
        with contextlib.suppress(TypeError):  # what iterating over anything else raises
            return list(given)
    raise UserError(f"expected {one} or a list of them, got {_kind(given)}")


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _name_of(verb: Verb) -> str:
    places = (place for verbs in BY_MODALITY.values() for place in verbs.items())
    return next(name for name, path in places if path.endswith(f":{type(verb).__name__}"))


def verb_class(name: str, modality: str = "text") -> type[Verb]:
    """The class behind a verb's name."""
    return load_class(name, BY_MODALITY[modality], "verb", Verb)

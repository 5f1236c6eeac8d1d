"""Features of labelled texts: from a frozen encoder, and from counting words.

In: labelled rows of tokens. Out: `Labelled` features for the probes. The bags of words are of the same tokens that
the encoder sees, so that both know the same of each text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from sslx.objective import Objective

INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # scikit-learn's C


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Features of rows with the label of each."""

    features: Float[np.ndarray, "rows dim"]
    labels: Int[np.ndarray, " rows"]


class Encoder:
    """Encodes rows with an objective's frozen encoder, in batches of one shape."""

    def __init__(self, objective: Objective, batch_size: int):
        self._encode = jax.jit(objective.encode)
        self._batch_size = batch_size

    def __call__(self, variables: Any, rows: Any) -> Labelled:
        """Features of all rows; ``variables`` as ``Objective.encoder`` gives them."""
        features, labels = [], []
        for start in range(0, len(rows), self._batch_size):
            ids = np.arange(start, min(start + self._batch_size, len(rows)))
            batch = dict(rows.fetch(np.resize(ids, self._batch_size)))  # the last one is filled up with rows of its own
            labels.append(batch.pop("label")[: len(ids)])
            features.append(np.asarray(self._encode(variables, batch), np.float32)[: len(ids)])
        return Labelled(np.concatenate(features), np.concatenate(labels))


def texts_of(rows: Any, tokenizer: Any) -> list[str]:
    """What the encoder sees of each row, as text."""
    texts = []
    for start in range(0, len(rows), 1024):
        tokens = rows.fetch(np.arange(start, min(start + 1024, len(rows))))["tokens"]
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def bag_of_words(texts: Mapping[str, list[str]], labels: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
    """Logistic regression on TF-IDF of words; its penalty is chosen on validation.

    Args:
      texts: Of ``train``, ``validation`` and ``test``.
      labels: Of each text.

    Returns:
      The labels that it gives to the test texts, and how it was chosen.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    train = vectorizer.fit_transform(texts["train"])
    validation = vectorizer.transform(texts["validation"])
    best, chosen = None, (-1.0, 0.0)
    for inverse_penalty in INVERSE_PENALTIES:
        model = LogisticRegression(C=inverse_penalty, max_iter=300).fit(train, labels["train"])
        accuracy = float(np.mean(model.predict(validation) == labels["validation"]))
        if accuracy > chosen[0]:
            best, chosen = model, (accuracy, inverse_penalty)
    guesses = best.predict(vectorizer.transform(texts["test"]))
    return guesses, {"validation_accuracy": chosen[0], "C": chosen[1], "words": len(vectorizer.vocabulary_)}

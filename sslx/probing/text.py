"""Probes on labelled texts: their rows, and the baseline that counts words.

In: labelled rows of tokens. Out: what the probes need. The bags of words are of the same tokens that the encoder sees,
so that both know the same of each text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from sslx.data.labels import check_classes
from sslx.data.text import PreparedText, TextConfig, prepare_text
from sslx.errors import UserError
from sslx.inference.loading import LoadedRun
from sslx.probing.features import Labelled
from sslx.probing.probe import ProbeConfig, Result, result
from sslx.storage import local_copy

INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # scikit-learn's C


@dataclasses.dataclass(frozen=True)
class TextProbeConfig(ProbeConfig):
    """The config of an evaluation of a run on texts."""

    name: str = "text_probe"
    bag_of_words: bool = True  # the TF-IDF baseline
    data: TextConfig = dataclasses.field(default_factory=TextConfig)


class TextProbe:
    """`Probe` on texts."""

    config_class = TextProbeConfig

    def open(self, config: TextProbeConfig, folder: Path, run: LoadedRun) -> PreparedText:
        """Labelled rows with the run's tokenizer, no longer than its own."""
        if run.longest is not None and config.data.seq_len > run.longest:
            raise UserError(
                f"config.data.seq_len is {config.data.seq_len}, and {folder} has learned from rows of {run.longest}; "
                f"expected at most that"
            )
        tokenizer = str(local_copy(folder / "tokenizer"))
        data = prepare_text(config.data, layout="documents", tokenizer_override=tokenizer, seed=config.seed)
        check_classes(data, config.data)
        return data

    def data(self, config: TextProbeConfig, run: LoadedRun) -> dict[str, Any]:
        return dataclasses.asdict(config.data)

    def raw(self, config: TextProbeConfig, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, Labelled]:
        return {}

    def baselines(
        self, config: TextProbeConfig, rows: Mapping[str, Any], labels: Mapping[str, np.ndarray], run: LoadedRun
    ) -> list[Result]:
        if not config.bag_of_words:
            return []
        texts = {split: texts_of(of, run.tokenizer) for split, of in rows.items()}
        guesses, chosen = bag_of_words(texts, labels)
        return [result("TF-IDF", "linear", guesses, labels["test"], chosen)]

    def pictures(self, config: TextProbeConfig, rows: Mapping[str, Any], run: LoadedRun) -> dict[str, np.ndarray]:
        return {}


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

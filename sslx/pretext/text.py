"""What pretext tasks on text have in common: from a written config to the objective, with its data or without.

A task on text derives from `TextPretext`, names its part of the config and says what else it needs of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax

from sslx.config import build
from sslx.data.rows import abstract_row
from sslx.data.text import Layout, PreparedText, TextConfig, prepare_text, saved_tokenizer
from sslx.data.tokenizer import Vocabulary, abstract_vocabulary
from sslx.models.text import TextModelConfig, build_text_model
from sslx.objective import Objective


@dataclasses.dataclass(frozen=True)
class TextPretext(Objective):
    """A pretext task on rows of tokens; ``pretext`` is its part of the config, of the class ``pretext_config``."""

    pretext_config: ClassVar[type]
    models: ClassVar[tuple[str, ...]] = ("bert",)  # that it can train

    pretext: Any
    model: TextModelConfig
    vocabulary: Vocabulary
    tokenizer: Any  # decodes tokens in ``show`` and ``preview``

    @classmethod
    def layout(cls, pretext: Any) -> Layout:
        """How its rows are laid out."""
        return "packed"

    @classmethod
    def check(cls, pretext: Any, model: TextModelConfig, config: Mapping[str, Any]) -> None:
        """Refuses parts of a config that are right by themselves and not together.

        Raises:
          UserError: they are not.
        """

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Self, PreparedText]:
        pretext, model, data_config = cls._built(config)
        layout = cls.layout(pretext)
        data = prepare_text(data_config, layout=layout, tokenizer_override=tokenizer, seed=config["seed"])
        return cls(pretext, model, data.vocabulary, data.tokenizer), data

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Self, dict[str, jax.ShapeDtypeStruct]]:
        pretext, model, data_config = cls._built(config)
        row = abstract_row(data_config.seq_len, cls.layout(pretext))
        return cls(pretext, model, abstract_vocabulary(data_config.vocab_size), None), row

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Self:
        pretext, model, _ = cls._built(config)
        tokenizer, words = saved_tokenizer(run)
        return cls(pretext, model, words, tokenizer)

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Any, TextModelConfig, TextConfig]:
        pretext = build(cls.pretext_config, config["pretext"], "config.pretext")
        data_config = build(TextConfig, config["data"], "config.data")
        model = build_text_model(config["model"], data_config.seq_len, cls.models)
        cls.check(pretext, model, config)
        return pretext, model, data_config

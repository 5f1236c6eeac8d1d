"""What downstream tasks on text have in common: an encoder that was pretrained, and something small on it.

A task on text derives from `TextTask`, names its parts of the config and says what else it needs of them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.config import build
from sslx.data.text import TextConfig
from sslx.models.text import TextModelConfig, build_text_model, pooled
from sslx.objective import Batch, Objective, Variables


@dataclasses.dataclass(frozen=True)
class TextTask(Objective):
    """A task on rows of tokens; ``task`` is its part of the config, of the class ``task_config``.

    What it trains is ``module``, whose parameters are those of ``encoder`` and of what is on it.
    """

    task_config: ClassVar[type]
    data_config: ClassVar[type] = TextConfig
    models: ClassVar[tuple[str, ...]] = ("bert", "gpt")  # that it can fine-tune

    task: Any
    model: TextModelConfig
    vocab_size: int
    tokenizer: Any = dataclasses.field(repr=False)  # decodes tokens in ``show`` and ``preview``

    scored = True

    @classmethod
    def check(cls, task: Any, model: TextModelConfig, data_config: Any) -> None:
        """Refuses parts of a config that are right by themselves and not together.

        Raises:
          UserError: they are not.
        """

    @classmethod
    def _built(cls, config: Mapping[str, Any]) -> tuple[Any, TextModelConfig, Any]:
        task = build(cls.task_config, config["task"], "config.task")
        data_config = build(cls.data_config, config["data"], "config.data")
        model = build_text_model(config["model"], data_config.seq_len, cls.models)
        cls.check(task, model, data_config)
        # The task's, whatever pretraining has used.
        model = dataclasses.replace(model, dropout=task.dropout, attention_dropout=task.dropout)
        return task, model, data_config

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The Linen module."""

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        return {"params": self.module.init(key, batch, deterministic=True)["params"], "state": {}}

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        return pooled(self.model.encoder(self.vocab_size).bind(variables), batch, self.features, deterministic=True)

    @property
    def features(self) -> str:
        """The pooling that ``encode`` has."""
        return "mean"

"""The text model that a config names, and features of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sslx.errors import UserError
from sslx.models import build_model
from sslx.models.bert import BertConfig
from sslx.models.gpt import GptConfig
from sslx.models.pooling import last_token, mean_pool

TextModelConfig = BertConfig | GptConfig


def build_text_model(
    written: Mapping[str, Any], seq_len: int, names: tuple[str, ...] = ("bert", "gpt")
) -> TextModelConfig:
    """Builds ``config.model``.

    Args:
      written: The part as it was written.
      seq_len: Length of the rows it will see.
      names: The models that the objective can use.

    Raises:
      UserError: another model, or something in it that cannot be.
    """
    model = build_model(written, names)
    model.check(seq_len)
    return model


def check_pool(model: TextModelConfig, pool: str, option: str) -> None:
    """Refuses to read a row off a token that has seen nothing of it.

    Args:
      model: What the row goes through.
      pool: The ``pool`` of `pooled`.
      option: What the user has set it by.

    Raises:
      UserError: ``pool`` is ``first`` and the model is causal.
    """
    if pool == "first" and isinstance(model, GptConfig):
        raise UserError(
            f"{option} is 'first', but the first token of a causal model sees no other; expected last or mean"
        )


def pooled(
    encoder: nn.Module, batch: dict[str, Any], pool: Literal["mean", "first", "last"], *, deterministic: bool
) -> Float[Array, "batch width"]:
    """One vector a row, float32: the mean over its tokens, its first or its last one, which alone is computed then."""
    if pool == "mean":
        return mean_pool(encoder(batch, deterministic=deterministic), batch["segment_ids"])
    first = jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)
    picked = first if pool == "first" else last_token(batch["segment_ids"])
    return encoder(batch, picked, deterministic=deterministic)[:, 0].astype(jnp.float32)

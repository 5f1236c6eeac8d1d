"""Sampling from a causal model, with a cache of keys and values so that each new token costs one position.

In: prompts that end at the same place, padded in front. Out: the tokens that follow. A row's tokens depend on the key
and the row's id alone, not on the other rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sslx.errors import UserError
from sslx.models.gpt import GptConfig
from sslx.models.layers import NEVER, tied_logits
from sslx.models.transformer import Cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its distribution."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest; None: all
    top_p: float = 1.0  # only the likeliest that together have this probability (arXiv 1904.09751)

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or a number above it")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; expected at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a share above 0, at most 1")


def right_aligned(
    tokens: Int[Array, "batch length"], counts: Int[Array, " batch"], length: int
) -> dict[str, Int[Array, "batch length"]]:
    """Prompts for `generate`: the first ``counts`` tokens of each row, moved to the right end of ``length`` places."""
    place = jnp.arange(length) - (length - counts[:, None])
    real = place >= 0
    moved = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
    return {
        "tokens": jnp.where(real, moved, 0),
        "segment_ids": real.astype(jnp.int32),
        "positions": jnp.maximum(place, 0).astype(jnp.int32),
    }


def generate(
    config: GptConfig,
    vocab_size: int,
    encoder: Any,
    prompts: Mapping[str, Int[Array, "batch length"]],
    row_keys: PRNGKeyArray,
    *,
    new_tokens: int,
    sampling: Sampling,
    end_id: int,
    forbidden: tuple[int, ...] = (),
) -> Int[Array, "batch new"]:
    """Draws up to ``new_tokens`` tokens after each prompt.

    Args:
      config: The model.
      vocab_size: Its vocabulary.
      encoder: Parameters of its `GptEncoder`.
      prompts: ``tokens``, ``segment_ids`` (1, and 0 for the padding in front) and ``positions`` from 0.
      row_keys: A key for each row.
      new_tokens: How many tokens at most; the caller sees to it that the model has the positions.
      sampling: How they are drawn.
      end_id: The token after which a row is done; it is repeated from there on.
      forbidden: Tokens never drawn, such as padding.

    Returns:
      int32 token ids.
    """
    module = config.encoder(vocab_size)
    table = encoder["embeddings"]["word"]
    rows, length = prompts["tokens"].shape
    banned = np.zeros(table.shape[0], bool)
    banned[list(forbidden)] = True

    def extend(batch: Mapping[str, Array], cache: Cache) -> tuple[Array, Cache]:
        x, cache = module.apply({"params": encoder}, batch, cache, method="extend")
        logits = tied_logits(x[:, -1], table, vocab_size)
        return jnp.where(banned, NEVER, logits), cache

    def one(carry: tuple, index: Array) -> tuple[tuple, Array]:
        logits, cache, position, done = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
        token = jnp.where(done, end_id, draw(logits, keys, sampling)).astype(jnp.int32)
        batch = {
            "tokens": token[:, None],
            "segment_ids": jnp.ones((rows, 1), jnp.int32),
            "positions": position[:, None],
        }
        logits, cache = extend(batch, cache)
        return (logits, cache, position + 1, done | (token == end_id)), token

    logits, cache = extend(prompts, Cache.empty(config, rows, length + new_tokens))
    position = prompts["positions"][:, -1] + 1
    _, tokens = jax.lax.scan(one, (logits, cache, position, jnp.zeros(rows, bool)), jnp.arange(new_tokens))
    return tokens.T


def draw(logits: Float[Array, "batch vocab"], keys: PRNGKeyArray, sampling: Sampling) -> Int[Array, " batch"]:
    """One token a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p: the likeliest always does.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits)

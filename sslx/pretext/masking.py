"""Which tokens to hide: BERT's masking (google-research/bert ``create_pretraining_data.py``) inside jit.

The count of picked positions is exact and its upper bound static, so that the vocabulary head runs on picked positions
only and one compilation serves every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sslx.data.tokenizer import Vocabulary
from sslx.objective import Batch, row_keys


def picked_count(length: int, mask_ratio: float) -> int:
    """The most positions a row of ``length`` can have picked; static."""
    return max(1, round(mask_ratio * length))


def mask_tokens(
    batch: Batch,
    key: PRNGKeyArray,
    vocabulary: Vocabulary,
    mask_ratio: float,
    *,
    whole_word: bool = False,
    span: int = 1,
    hidden: float = 0.8,
    noise: float = 0.1,
) -> dict[str, Array]:
    """Picks positions and corrupts them: by default 80 % [MASK], 10 % a random token, 10 % kept.

    Args:
      batch: int32[batch, length] ``tokens`` and ``segment_ids``, int32[batch] ``row``.
      key: The step's key; each row folds in its id.
      vocabulary: Special ids, the [MASK] id, which tokens continue a word.
      mask_ratio: Share of a row's tokens (special ones counted, as in the original) that is picked.
      whole_word: Pick all pieces of a word or none; a word that would overflow the count is skipped.
      span: Otherwise pick runs of this many places, of which special tokens are left out and the last is cut short, so
        that the count stays exact. Runs may touch and overlap, and go on from one document into the next.
      hidden: Share of the picked that become [MASK].
      noise: Share of the picked that become a random token; the rest are kept.

    Returns:
      int32[batch, length] ``tokens`` corrupted, int32[batch, picked] ``positions`` and ``targets``, and
      float32[batch, picked] ``weights``, 1 where a position is really picked (short rows have fewer).
    """
    special = np.zeros(vocabulary.size, bool)
    special[list(vocabulary.special_ids)] = True
    continuation = np.frombuffer(vocabulary.continuation, np.uint8).astype(bool)
    length = batch["tokens"].shape[1]
    count = picked_count(length, mask_ratio)
    # Counted by Python for every length: in float32, 15 % of 190 would round to 29, where the original picks 28.
    counts = np.array([picked_count(n, mask_ratio) for n in range(length + 1)], np.int32)

    def one_row(tokens: Array, segment_ids: Array, key: PRNGKeyArray) -> dict[str, Array]:
        pick_key, kind_key, token_key = jax.random.split(key, 3)
        real = segment_ids > 0
        candidates = real & ~jnp.asarray(special)[tokens]
        wanted = jnp.asarray(counts)[jnp.sum(real)]
        if whole_word:
            starts = candidates & ~(jnp.asarray(continuation)[tokens] & _follows(candidates, segment_ids))
            picked = _pick_words(starts, candidates, wanted, pick_key)
        else:
            picked = _pick_tokens(candidates, wanted, pick_key, span)
        # A stable sort puts the picked positions first, in reading order.
        positions = jnp.argsort(~picked, stable=True)[:count]
        weights = picked[positions].astype(jnp.float32)
        targets = tokens[positions]
        kind = jax.random.uniform(kind_key, (count,))
        drawn = jax.random.randint(token_key, (count,), 0, vocabulary.size, tokens.dtype)
        corrupted = jnp.where(kind < hidden, vocabulary.mask_id, jnp.where(kind < hidden + noise, drawn, targets))
        corrupted = jnp.where(weights > 0, corrupted, targets).astype(tokens.dtype)
        return {
            "tokens": tokens.at[positions].set(corrupted, unique_indices=True),
            "positions": positions.astype(jnp.int32),
            "targets": targets,
            "weights": weights,
        }

    return jax.vmap(one_row)(batch["tokens"], batch["segment_ids"], row_keys(key, batch["row"]))


def _pick_tokens(
    candidates: Bool[Array, "length"], wanted: Int[Array, ""], key: PRNGKeyArray, span: int
) -> Bool[Array, "length"]:
    # Runs are taken in the order of their draws, so a place comes when the first run over it does. Some begin before
    # the row, or its first places would be under fewer runs than the others. The sort is stable: the run that
    # overflows the count loses its right end.
    length = candidates.shape[0]
    draws = jax.random.uniform(key, (length + span - 1,))
    first = jnp.stack([draws[start : start + length] for start in range(span)]).min(axis=0)
    order = jnp.argsort(jnp.where(candidates, first, 2.0), stable=True)
    rank = jnp.argsort(order)
    return candidates & (rank < wanted)


def _follows(candidates: Bool[Array, "length"], segment_ids: Int[Array, "length"]) -> Bool[Array, "length"]:
    """Whether the token before is a candidate of the same segment, so that a continuation piece has a word to join."""
    before = jnp.concatenate([jnp.zeros(1, bool), candidates[:-1] & (segment_ids[:-1] == segment_ids[1:])])
    return before


def _pick_words(
    starts: Bool[Array, "length"], candidates: Bool[Array, "length"], wanted: Int[Array, ""], key: PRNGKeyArray
) -> Bool[Array, "length"]:
    length = starts.shape[0]
    word = jnp.where(candidates, jnp.cumsum(starts) - 1, length)  # word of each token; ``length`` for no word
    sizes = jnp.zeros(length + 1, jnp.int32).at[word].add(1)[:length]
    order = jnp.argsort(jnp.where(sizes > 0, jax.random.uniform(key, (length,)), 2.0))

    def take(taken: Array, size: Array) -> tuple[Array, Array]:
        fits = (size > 0) & (taken + size <= wanted)
        return taken + jnp.where(fits, size, 0), fits

    _, fits = jax.lax.scan(take, jnp.zeros((), jnp.int32), sizes[order])
    chosen = jnp.zeros(length + 1, bool).at[order].set(fits)
    return candidates & chosen[word]


def masking_table(
    tokenizer: Any,
    batch: Mapping[str, np.ndarray],
    seen: Int[np.ndarray, "batch length"],
    picked: Int[np.ndarray, "batch picked"],
    weights: Float[np.ndarray, "batch picked"],
) -> list[dict[str, str]]:
    """Rows of a preview: what is seen of each text and what was there, and how many positions are picked."""
    rows = []
    for tokens, segments, corrupted, positions, weight in zip(
        batch["tokens"], batch["segment_ids"], seen, picked, weights, strict=True
    ):
        real, hit = segments > 0, set(positions[weight > 0].tolist())
        words, shown = (tokenizer.convert_ids_to_tokens(ids) for ids in (tokens, corrupted))
        text = [f"[{s} <- {w}]" if i in hit else w for i, (w, s) in enumerate(zip(words, shown, strict=True))]
        rows.append(
            {
                "text": " ".join(token for token, there in zip(text, real, strict=True) if there),
                "tokens": f"{int(real.sum())} of {len(real)}, {len(hit)} picked (shown as [seen <- original])",
                "segments": runs(segments),
            }
        )
    return rows


def runs(values: np.ndarray) -> str:
    """``1 x 40, 2 x 24`` for runs of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    return ", ".join(f"{run[0]} x {len(run)}" for run in np.split(values, edges))

"""One BERT training step beside Hugging Face's last Flax version of the model, in one sitting on one CPU.

Both sides have the model, the batch and the optimizer of `bert_step.py`, whose measure of sslx this is; both run on
JAX. ``FlaxBertForMaskedLM`` left transformers with 5.0. Its step is written here after what `run_mlm_flax.py` did:
jitted, state donated, a dense softmax cross-entropy against one-hot labels at all positions, weighted by where there is
a label, AdamW without decay of biases and norms; with the same clip as ours. It gets ready-made inputs, and computes
the whole last layer at all positions, where ours computes queries and MLP of it where a token was picked. Its attention
dropout draws one mask for all rows and heads, which is less work than ours.

    python -m venv flaxvenv && flaxvenv/bin/pip install transformers==4.57.6 flax==0.12.8 jax==0.10.2 optax==0.2.8
    python tests/benchmarks/bert_flax_step.py --flax-python=flaxvenv/bin/python

(with Python 3.11). The two sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. Use an
otherwise idle machine. transformers 4 cannot be installed beside sslx, so the peer needs an interpreter of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from bert_step import MASKED, SIZES, measure_sslx, peer_model
from peers import WARMUP, compare


def measure_flax(arguments: argparse.Namespace) -> dict[str, float]:
    """``FlaxBertForMaskedLM``."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.common_utils import onehot
    from flax.training.train_state import TrainState
    from flax.traverse_util import path_aware_map
    from transformers import FlaxBertForMaskedLM

    def decayed(params: Any) -> Any:
        return path_aware_map(lambda path, _: path[-1] != "bias" and path[-2:] != ("LayerNorm", "scale"), params)

    def train_step(state: TrainState, batch: dict[str, Any], key: Any) -> tuple[TrainState, Any, Any]:
        key, dropout = jax.random.split(key)
        labels = batch["labels"]
        labelled = jnp.where(labels > 0, 1.0, 0.0)

        def loss(params: Any) -> Any:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = state.apply_fn(**inputs, params=params, dropout_rng=dropout, train=True).logits
            losses = optax.softmax_cross_entropy(logits, onehot(labels, logits.shape[-1]))
            return (labelled * losses).sum() / labelled.sum()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value, key

    size, draw = arguments.size, np.random.default_rng(0)
    tokens = draw.integers(5, size.vocabulary, (size.rows, size.length), dtype=np.int32)
    labels = np.where(draw.random(tokens.shape) < MASKED, tokens, -100)
    batch = jax.device_put({"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels})
    model = FlaxBertForMaskedLM(peer_model(size), seed=0)
    adamw = optax.adamw(1e-4, weight_decay=0.01, mask=decayed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state, key = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optimizer), jax.random.PRNGKey(0)
    step, seconds = jax.jit(train_step, donate_argnums=0), []
    for _ in range(arguments.steps + WARMUP):
        begin = time.perf_counter()
        state, value, key = jax.block_until_ready(step(state, batch, key))
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[WARMUP:]), "loss": float(value)}


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, flax=measure_flax, sizes=SIZES, unit="tokens")

"""One BERT training step beside Hugging Face's PyTorch one, in one sitting on one CPU.

Both sides: 4 layers x 512, 8 heads, vocabulary 30,522, batch 32 x 128, exact GELU, dropout 0.1 on hidden states and
attention probabilities, AdamW, clip 1.0, float32, labels on 15 % of the tokens. sslx runs its real train step, with
masks drawn inside it; the peer gets ready-made inputs and is PyTorch eager, as its users run it.

    pip install -e ".[peers]" && python tests/benchmarks/bert_step.py

The two sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. Use an otherwise idle
machine. ``--torch-python`` names another interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from peers import compare, time_sslx, time_torch

LAYERS, WIDTH, HEADS, MLP, VOCABULARY, ROWS, LENGTH, MASKED = 4, 512, 8, 2048, 30522, 32, 128, 0.15


def sslx_model() -> Any:
    """The model's config here."""
    from sslx.models.bert import BertConfig

    return BertConfig(layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=MLP, dropout=0.1, attention_dropout=0.1)


def peer_model(vocabulary: int = VOCABULARY) -> Any:
    """The same as Hugging Face's config, whose dropout is 0.1 and whose GELU is exact by default."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
    )


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """The real train step of masked language modelling."""
    from sslx.data.tokenizer import Vocabulary
    from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig

    special = tuple(range(5))
    words = Vocabulary(VOCABULARY, *special[:2], *special[2:], special, bytes(VOCABULARY), "benchmark")
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(mask_ratio=MASKED), sslx_model(), words, None)
    shape = (arguments.rows, LENGTH)
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    return time_sslx(objective, batch, arguments.steps, learning_rate=1e-4)


def measure_torch(arguments: argparse.Namespace) -> dict[str, float]:
    """``BertForMaskedLM`` in PyTorch."""
    import torch
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model, tokens = BertForMaskedLM(peer_model()), torch.randint(5, VOCABULARY, (arguments.rows, LENGTH))
    labels = torch.where(torch.rand(tokens.shape) < MASKED, tokens, -100)

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss

    return time_torch(model, loss, arguments.steps, lr=1e-4, weight_decay=0.01)


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, torch=measure_torch, rows=ROWS, each=LENGTH, unit="tokens")

"""One BERT training step beside Hugging Face's PyTorch one, in one sitting on one CPU.

Both sides: 4 layers x 512, 8 heads, vocabulary 30,522, batch 32 x 128, exact GELU, dropout 0.1 on hidden states and
attention probabilities, AdamW, clip 1.0, float32, labels on 15 % of the tokens. sslx runs its real train step, with
masks drawn inside it, and computes the vocabulary head and the last layer's queries and MLP where a token was picked;
the peer computes them everywhere, gets ready-made inputs and is PyTorch eager, as its users run it.

    pip install -e ".[peers]" && python tests/benchmarks/bert_step.py
    python tests/benchmarks/bert_step.py --torch-dtype=bfloat16               # each at its best precision on this CPU
    python tests/benchmarks/bert_step.py --size=base --dtype=bfloat16 --attention=cudnn \\
        --torch-device=cuda --torch-dtype=bfloat16 --torch-compile            # on a GPU; --size=large as well

Larger sizes drop nothing from attention probabilities, as flash attention has it. The two sides take turns; medians of
``--steps`` steps a turn, spread over ``--turns`` turns. Use an otherwise idle machine. ``--torch-python`` names another
interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from peers import Size, compare, time_sslx, time_torch

MASKED = 0.15
SIZES = {
    "small": Size(32, 4, 512, 8, 30522, 128, dropout=0.1),
    "base": Size(64, 12, 768, 12, 30522, 512),
    "large": Size(32, 24, 1024, 16, 30522, 512),
}


def sslx_model(arguments: argparse.Namespace) -> Any:
    """The model's config here."""
    from sslx.models.bert import BertConfig

    size = arguments.size
    return BertConfig(**size.transformer(arguments), dropout=0.1, attention_dropout=size.dropout)


def peer_model(size: Size, vocabulary: int | None = None) -> Any:
    """The same as Hugging Face's config, whose dropout is 0.1 and whose GELU is exact by default."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary or size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        attention_probs_dropout_prob=size.dropout,
    )


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """The real train step of masked language modelling."""
    from sslx.data.tokenizer import Vocabulary
    from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig

    size = arguments.size
    special = tuple(range(5))
    words = Vocabulary(size.vocabulary, *special[:2], *special[2:], special, bytes(size.vocabulary), "benchmark")
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(mask_ratio=MASKED), sslx_model(arguments), words, None)
    shape = (size.rows, size.length)
    tokens = np.random.default_rng(0).integers(5, size.vocabulary, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(size.length, dtype=np.int32), shape)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    return time_sslx(objective, batch, arguments, learning_rate=1e-4)


def measure_torch(arguments: argparse.Namespace) -> dict[str, float]:
    """``BertForMaskedLM`` in PyTorch."""
    import torch
    from transformers import BertForMaskedLM

    size = arguments.size

    def inputs() -> dict[str, torch.Tensor]:
        tokens = torch.randint(5, size.vocabulary, (size.rows, size.length))
        labels = torch.where(torch.rand(tokens.shape) < MASKED, tokens, -100)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    return time_torch(
        lambda: BertForMaskedLM(peer_model(size)),
        inputs,
        lambda model, given: model(**given).loss,
        arguments,
        lr=1e-4,
        weight_decay=0.01,
    )


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, torch=measure_torch, sizes=SIZES, unit="tokens")

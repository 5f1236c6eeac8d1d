"""One GPT training step beside nanoGPT's, in one sitting on one CPU.

Both sides: the published shape of nanoGPT's character model, 6 layers x 384, 6 heads, block 256, batch 16, vocabulary
65, exact GELU, no biases, dropout 0.2 on embeddings, attention probabilities and branches, tied head, AdamW at 1e-3
with betas 0.9 and 0.99, weight decay 0.1, clip 1.0, float32. The peer is written here from that description, with
PyTorch's own attention; it is eager, as nanoGPT runs on a CPU.

    pip install -e ".[peers]" && python tests/benchmarks/gpt_step.py
    python tests/benchmarks/gpt_step.py --size=124m --dtype=bfloat16 --attention=cudnn \\
        --torch-device=cuda --torch-dtype=bfloat16 --torch-compile            # on a GPU: GPT-2, nothing dropped

The two sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. Use an otherwise idle
machine. ``--torch-python`` names another interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
from peers import Size, compare, time_sslx, time_torch, torch_block

SIZES = {
    "characters": Size(16, 6, 384, 6, 65, 256, dropout=0.2),
    "124m": Size(16, 12, 768, 12, 50304, 1024),
}


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """The real train step of causal language modelling."""
    from sslx.data.tokenizer import Vocabulary
    from sslx.models.gpt import GptConfig
    from sslx.pretext.clm import CausalLanguageModel, CausalLanguageModelConfig

    size = arguments.size
    model = GptConfig(
        **size.transformer(arguments),
        dropout=size.dropout,
        attention_dropout=size.dropout,
        bias=False,
        max_length=size.length,
        activation="gelu",
    )
    words = Vocabulary(size.vocabulary, *[None] * 5, (), bytes(size.vocabulary), "benchmark")
    objective = CausalLanguageModel(CausalLanguageModelConfig(), model, words, None)
    shape = (size.rows, size.length)
    drawn = np.random.default_rng(0).integers(0, size.vocabulary, (size.rows, size.length + 1), dtype=np.int32)
    batch = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(size.length, dtype=np.int32), shape),
    }
    return time_sslx(objective, batch, arguments, learning_rate=1e-3, beta2=0.99, weight_decay=0.1)


def measure_torch(arguments: argparse.Namespace) -> dict[str, float]:
    """The same model in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    size = arguments.size
    block = functools.partial(torch_block, size.width, size.heads, dropout=size.dropout, causal=True, bias=False)

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = (nn.Embedding(rows, size.width) for rows in (size.vocabulary, size.length))
            self.blocks = nn.ModuleList(block() for _ in range(size.layers))
            self.norm = nn.LayerNorm(size.width, bias=False)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = functional.dropout(self.words(tokens) + self.places.weight, size.dropout)
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.words.weight.T
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return time_torch(
        Gpt,
        lambda: torch.randint(0, size.vocabulary, (size.rows, size.length + 1)),
        lambda model, drawn: model(drawn[:, :-1], drawn[:, 1:]),
        arguments,
        lr=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0.1,
    )


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, torch=measure_torch, sizes=SIZES, unit="tokens")

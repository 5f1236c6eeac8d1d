"""One GPT training step beside nanoGPT's, in one sitting on one CPU.

Both sides: the published shape of nanoGPT's character model, 6 layers x 384, 6 heads, block 256, batch 16, vocabulary
65, exact GELU, no biases, dropout 0.2 on embeddings, attention probabilities and branches, tied head, AdamW at 1e-3
with betas 0.9 and 0.99, weight decay 0.1, clip 1.0, float32. The peer is written here from that description, with
PyTorch's own attention; it is eager, as nanoGPT runs on a CPU.

    pip install -e ".[peers]" && python tests/benchmarks/gpt_step.py

The two sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. Use an otherwise idle
machine. ``--torch-python`` names another interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
from peers import compare, time_sslx, time_torch, torch_block

LAYERS, WIDTH, HEADS, VOCABULARY, ROWS, LENGTH, DROPOUT = 6, 384, 6, 65, 16, 256, 0.2


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """The real train step of causal language modelling."""
    from sslx.data.tokenizer import Vocabulary
    from sslx.models.gpt import GptConfig
    from sslx.pretext.clm import CausalLanguageModel, CausalLanguageModelConfig

    model = GptConfig(
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        mlp_width=4 * WIDTH,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        bias=False,
        max_length=LENGTH,
        activation="gelu",
    )
    words = Vocabulary(VOCABULARY, *[None] * 5, (), bytes(VOCABULARY), "benchmark")
    objective = CausalLanguageModel(CausalLanguageModelConfig(), model, words, None)
    shape = (arguments.rows, LENGTH)
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, (shape[0], LENGTH + 1), dtype=np.int32)
    batch = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
    }
    return time_sslx(objective, batch, arguments.steps, learning_rate=1e-3, beta2=0.99, weight_decay=0.1)


def measure_torch(arguments: argparse.Namespace) -> dict[str, float]:
    """The same model in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    block = functools.partial(torch_block, WIDTH, HEADS, dropout=DROPOUT, causal=True, bias=False)

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks, self.norm = nn.ModuleList(block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = functional.dropout(self.words(tokens) + self.places.weight, DROPOUT)
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.words.weight.T
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model, drawn = Gpt(), torch.randint(0, VOCABULARY, (arguments.rows, LENGTH + 1))
    adamw = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    return time_torch(model, lambda: model(drawn[:, :-1], drawn[:, 1:]), arguments.steps, **adamw)


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, torch=measure_torch, rows=ROWS, each=LENGTH, unit="tokens")

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

import numpy as np
from peers import compare, time_sslx, time_torch

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
    shape = (arguments.rows or ROWS, LENGTH)
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

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
            self.into_heads, self.out_of_heads = (nn.Linear(WIDTH, n * WIDTH, bias=False) for n in (3, 1))
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, length, _ = x.shape
            split = self.into_heads(self.norms[0](x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(*split, dropout_p=DROPOUT, is_causal=True)
            seen = self.out_of_heads(seen.transpose(1, 2).reshape(x.shape))
            x = x + functional.dropout(seen, DROPOUT)
            return x + functional.dropout(self.down(functional.gelu(self.up(self.norms[1](x)))), DROPOUT)

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = functional.dropout(self.words(tokens) + self.places.weight, DROPOUT)
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.words.weight.T
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = Gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    drawn = torch.randint(0, VOCABULARY, (arguments.rows or ROWS, LENGTH + 1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(drawn[:, :-1], drawn[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return time_torch(step, arguments.steps)


if __name__ == "__main__":
    compare(
        __doc__,
        __file__,
        sslx=measure_sslx,
        torch=measure_torch,
        amount=lambda arguments: (arguments.rows or ROWS) * LENGTH,
        unit="tokens",
    )

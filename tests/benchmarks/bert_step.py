"""One BERT training step beside Hugging Face's PyTorch one, in one sitting on one CPU.

Both sides: 4 layers x 512, 8 heads, vocabulary 30,522, batch 32 x 128, exact GELU, dropout 0.1 on hidden states and
attention probabilities, AdamW, clip 1.0, float32, labels on 15 % of the tokens. sslx runs its real train step, with
masks drawn inside it; the peer gets ready-made inputs and is PyTorch eager, as its users run it.

    pip install -e ".[peers]" && python tests/benchmarks/bert_step.py

The two sides take turns in processes of their own; medians of ``--steps`` steps a turn, spread over ``--turns``
turns. Use an otherwise idle machine. ``--torch-python`` names another interpreter for the peer if torch is not
installed in this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

LAYERS, WIDTH, HEADS, MLP, VOCABULARY, ROWS, LENGTH, MASKED = 4, 512, 8, 2048, 30522, 32, 128, 0.15


def measure_sslx(steps: int) -> dict[str, float]:
    """Seconds a step, model FLOPs a step and the rate of a float32 matrix product, by sslx."""
    import types

    import jax
    import jax.numpy as jnp
    import numpy as np

    from sslx.data.rows import RowOrder
    from sslx.data.tokenizer import Vocabulary
    from sslx.models.bert import BertConfig
    from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig
    from sslx.runtime import configure
    from sslx.settings import OptimizerConfig, RunConfig
    from sslx.train.hosts import Votes
    from sslx.train.loop import Trainer
    from sslx.train.sharding import on_mesh

    class RandomRows:
        def __len__(self) -> int:
            return 10 * ROWS

        def order(self, seed: int) -> RowOrder:
            return RowOrder(len(self), seed)

        def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
            tokens = np.random.default_rng(0).integers(5, VOCABULARY, (len(ids), LENGTH), dtype=np.int32)
            positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
            return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}

    configure()
    model = BertConfig(layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=MLP, dropout=0.1, attention_dropout=0.1)
    special = tuple(range(5))
    words = Vocabulary(VOCABULARY, *special[:2], *special[2:], special, bytes(VOCABULARY), "benchmark")
    objective = MaskedLanguageModel(MaskedLanguageModelConfig(mask_ratio=MASKED), model, words, None)
    data = types.SimpleNamespace(train=RandomRows(), eval=RandomRows(), test=None, statistics={})
    config = RunConfig(batch_size=ROWS, steps=10_000, optimizer=OptimizerConfig(learning_rate=1e-4))
    trainer = Trainer(config, objective, data)
    state, batch = trainer.program.fresh(), trainer.batches.at(0)
    product = jax.jit(jnp.dot)
    left, right = jnp.ones((4096, 2048)), jnp.ones((2048, 2048))
    seconds, products = [], []
    votes, held = Votes(trainer.program.mesh)(stop=0, save=False), trainer.program.nothing_held()
    with on_mesh(trainer.program.mesh):
        for _ in range(steps + 2):
            begin = time.perf_counter()
            state, metrics = trainer.program.train_step(state, batch, votes, held)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
            for _ in range(3):
                begin = time.perf_counter()
                product(left, right).block_until_ready()
                products.append(time.perf_counter() - begin)
    rate = 2 * 4096 * 2048 * 2048 / statistics.median(products[6:])
    flops = objective.flops(trainer.program.batch_shapes)
    return {"seconds": statistics.median(seconds[2:]), "flops": flops, "product_rate": rate}


def measure_torch(steps: int) -> dict[str, float]:
    """Seconds a step of ``BertForMaskedLM`` in PyTorch."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    tokens = torch.randint(5, VOCABULARY, (ROWS, LENGTH))
    labels = torch.where(torch.rand(ROWS, LENGTH) < MASKED, tokens, -100)
    seconds = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[2:])}


def main() -> None:
    """Lets both sides take turns and prints tokens per second, the ratio, and the share of the matrix-product rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--side", choices=("sslx", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure = measure_sslx if arguments.side == "sslx" else measure_torch
        print(json.dumps(measure(arguments.steps)))
        return
    turns: dict[str, list[dict[str, float]]] = {"sslx": [], "torch": []}
    for turn in range(arguments.turns):
        for side, python in (("torch", arguments.torch_python), ("sslx", sys.executable)):
            command = [python, __file__, f"--side={side}", f"--steps={arguments.steps}"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            turns[side].append(json.loads(output.splitlines()[-1]))
            print(f"turn {turn} {side:<5} {ROWS * LENGTH / turns[side][-1]['seconds']:7.0f} tokens/s", flush=True)
    ratios = [peer["seconds"] / ours["seconds"] for peer, ours in zip(turns["torch"], turns["sslx"], strict=True)]
    shares = [turn["flops"] / turn["seconds"] / turn["product_rate"] for turn in turns["sslx"]]
    rate = statistics.median(turn["product_rate"] for turn in turns["sslx"])
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(
        f"share of the matrix-product rate {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}); "
        f"the product runs at {rate / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()

"""Learning curves of sslx's GPT and of nanoGPT's, from the same characters, scored on the same held-out rows.

nanoGPT's CPU setting (its README): 4 layers x 128, 4 heads, block 64, batch 12, 2,000 steps, no dropout or biases, tied
embeddings, AdamW (1e-3 to 1e-4 by cosine, 100 steps of warm-up, betas 0.9 and 0.99, decay 0.1 on matrices, clip 1).
The peer is written here in PyTorch from nanoGPT's published architecture and draws windows at random places of the
training text, as nanoGPT does; sslx trains ``configs/gpt_clm.py:shakespeare_char``, whose rows are the text's
consecutive windows, shuffled.

    pip install -e ".[peers]" && python tests/benchmarks/gpt_curve.py --text=input.txt --out=gpt_curve

writes ``curves.json`` and ``curves.png`` and prints a table. Without ``--text`` the text is the first 1.1 MB of
``python_docs``. A curve that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

LAYERS, WIDTH, HEADS, BLOCK, BATCH, STEPS, EVERY = 4, 128, 4, 64, 12, 2000, 250
TEXT_BYTES = 1_100_000


def write_default_text(path: Path) -> None:
    """The first documents of ``python_docs``, one after the other."""
    from sslx.data.cache import cache_folder
    from sslx.data.sources import open_source

    documents = open_source("python_docs", "train", cache_dir=cache_folder())
    text, at = [], 0
    while sum(map(len, text)) < TEXT_BYTES:
        text.append(documents[at]["text"] + "\n\n")
        at += 1
    path.write_text("".join(text)[:TEXT_BYTES], encoding="utf8")


def train_sslx(text: Path, out: Path, seed: int) -> dict[int, float]:
    """Held-out loss by step, from an ordinary run; leaves the rows for the peer."""
    import numpy as np
    from etils.epath import Path as EPath

    from sslx import entry, main
    from sslx.config import build
    from sslx.data.text import TextConfig, prepare_text

    file = Path(__file__).parents[2] / "configs" / "gpt_clm.py"
    config = entry.load_config(file, f"shakespeare_char,data=text:{text.absolute()}")
    config.seed, config.eval.every_steps, config.eval.examples = seed, EVERY, 0
    data = prepare_text(build(TextConfig, config.data.to_dict(), "config.data"), layout="causal")
    held_out = data.eval.fetch(np.arange(len(data.eval)))
    np.savez(
        out / "rows.npz",
        train=data.train.corpus.tokens,
        vocabulary=data.vocabulary.size,
        **{name: held_out[name] for name in ("tokens", "targets", "segment_ids")},
    )
    main.main(config, EPath(out / f"sslx_{seed}"))
    records = [json.loads(line) for line in (out / f"sslx_{seed}" / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def train_peer(out: Path, seed: int) -> dict[int, float]:
    """The same by PyTorch."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional

    rows = np.load(out / "rows.npz")
    corpus = torch.from_numpy(rows["train"].astype(np.int64))
    tokens, targets = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("tokens", "targets"))
    real = torch.from_numpy(rows["segment_ids"] > 0)
    vocabulary = int(rows["vocabulary"])
    torch.manual_seed(seed)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            parts = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(BLOCK, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    residual = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.word(tokens) + self.position(torch.arange(tokens.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) @ self.word.weight.T

    model = Gpt()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    @torch.no_grad()
    def held_out_loss() -> float:
        total = 0.0
        for start in range(0, len(tokens), 256):
            logits = model(tokens[start : start + 256])
            keep = real[start : start + 256]
            total += float(functional.cross_entropy(logits[keep], targets[start : start + 256][keep], reduction="sum"))
        return total / int(real.sum())

    curve = {}
    for step in range(STEPS):
        warm = min(1.0, (step + 1) / 101)
        fall = max(0.0, (step - 100) / (STEPS - 100))
        rate = 1e-3 * warm if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * fall)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(corpus) - BLOCK - 1, (BATCH,))
        windows = torch.stack([corpus[i : i + BLOCK + 1] for i in at.tolist()])
        loss = functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            curve[step + 1] = held_out_loss()
            print(f"peer, seed {seed}, step {step + 1}: {curve[step + 1]:.4f}", flush=True)
    return curve


def report(out: Path, seeds: list[int]) -> None:
    """The table and the picture."""
    from matplotlib.figure import Figure

    curves = {
        side: [json.loads((out / f"{side}_{seed}.json").read_text()) for seed in seeds] for side in ("sslx", "peer")
    }
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for side, label, colour in (("sslx", "sslx", "tab:blue"), ("peer", "nanoGPT in PyTorch", "tab:orange")):
        steps = [int(step) for step in curves[side][0]]
        values = [[curve[str(step)] for curve in curves[side]] for step in steps]
        axes.plot(steps, [statistics.mean(v) for v in values], "o-", ms=3, color=colour, label=label)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.25, color=colour)
        last = values[-1]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        print(f"{label:<20} {statistics.mean(last):.4f} ± {spread:.4f}  ({', '.join(f'{v:.4f}' for v in last)})")
    axes.set(xlabel="step", ylabel="held-out loss (nats a character)", title="4 x 128, block 64, batch 12")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=130)
    (out / "curves.json").write_text(json.dumps(curves, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpt_curve"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # SIDE,SEED in a process of its own
    arguments = parser.parse_args()
    out, seeds = arguments.out, [int(seed) for seed in arguments.seeds.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    text = arguments.text or out / "text.txt"
    if arguments.one:
        side, seed = arguments.one.split(",")
        curve = train_sslx(text, out, int(seed)) if side == "sslx" else train_peer(out, int(seed))
        (out / f"{side}_{seed}.json").write_text(json.dumps(curve))
        return
    if not arguments.text and not text.exists():
        write_default_text(text)
    for seed in seeds:
        for side in ("sslx", "peer"):
            if not (out / f"{side}_{seed}.json").exists():
                command = [sys.executable, __file__, f"--text={text}", f"--out={out}", f"--one={side},{seed}"]
                subprocess.run(command, check=True)
    report(out, seeds)


if __name__ == "__main__":
    main()

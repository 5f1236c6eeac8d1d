"""What comparisons with other libraries share: sides that take turns in processes of their own, and their ratios.

A benchmark calls `compare` with a function of each side, ``measure(arguments)``, that returns ``{"seconds": of a step,
...}``. It is started again for each turn, with ``--side``: no side finds memory, threads or caches of the other. Of
sslx's side, `time_sslx` times the real train step; what it is made of serves benchmarks without a peer, too. As sslx
keeps memory that was freed (`sslx.runtime`), peers are started with the settings by which glibc does that for them, and
PyTorch's AdamW is the fused one; neither is their default, which ``--as-installed`` leaves them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Measure = Callable[[argparse.Namespace], dict[str, float]]
WARMUP = 2  # steps of a turn that are not timed
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}  # freed memory
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch, one of those that a benchmark can be asked for."""

    rows: int  # of a batch
    layers: int = 0
    width: int = 0
    heads: int = 0
    vocabulary: int = 0
    length: int = 1  # what a row counts for
    dropout: float = 0.0  # of attention probabilities; flash attention has none

    def transformer(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """What configs of sslx's transformers take, with an MLP of four times the width."""
        size = {"layers": self.layers, "width": self.width, "heads": self.heads, "mlp_width": 4 * self.width}
        return size | {"dtype": arguments.dtype, "attention": arguments.attention}


def compare(
    doc: str,
    file: str,
    *,
    sslx: Measure,
    sizes: Mapping[str, Size],
    unit: str = "pictures",
    workers: int = 2,
    shared: Measure | None = None,
    one_arena: bool = True,
    **peers: Measure,
) -> None:
    """Lets the sides take turns and prints what each gets through in a second, and the ratio to each peer.

    A side finds the `Size` in ``arguments.size``, with the rows that were asked for.

    Args:
      doc: The benchmark's docstring.
      file: The benchmark's file.
      sslx: Measures this side.
      sizes: By name; the first one is what is measured unless another is asked for.
      unit: What rows of ``length`` are counted in, unless a side says under ``units`` what a step has got through.
      workers: Of the peers' data loaders.
      shared: Makes what all sides read, once, in ``arguments.folder``; what it returns is printed.
      one_arena: Whether peers' threads share one arena, as sslx's do; those of tokenizers would wait for each other.
      peers: Measure the others' sides. Each name begins with a library, before ``_`` if there is more: torch_lines.
    """
    sides = {**peers, "sslx": sslx}
    helped = KEPT | (ONE_ARENA if one_arena else {})
    libraries = sorted({name.partition("_")[0] for name in peers})
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(sizes), default=next(iter(sizes)))
    parser.add_argument("--rows", type=int, help="of a batch, if not the size's")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed in a turn, after some that are not")
    parser.add_argument("--workers", type=int, default=workers, help="processes of the peer's data loader, if any")
    parser.add_argument("--as-installed", action="store_true", help="peers without what helps them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="sslx computes in")
    if any(size.heads for size in sizes.values()):
        parser.add_argument("--attention", default="auto", help="of sslx: config.model.attention")
    for library in libraries:
        parser.add_argument(f"--{library}-python", default=sys.executable, help=f"interpreter that has {library}")
    if "torch" in libraries:
        parser.add_argument("--torch-dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
        parser.add_argument("--torch-device", default="cpu", help="cpu or cuda")
        parser.add_argument("--torch-compile", action="store_true", help="the model goes through torch.compile")
    parser.add_argument("--side", choices=(*sides, "shared"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = sizes[arguments.size]
    size = dataclasses.replace(size, rows=arguments.rows or size.rows)
    if arguments.side:
        arguments.size = size
        print(json.dumps({**sides, "shared": shared}[arguments.side](arguments)))
        return
    pythons = {name: getattr(arguments, f"{name.partition('_')[0]}_python") for name in peers} | {
        name: sys.executable for name in ("sslx", "shared")
    }
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:

        def measured(side: str) -> dict[str, float]:
            command = [pythons[side], file, *sys.argv[1:], f"--side={side}", f"--folder={folder}"]
            environment = os.environ | (helped if side in peers and not arguments.as_installed else {})
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            return json.loads(output.splitlines()[-1])

        if shared:
            print(", ".join(shown(measured("shared"))), flush=True)
        for turn in range(arguments.turns):
            for side in sides:
                turns[side].append(found := measured(side))
                rates[side].append(found.pop("units", size.rows * size.length) / found["seconds"])
                rest = {name: value for name, value in found.items() if name != "seconds"}
                line = [f"turn {turn} {side:<{max(map(len, sides))}} {rates[side][-1]:8.1f} {unit}/s", *shown(rest)]
                print(", ".join(line), flush=True)
    for name in peers:
        ratios = [ours / theirs for ours, theirs in zip(rates["sslx"], rates[name], strict=True)]
        print(f"ratio to {name} {spread(ratios)}")
    if "share_of_product" in turns["sslx"][0]:
        print(f"share of the matrix-product rate {spread([turn['share_of_product'] for turn in turns['sslx']])}")


def shown(found: Mapping[str, float]) -> Iterable[str]:
    """Numbers with their names; whole ones in full."""
    return [f"{name} {value:{',' if isinstance(value, int) else '.3g'}}" for name, value in found.items()]


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def one_batch_trainer(objective: Any, arrays: Mapping[str, np.ndarray], **optimizer: Any) -> Any:
    """A `Trainer` of an objective that gets the same batch at every step.

    Args:
      objective: What is trained.
      arrays: The batch.
      optimizer: Settings of AdamW that differ from the default.
    """
    from sslx.data.rows import RowOrder
    from sslx.settings import OptimizerConfig, RunConfig
    from sslx.train.loop import Trainer

    rows = len(next(iter(arrays.values())))

    class OneBatch:
        """The same rows, whichever are asked for."""

        def __len__(self) -> int:
            return rows

        def order(self, seed: int) -> RowOrder:
            return RowOrder(rows, seed)

        def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
            return {name: array[: len(ids)] for name, array in arrays.items()}

    data = types.SimpleNamespace(train=OneBatch(), eval=OneBatch(), test=None, statistics={})
    return Trainer(RunConfig(batch_size=rows, steps=10_000, optimizer=OptimizerConfig(**optimizer)), objective, data)


def step_seconds(trainer: Any, steps: int) -> list[float]:
    """Seconds of each of so many train steps from fresh parameters, after `WARMUP` untimed ones; inside ``on_mesh``."""
    from sslx.timing.clock import TimedSteps, time_alone

    return time_alone(trainer, TimedSteps(trainer, trainer.program.fresh()), 0, steps + WARMUP)[WARMUP:]


def time_sslx(
    objective: Any, arrays: Mapping[str, np.ndarray], arguments: argparse.Namespace, **optimizer: Any
) -> dict[str, float]:
    """Seconds of a train step of an objective on one batch, and its arithmetic as a share of a product's rate.

    Args:
      objective: What is trained.
      arrays: A batch.
      arguments: How many steps are timed, and the dtype of the product that they are held against.
      optimizer: Settings of AdamW that differ from the default.
    """
    from sslx.runtime import configure
    from sslx.timing.product import Product
    from sslx.train.sharding import on_mesh

    configure()
    trainer, steps = one_batch_trainer(objective, arrays, **optimizer), arguments.steps
    with on_mesh(trainer.program.mesh):
        product = Product(trainer.program.mesh, arguments.dtype)
        rates = product.rates(steps)
        seconds = statistics.median(step_seconds(trainer, steps))
        rates += product.rates(steps)
    rate = statistics.median(rates)
    return {
        "seconds": seconds,
        "share_of_product": trainer.program.flops / seconds / rate,
        "product_gflops": rate / 1e9,
    }


def time_torch(
    model: Callable[[], Any],
    inputs: Callable[[], Any],
    loss: Callable[[Any, Any], Any],
    arguments: argparse.Namespace,
    *,
    clip: float | None = 1.0,
    average: Callable[[list[float]], float] = statistics.median,
    **adamw: Any,
) -> dict[str, float]:
    """Seconds of a step of a PyTorch model: gradients of its loss, clipped to a norm, and AdamW.

    Args:
      model: Makes the model, on the device that is the default one meanwhile.
      inputs: Makes what the loss takes, likewise.
      loss: Of the model and its inputs.
      arguments: Steps, device, dtype of autocast, and whether to compile.
      clip: Largest norm of the gradients.
      average: Of the steps' times.
      adamw: Settings of AdamW.
    """
    import torch

    torch.manual_seed(0)
    torch.set_default_device(arguments.torch_device)
    made, given, seconds = model().train(), inputs(), []
    if arguments.torch_compile:
        made.compile()
    half = arguments.torch_dtype == "bfloat16"
    optimizer = torch.optim.AdamW(made.parameters(), fused=None if arguments.as_installed else True, **adamw)
    for _ in range(arguments.steps + WARMUP):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(arguments.torch_device, torch.bfloat16, enabled=half):
            found = loss(made, given)
        found.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(made.parameters(), clip)
        optimizer.step()
        if arguments.torch_device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": average(seconds[WARMUP:])}


def torch_block(width: int, heads: int, *, dropout: float = 0.0, causal: bool = False, bias: bool = True) -> Any:
    """A pre-norm transformer block in PyTorch, with its own attention and exact GELU."""
    from torch import Tensor, nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width, bias=bias) for _ in range(2))
            self.into_heads, self.out_of_heads = (nn.Linear(width, n * width, bias=bias) for n in (3, 1))
            self.up, self.down = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            rows, length, _ = x.shape
            split = self.into_heads(self.norms[0](x)).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(*split, dropout_p=dropout, is_causal=causal)
            x = x + functional.dropout(self.out_of_heads(seen.transpose(1, 2).reshape(x.shape)), dropout)
            return x + functional.dropout(self.down(functional.gelu(self.up(self.norms[1](x)))), dropout)

    return Block()

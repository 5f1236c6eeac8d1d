"""Time and memory of a BERT training step against sequence length, vocabulary, width and batch, with their exponents.

    python tests/benchmarks/growth.py --out=runs/growth

The step is the real one of masked language modelling, dropout and AdamW included, of a small original BERT: 2 layers x
256, 4 heads, vocabulary 8,192, 8 rows of 128 tokens. One of the four grows by powers of two while the others stay; the
MLP is four times the width, the heads stay 4. Time is the median of ``--steps`` steps by themselves, memory what the
compiler says of the step: arguments and temporaries. Beside the exponent over the upper half of the points (a line by
least squares through the logarithms) stands the expected one, fitted alike: of time that of the model's FLOPs, of
memory that of what a step has to hold. Writes ``growth.json`` and ``growth.png``.

Under three minutes on two CPU cores, half of it compilation, and some 3 GiB at the longest rows. Use an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from peers import one_batch_trainer, step_seconds

from sslx.entry import load_config
from sslx.planning import report
from sslx.planning.compilation import Memory
from sslx.planning.search import changed
from sslx.pretext.masking import picked_count
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.runtime import configure, describe_devices
from sslx.storage import write_figure
from sslx.timing.clock import Spread
from sslx.train.sharding import on_mesh

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bert_mlm.py"
LAYERS, HEADS = 2, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What grows, and where it stays meanwhile."""

    length: int = 128
    vocabulary: int = 8192
    width: int = 256
    batch: int = 8


LABELS = {"length": "sequence length", "vocabulary": "vocabulary", "width": "model width", "batch": "batch"}
GROWTH = {
    "length": (128, 256, 512, 1024, 2048),
    "vocabulary": (8192, 16384, 32768, 65536, 131072),
    "width": (64, 128, 256, 512, 1024),
    "batch": (8, 16, 32, 64, 128),
}
MAX_LENGTH = max(GROWTH["length"])  # of the position table, whatever the length


@dataclasses.dataclass(frozen=True)
class Point:
    """One step, measured and counted. Bytes are of one device; ``held`` is what `bytes_held` expects."""

    sizes: Sizes
    seconds: Spread
    memory: Memory
    parameters: int
    flops: float
    held: float

    @property
    def bytes(self) -> int:
        """Of the step: what goes in, and what the compiler keeps beside it."""
        return self.memory.arguments + self.memory.temporaries


def measure(sizes: Sizes, steps: int) -> Point:
    """Compiles a step and times it."""
    objective, arrays = built(sizes)
    trainer = one_batch_trainer(objective, arrays, learning_rate=1e-4)
    program = trainer.program
    memory = Memory.of(program.lower_train().compile())
    with on_mesh(program.mesh):
        seconds = Spread.of(step_seconds(trainer, steps))
    held = bytes_held(objective, sizes, program.parameters)
    return Point(sizes, seconds, memory, program.parameters, program.flops, held)


def built(sizes: Sizes) -> tuple[MaskedLanguageModel, dict[str, np.ndarray]]:
    """The objective at these sizes, and a batch of random tokens."""
    model = {"layers": LAYERS, "heads": HEADS, "width": sizes.width, "mlp_width": 4 * sizes.width}
    model |= {"max_length": MAX_LENGTH}
    changes = {f"model.{name}": value for name, value in model.items()}
    changes |= {"data.seq_len": sizes.length, "data.vocab_size": sizes.vocabulary}
    objective, _ = MaskedLanguageModel.abstract(changed(load_config(CONFIG, "tiny").to_dict(), changes))
    shape, first = (sizes.batch, sizes.length), len(objective.vocabulary.special_ids)
    tokens = np.random.default_rng(0).integers(first, sizes.vocabulary, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(sizes.length, dtype=np.int32), shape)
    return objective, {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}


def bytes_held(objective: MaskedLanguageModel, sizes: Sizes, parameters: int) -> float:
    """Bytes that a step has to hold, by count: linear in vocabulary and batch, up to quadratic in length and width.

    The state: parameters, their two moments and their gradients, which clipping needs all at once. And of the forward
    pass what the backward pass reads (as in arXiv 2205.05198, in float32, and masks are not stored), by place of the
    model's width: what goes into keys and values, and both; of the places that are queries, which in the last layer are
    the picked ones, the query, what it attends to, the two sums that are normalised and what becomes of the first (5),
    and the MLP before and after GELU (4 each). By query and key: the probability before and after dropout, of each
    head. By picked place: logits and their gradient.
    """
    model, length = objective.model, sizes.length
    picked = picked_count(length, objective.pretext.mask_ratio)
    row = 0
    for queries in (*[length] * (model.layers - 1), picked):
        row += 3 * length * model.width + queries * (5 * model.width + 2 * model.mlp_width)
        row += 2 * model.heads * queries * length
    row += 2 * picked * sizes.vocabulary
    return 4.0 * (4 * parameters + sizes.batch * row)


def upper_half(sizes: Sequence[int]) -> slice:
    """Of the points, that in the middle included."""
    return slice((len(sizes) - 1) // 2, None)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the upper half of the points, by least squares in logarithms."""
    upper = upper_half(sizes)
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)[0])


def exponents(name: str, points: list[Point]) -> dict[str, dict[str, float]]:
    """Of time and memory, measured and expected."""
    sizes = [getattr(point.sizes, name) for point in points]
    found = {
        "time": {"measured": [point.seconds.median for point in points], "expected": [point.flops for point in points]},
        "memory": {"measured": [point.bytes for point in points], "expected": [point.held for point in points]},
    }
    return {what: {of: exponent(sizes, values) for of, values in both.items()} for what, both in found.items()}


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Two rows of panels, time and memory; a dashed line has the expected slope and goes through the last point."""
    figure = Figure(figsize=(12.3, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(curves), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        sizes, slopes = [getattr(point.sizes, name) for point in points], exponents(name, points)
        times = [point.seconds for point in points]
        middle = np.array([1e3 * one.median for one in times])
        bars = np.array(
            [[1e3 * (one.median - one.low) for one in times], [1e3 * (one.high - one.median) for one in times]]
        )
        held = [point.bytes / 2**20 for point in points]
        above, below = panels[:, column]
        above.errorbar(sizes, middle, bars, fmt="o-", ms=5, lw=1.2, capsize=3, color="C0", label="median, quartiles")
        below.plot(sizes, held, "o-", ms=5, lw=1.2, color="C2", label="arguments + temporaries")
        below.plot(
            sizes, [point.memory.arguments / 2**20 for point in points], "s:", ms=3, lw=1, color="C7", label="arguments"
        )
        for axes, what, values in ((above, "time", middle), (below, "memory", held)):
            slope, upper = slopes[what]["expected"], np.array(sizes)[upper_half(sizes)]
            guide = values[-1] * (upper / upper[-1]) ** slope
            axes.plot(upper, guide, "--", lw=1.4, color="crimson", label="expected slope", zorder=4)
            told = f"exponent {slopes[what]['measured']:.2f}, expected {slope:.2f}"
            axes.set_title(f"{what} by {LABELS[name]}\n{told}", fontsize=10)
            _powers_of_two(axes, sizes)
        below.set_xlabel(LABELS[name], fontsize=10)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("MiB")
    for axes in panels[:, 0]:
        axes.legend(fontsize=8.5, framealpha=0.9)
    write_figure(path, figure)


def _powers_of_two(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.3)


def main() -> None:
    """Measures all points, prints a line for each, and writes numbers and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for growth.json and growth.png")
    parser.add_argument("--steps", type=int, default=5, help="timed at each point, after two that are not")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    configure()
    if jax.device_count() > 1:
        parser.error(f"there are {jax.device_count()} devices; the memory that is expected is that of one")
    begin, known, curves = time.monotonic(), {}, {}
    for name, grown in GROWTH.items():
        for value in grown:
            sizes = dataclasses.replace(Sizes(), **{name: value})
            if sizes not in known:  # the curves meet at one point
                known[sizes] = measure(sizes, arguments.steps)
            point = known[sizes]
            curves.setdefault(name, []).append(point)
            print(
                f"{LABELS[name]:<16}{value:>8,}  {report.seconds(point.seconds.median):>10}  "
                f"{report.size(point.bytes):>11}, {report.size(point.memory.arguments)} of it arguments, "
                f"{report.size(point.held)} expected",
                flush=True,
            )
    fitted = {name: exponents(name, points) for name, points in curves.items()}
    for name, slopes in fitted.items():
        told = (f"{what} {one['measured']:.2f}, expected {one['expected']:.2f}" for what, one in slopes.items())
        print(f"exponent by {LABELS[name]}: {'; '.join(told)}")
    written: dict[str, Any] = {
        "device": describe_devices(),
        "jax": jax.__version__,
        "steps": arguments.steps,
        "seconds": time.monotonic() - begin,
        "model": {"layers": LAYERS, "heads": HEADS, "max_length": MAX_LENGTH},
        "exponents": fitted,
        "points": {name: [dataclasses.asdict(point) for point in points] for name, points in curves.items()},
    }
    (arguments.out / "growth.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf8")
    draw(curves, arguments.out / "growth.png")
    print(f"written: {arguments.out / 'growth.json'}, {arguments.out / 'growth.png'}")


if __name__ == "__main__":
    main()

"""Draws ``study.png``: loss against compute with the frontier, and iso-FLOP curves of loss against model size.

In: a study and what was found. Out: the picture, or nothing where no row is finished. Held-out rows are drawn with
their prediction intervals; the curves are the fitted law's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from etils.epath import Path
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sslx.scaling.grid import Row, Study, parse_budget, short
from sslx.scaling.optimum import flops_per_token
from sslx.storage import write_figure

if TYPE_CHECKING:
    from sslx.scaling.report import Findings

CURVES = 5  # iso-FLOP curves where the budgets are tokens
HELD_OUT = dict(color="crimson", zorder=5)


def draw_study(study: Study, found: Findings, count: str, path: Path) -> bool:
    """Draws the picture; returns False, and draws nothing, where no row of the grid is finished."""
    rows = [row for row in study.fitted if row.name in found.losses]
    if not rows:
        return False
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_compute(left, study, rows, found, count)
    norm = _draw_sizes(right, study, rows, found, count)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=right, pad=0.01)
    bar.set_label("training FLOPs")
    shown = [found.losses[row.name] for row in study.rows if row.name in found.losses]
    shown += [value for interval in found.held_out.values() for value in interval]
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(min(shown) / 1.03, max(shown) * 1.03)
        _plain_ticks(axes)
        axes.set_ylabel("held-out loss (nats)")
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=7.5, framealpha=0.9)
    write_figure(path, figure)
    return True


def _draw_compute(axes: Axes, study: Study, rows: list[Row], found: Findings, count: str) -> None:
    axes.set_title("loss against compute", fontsize=10)
    axes.set_xlabel("training FLOPs")
    sizes = sorted({row.size for row in rows}, key=lambda size: size.width)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(sizes)))
    for size, color in zip(sizes, colors, strict=True):
        mine = [row for row in rows if row.size == size]
        label = f"{size.layers} x {size.width} (N {short(size.parameters(count), 3)})"
        axes.plot([r.flops for r in mine], [found.losses[r.name] for r in mine], "o", color=color, ms=5, label=label)
        if found.fit is not None:
            tokens = np.geomspace(min(r.tokens for r in mine), max(r.tokens for r in mine))
            law = found.fit.loss(np.full_like(tokens, size.parameters(count)), tokens)
            axes.plot(tokens * size.flops_per_token, law, color=color, lw=1.2)
    if found.frontier is not None:
        flops = np.geomspace(min(r.flops for r in rows), max(r.flops for r in study.rows))
        (c, *_), (k, *_) = found.frontier["c"], found.frontier["k"]
        axes.plot(flops, c * flops**-k, "--", color="grey", lw=1.2, label=f"frontier: {c:.3g} C^-{k:.3g}")
    _draw_held_out(axes, study, found, lambda row: row.flops)


def _draw_sizes(axes: Axes, study: Study, rows: list[Row], found: Findings, count: str) -> LogNorm:
    axes.set_title("iso-FLOP curves" + (" of the fitted law" if found.fit is not None else ""), fontsize=10)
    axes.set_xlabel(f"parameters N ({count.replace('_', '-')})")
    flops = [row.flops for row in rows]
    held_out = [row.flops for row in study.rows if row.held_out and found.fit is not None]
    norm = LogNorm(min(flops), max([*flops, *held_out]) * 1.001)
    color = lambda c: matplotlib.colormaps["viridis"](norm(c))  # noqa: E731
    losses = [found.losses[row.name] for row in rows]
    n = [row.size.parameters(count) for row in rows]
    axes.scatter(n, losses, c=flops, norm=norm, cmap="viridis", s=26, zorder=3, label="rows")
    if found.fit is not None:
        if study.unit == "flops":
            levels = sorted({parse_budget(row.budget).amount for row in rows})
        else:
            levels = np.geomspace(min(flops), max(flops), CURVES)
        reach = [row.size.parameters(count) for row in study.rows]
        curve_n = np.geomspace(min(reach), max(reach) * 1.3, 200)
        for level, style in [*((level, "-") for level in levels), *((level, "--") for level in held_out)]:
            law = found.fit.loss(curve_n, level / flops_per_token(curve_n, study.ladder, count))
            axes.plot(curve_n, law, style, color=color(level), lw=1.2)
            best = int(law.argmin())
            if 0 < best < len(law) - 1:
                axes.plot(curve_n[best], law[best], "*", color=color(level), ms=10, mec="black", mew=0.4)
        axes.plot([], [], "*", color="white", mec="black", ms=9, label="best size at its FLOPs")
    for size, loss in found.minima.values():
        axes.plot(size, loss, "x", color="black", ms=7, zorder=4)
    if found.minima:
        axes.plot([], [], "x", color="black", label="lowest point of a parabola through rows")
    _draw_held_out(axes, study, found, lambda row: row.size.parameters(count))
    return norm


def _draw_held_out(axes: Axes, study: Study, found: Findings, x: object) -> None:
    labels = {"bar": "predicted, with its interval", "point": "held out, measured"}
    for row in study.rows:
        if not row.held_out:
            continue
        if row.name in found.held_out:
            value, low, high = found.held_out[row.name]
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar(x(row), value, spread, fmt="_", capsize=5, label=labels.pop("bar", None), **HELD_OUT)
        if row.name in found.losses:
            label = labels.pop("point", None)
            axes.plot(x(row), found.losses[row.name], "D", ms=6, mfc="none", label=label, **HELD_OUT)


def _plain_ticks(axes: Axes) -> None:
    """Losses span less than a decade: ticks at round values, written out."""
    low, high = axes.get_ylim()
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 100) if (high - low) / s <= 9)
    axes.set_yticks(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2f}".rstrip("0").rstrip(".")))
    axes.xaxis.set_minor_locator(LogLocator(subs=np.arange(2, 10)))
    axes.xaxis.set_minor_formatter(NullFormatter())

"""A timing for a person to read, and beside an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslx.planning.report import seconds, size
from sslx.timing.clock import Spread
from sslx.timing.result import Result

EXPENSIVE = 10  # operations that are printed


def show(found: Result, console: Console) -> None:
    """Prints one result."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.batch.items())
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    _line(console, "devices", f"{found.devices} x {found.device}; {versions}")
    _line(console, "batch", shapes)
    _line(console, "step", f"{_spread(found.step)} (median and quartiles of {found.step.count} steps)")
    for name, part, what in (
        ("input", found.input, "the host waits for a batch"),
        ("host", found.host, "it hands the step over"),
        ("device", found.waiting, "it waits for the devices"),
    ):
        _line(console, f"  {name}", f"{_spread(part)}  {part.median / found.step.median:.1%}: {what}")
    _line(console, "  alone", f"{_spread(found.alone)} from handing a step over to its results, nothing beside it")
    _line(console, "throughput", _throughput(found))
    _line(console, "model", f"{_flops(found.model_flops)} a step, {_flops(found.flops)}/s")
    peak = "none published" if found.peak is None else f"{found.shares['of_peak']:.1%} of {_flops(found.peak)}/s (bf16)"
    _line(console, "  of the peak", peak)
    product = f"{found.shares['of_product']:.1%} of {_flops(found.product.median)}/s"
    quartiles = f"{_flops(found.product.low)}/s to {_flops(found.product.high)}/s"
    squares = f"{found.product_size} x {found.product_size} {found.precision}, {quartiles}"
    _line(console, "  of a product", f"{product} ({squares}, median and quartiles of {found.product.count})")
    compiled = found.compilation
    cached = "not served by it" if compiled.cached is None else seconds(compiled.cached)
    cold = f"{seconds(compiled.cold)} ({seconds(compiled.tracing)} of it tracing)"
    _line(console, "compilation", f"{cold}; from the persistent cache: {cached}")
    _line(console, "peak memory", f"{size(found.memory)} {found.memory_of}")
    for note in found.notes:
        console.print(Text(f"note: {note}"))
    if found.operations:
        console.print(_table(found))


def compare(found: Result, there: Mapping[str, Any], file: str, changed: list[str], console: Console) -> None:
    """Prints ratios of a result to an earlier one, new over old, with the quartiles' ratios around them."""
    table = Table(title=f"beside {file}", title_justify="left", title_style="bold")
    for number, column in enumerate(("", "there", "here", "ratio", "between")):
        table.add_column(column, justify="left" if number == 0 else "right")
    spreads = {"step": found.step, "  input": found.input, "  host": found.host, "  device": found.waiting}
    names = {"step": "step", "  input": "input", "  host": "host", "  device": "waiting"}
    for name, here in (spreads | {"  alone": found.alone}).items():
        old = Spread(**there[names.get(name, "alone")])
        table.add_row(name, seconds(old.median), seconds(here.median), *_ratio(here, old))
    old = Spread(**there["product"])
    table.add_row(
        "product", f"{_flops(old.median)}/s", f"{_flops(found.product.median)}/s", *_ratio(found.product, old)
    )
    for name, rate in found.rates.items():
        if before := there["rates"].get(name):
            table.add_row(name.replace("_", " "), f"{before:,.0f}", f"{rate:,.0f}", f"{rate / before:.3f}")
    before, now = there["of_product"], found.shares["of_product"]
    table.add_row("share of product", f"{before:.1%}", f"{now:.1%}", f"{now / before:.3f}")
    for name in ("cold", "cached"):
        before, now = there["compilation"][name], getattr(found.compilation, name)
        if before and now:
            table.add_row(f"compilation, {name}", seconds(before), seconds(now), f"{now / before:.3f}")
    table.add_row("peak memory", size(there["memory"]), size(found.memory), f"{found.memory / there['memory']:.3f}")
    console.print(table)
    for line in changed:
        console.print(Text(f"differs: {line}"))


def ratio(new: Spread, old: Spread) -> tuple[float, float, float]:
    """New over old, and between which it lies if each may be anywhere between its quartiles."""
    return new.median / old.median, new.low / old.high, new.high / old.low


def _ratio(new: Spread, old: Spread) -> tuple[str, str]:
    if min(old.low, new.low) <= 0:  # a part that took no time
        return "-", ""
    middle, low, high = ratio(new, old)
    return f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def _throughput(found: Result) -> str:
    told = [f"{found.rates[f'{found.row_unit}_per_second']:,.1f} {found.row_unit}/s"]
    if found.useful is not None:
        told.append(f"{found.rates['tokens_per_second']:,.0f} tokens/s")
    if found.positions is not None:
        told.append(f"{found.rates['padded_tokens_per_second']:,.0f} with padding")
    return ", ".join(told)


def _table(found: Result) -> Table:
    table = Table(title="most expensive operations of a step", title_justify="left", title_style="bold")
    for name in ("operation", "time", "share", "from", "source"):
        table.add_column(name, justify="right" if name in ("time", "share") else "left", overflow="fold")
    for one in found.operations[:EXPENSIVE]:
        name = f"{one.name} and {one.count - 1} more" if one.count > 1 else one.name
        table.add_row(*map(Text, (name, seconds(one.seconds), f"{one.share:.1%}", one.origin, one.place)))
    return table


def _spread(value: Spread) -> str:
    return f"{seconds(value.median)} ({seconds(value.low)} to {seconds(value.high)})"


def _flops(value: float) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e3:.2f} kFLOP"


def _line(console: Console, name: str, said: str) -> None:
    console.print(Text(f"{name:<14} {said}"), soft_wrap=True)

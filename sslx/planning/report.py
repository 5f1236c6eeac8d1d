"""A plan for a person to read: tables of memory, collectives and times, and what to do where it does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sslx.planning.compilation import Plan, Sent
from sslx.planning.search import flags, remedies
from sslx.planning.topology import Topology


def show(
    found: Plan, topology: Topology, written: Mapping[str, Any], console: Console, *, searched: bool = False
) -> None:
    """Prints one plan of the config ``written``; ``searched``: it is what a search has found."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    console.print(f"[bold]{topology.name}[/bold]" + (f"  ({topology.note})" if topology.note else ""))
    settings = ", ".join(f"{name}={value}" for name, value in found.settings.items())
    console.print(f"mesh {mesh}; {settings}")
    _memory(found, console)
    if found.memory is None:
        _does_not_fit(found, topology, written, console, searched)
        return
    for title, sent in (("training", found.collectives), ("evaluation", found.eval_collectives)):
        _collectives(f"collectives of one {title} step", sent, topology, console)
    _times(found, topology, console)
    if not found.fits:
        _does_not_fit(found, topology, written, console, searched)
    for note in found.notes:
        console.print(f"note: {note}")
    evaluated = f", of the evaluation step in {found.eval_compile_seconds:.1f} s" if found.eval_memory else ""
    console.print(f"compilation of the training step took {found.compile_seconds:.1f} s{evaluated}")


def ranking(plans: Iterable[Plan], console: Console) -> None:
    """Prints what a search compiled, best first, and how to run the best."""
    plans = list(plans)
    table = _table(
        "meshes by predicted time, all overlapped", "mesh", "micro", "remat", "HBM", "time", "bound", "MFU", "compiled"
    )
    for one in plans:
        mesh = " x ".join(f"{axis}={size}" for axis, size in one.mesh.items() if size > 1) or "one device"
        row = [mesh, str(one.settings["micro_batches"]), str(one.settings.get("remat", "-"))]
        if one.fits:
            times = one.roofline
            row += [size(one.memory.peak), seconds(times.overlapped), times.bound, f"{times.mfu:.1%}"]
            row.append(f"{one.compile_seconds:.0f} s")
        else:
            row += [size(one.needed) if one.needed else "", "does not fit"]
        table.add_row(*row)
    console.print(table)
    if plans and plans[0].fits:
        console.print(f"best: {flags(plans[0])}", soft_wrap=True)
    else:
        console.print("none fits: take a larger topology, a smaller batch or a smaller model")


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def seconds(value: float) -> str:
    """A time in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.2f} {unit}"
    return ""


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _memory(found: Plan, console: Console) -> None:
    table = _table("memory of one chip", "what", "bytes")
    table.add_row(f"parameters ({found.parameters / 1e6:.2f} M in all)", size(found.parameter_bytes))
    table.add_row("optimizer state", size(found.optimizer_bytes))
    if found.memory:
        table.add_row("temporaries of the training step", size(found.memory.temporaries))
        table.add_row("peak of the training step", size(found.memory.peak))
    elif found.needed:
        table.add_row("needed by the training step", size(found.needed))
    if found.eval_memory:
        table.add_row("peak of the evaluation step", size(found.eval_memory.peak))
    if found.hbm_bytes:
        table.add_row("HBM of the chip", size(found.hbm_bytes))
    console.print(table)


def _collectives(title: str, sent: Mapping[str, Sent], topology: Topology, console: Console) -> None:
    if not sent:
        return
    # Simulated devices have no network with a name, and are one slice.
    ways = {"ici_bytes": "ICI, sent by a chip", "dcn_bytes": "DCN, sent by a chip"}
    ways = ways if topology.chip else {"ici_bytes": "sent between devices, by one"}
    table = _table(title, "kind", "times", *ways.values())
    for kind, one in sent.items():
        table.add_row(kind, f"{one.count:,}", *(size(getattr(one, way)) for way in ways))
    whole = (size(sum(getattr(one, way) for one in sent.values())) for way in ways)
    table.add_row("all", f"{sum(one.count for one in sent.values()):,}", *whole)
    console.print(table)


def _times(found: Plan, topology: Topology, console: Console) -> None:
    model, executed = found.model_flops, found.executed_flops
    console.print(
        f"model FLOPs of one step: {model:.3g}; matrix products executed: {executed:.3g} ({executed / model:.2f} x)"
    )
    times = found.roofline
    if times is None:
        return
    chip = topology.chip
    table = _table("roofline of one training step", "resource", "amount a chip", "at best", "time")
    rates = {
        "compute": (f"{executed / found.chips:.3g} FLOP", f"{chip.flops / 1e12:.0f} TFLOP/s"),
        "hbm": (f"about {size(found.hbm_traffic)}", f"{chip.hbm_bandwidth / 1e9:.0f} GB/s"),
        "ici": (size(found.ici_bytes), f"{chip.network.link_bandwidth / 1e9:.0f} GB/s a link and direction"),
        "dcn": (size(found.dcn_bytes), f"{chip.network.dcn_bandwidth / 1e9:.2f} GB/s"),
    }
    for resource, (amount, rate) in rates.items():
        table.add_row(resource, amount, rate, seconds(times.parts[resource]))
    console.print(table)
    console.print(
        f"bound by {times.bound}: a step takes {seconds(times.overlapped)}, MFU {times.mfu:.1%}, with all overlapped; "
        f"{seconds(times.serial)}, {times.serial_mfu:.1%} with no overlap. Published peaks, no latency, no vector "
        "arithmetic; HBM bytes are estimated from the compiled program."
    )


def _does_not_fit(
    found: Plan, topology: Topology, written: Mapping[str, Any], console: Console, searched: bool
) -> None:
    needed = f"needs {size(found.needed)}" if found.needed else "needs more"
    console.print(f"[bold]does not fit[/bold]: the training step {needed}, a chip has {size(found.hbm_bytes)}")
    state = found.parameter_bytes + found.optimizer_bytes
    fixed = state + found.parameter_bytes  # with the gradients
    left = state * found.mesh["fsdp"] * found.mesh["tensor"] / found.chips  # with all of it split over all chips
    if left >= found.hbm_bytes:
        console.print(
            f"no setting makes it fit: parameters and optimizer state, split over all chips, are {size(left)} a chip; "
            "take a larger topology or a smaller model"
        )
        return
    changes = remedies(written, found, topology)
    most = found.chips // (found.mesh["sequence"] * found.mesh["tensor"])
    split = state > 0.25 * found.hbm_bytes and found.mesh["fsdp"] < most
    if not split and not changes:
        console.print("nothing else to split or recompute: take a larger topology, a smaller batch or a smaller model")
        return
    not_alone = "; not enough alone, as estimated"
    tried = "" if searched else " (--search tries these on several meshes)"
    console.print(f"what may make it fit, alone or together{tried}:")
    if split:
        saved = fixed * (1 - found.mesh["fsdp"] / most)
        hint = not_alone if found.needed and found.needed - saved > found.hbm_bytes else ""
        console.print(f"  --config.mesh.fsdp={most} --config.mesh.data=1  state is {size(state)} a chip{hint}")
    hint = not_alone if fixed >= found.hbm_bytes else ""  # they leave all of that where it is
    for change in changes:
        console.print("  " + " ".join(f"--config.{key}={value}" for key, value in change.items()) + hint)

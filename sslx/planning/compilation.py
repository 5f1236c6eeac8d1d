"""Compiles the real training and evaluation step for a topology and measures them: one config on one mesh.

In: the whole written config and a `Topology`. Out: a `Plan`, of plain numbers. No data is read and nothing runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sslx.errors import UserError, first_line
from sslx.planning import hlo, roofline, traffic
from sslx.planning.roofline import Roofline
from sslx.planning.topology import Topology
from sslx.session import run_config
from sslx.train.initialise import part_of, trained_class
from sslx.train.memory import exhausted
from sslx.train.program import Program
from sslx.train.sharding import make_mesh

# For simulated devices: nothing runs, and machine code takes most of the time. What moves is settled before it.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a step runs. ``peak`` is arguments, temporaries and results that reuse no argument."""

    arguments: int
    temporaries: int
    peak: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Memory:
        """What the compiler says that a program takes."""
        stats = compiled.memory_analysis()
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
        return cls(arguments, temporaries, arguments + temporaries + results)


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind in one step: how many run, and the bytes that one chip sends for them."""

    count: int
    ici_bytes: float
    dcn_bytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config does on one mesh. Bytes are per chip, FLOPs of all chips together, all per step.

    ``memory`` is None, and ``collectives`` empty, where the compiler refused: ``needed`` is then what it said that the
    step needs, if it did.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    hbm_bytes: int | None
    fits: bool
    needed: int | None
    memory: Memory | None
    eval_memory: Memory | None
    model_flops: float
    executed_flops: float
    hbm_traffic: float
    collectives: dict[str, Sent]
    eval_collectives: dict[str, Sent]
    roofline: Roofline | None
    compile_seconds: float
    eval_compile_seconds: float
    notes: tuple[str, ...]

    @property
    def ici_bytes(self) -> float:
        """Bytes that one chip sends inside its slice in a step."""
        return sum(sent.ici_bytes for sent in self.collectives.values())

    @property
    def dcn_bytes(self) -> float:
        """Bytes that one chip sends to other slices in a step."""
        return sum(sent.dcn_bytes for sent in self.collectives.values())

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = dataclasses.asdict(self)
        if self.roofline:
            times = {"bound": self.roofline.bound, "overlapped": self.roofline.overlapped}
            times |= {"serial": self.roofline.serial, "mfu": self.roofline.mfu, "serial_mfu": self.roofline.serial_mfu}
            values["roofline"] |= times
        return values | {"ici_bytes": self.ici_bytes, "dcn_bytes": self.dcn_bytes}


def build_program(written: Mapping[str, Any], topology: Topology) -> Program:
    """The steps of a config on a topology, not compiled yet.

    Raises:
      UserError: anything in the config that cannot be, or an objective that cannot be planned.
    """
    config = run_config(written, part_of(written))
    written = {**written, **dataclasses.asdict(config)}
    if topology.chip and written["model"].get("unroll", False) is None:
        written["model"] = {**written["model"], "unroll": False}  # left open, it means no on an accelerator
    objective, row = trained_class(written, config).abstract(written)
    return Program(config, objective, row, make_mesh(config.mesh, list(topology.devices)))


def plan(written: Mapping[str, Any], topology: Topology, *, evaluation: bool = True) -> Plan:
    """Compiles and measures.

    Args:
      written: The whole config as plain dicts.
      topology: What to compile for.
      evaluation: Also compile the evaluation step.

    Raises:
      UserError: anything in the config that cannot be, or that the compiler refuses. A step that does not fit the
        memory is a `Plan` that says so.
    """
    program = build_program(written, topology)
    order = list(program.mesh.devices.flat)
    lowered = program.lower_train()
    executed = traffic.product_flops(hlo.parse(lowered.as_text(dialect="hlo")))
    begin = time.monotonic()
    compiled, text, needed = _compile(lowered, program)
    seconds = time.monotonic() - begin
    memory, sent, moved, times, notes = None, [], 0.0, None, [*program.notes, *program.undivided]
    if compiled is not None:
        memory = Memory.of(compiled)
        needed = memory.peak
        module = hlo.parse(text)
        notes += _unknown_loops(module)
        sent = traffic.collectives(module, _slices(order))
        moved = traffic.hbm_bytes(module)
        executed += traffic.kernel_flops(module) * len(order)
        if topology.chip:
            times = roofline.estimate(
                topology,
                order,
                model_flops=program.flops,
                executed_flops=executed,
                hbm_bytes=moved,
                collectives=sent,
            )
    hbm = topology.chip.hbm_bytes if topology.chip else None
    fits = compiled is not None and (hbm is None or memory.peak <= hbm)
    eval_memory, eval_sent, eval_seconds = None, [], 0.0
    if evaluation and fits:
        begin = time.monotonic()
        compiled_eval, text, _ = _compile(program.lower_eval(), program)
        eval_seconds = time.monotonic() - begin
        if compiled_eval is None:
            notes.append("the evaluation step does not fit where the training step does")
        else:
            eval_memory = Memory.of(compiled_eval)
            module = hlo.parse(text)
            notes += _unknown_loops(module)
            eval_sent = traffic.collectives(module, _slices(order))
    config = program.config
    settings = {"batch_size": config.batch_size, "micro_batches": config.micro_batches}
    settings |= {name: written["model"][name] for name in ("remat", "dtype") if name in written["model"]}
    return Plan(
        topology=topology.name,
        chips=len(order),
        mesh={axis: int(size) for axis, size in program.mesh.shape.items()},
        settings=settings,
        parameters=program.parameters,
        parameter_bytes=shard_bytes(program.abstract.params),
        optimizer_bytes=shard_bytes(program.abstract.opt_state),
        hbm_bytes=hbm,
        fits=fits,
        needed=needed,
        memory=memory,
        eval_memory=eval_memory,
        model_flops=program.flops,
        executed_flops=executed,
        hbm_traffic=moved,
        collectives=_by_kind(sent),
        eval_collectives=_by_kind(eval_sent),
        roofline=times,
        compile_seconds=seconds,
        eval_compile_seconds=eval_seconds,
        notes=tuple(notes),
    )


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _unknown_loops(module: hlo.Module) -> list[str]:
    unknown: list[str] = []
    for _ in hlo.executions(module, unknown):
        pass
    return [f"{len(unknown)} loops of unknown length count once"] if unknown else []


def _compile(lowered: jax.stages.Lowered, program: Program) -> tuple[jax.stages.Compiled | None, str, int | None]:
    """The compiled step and its HLO, or None, "" and the bytes that the compiler needs where memory is too small."""
    try:
        if program.mesh.devices.flat[0].platform == "cpu":
            compiled = lowered.compile(compiler_options=UNOPTIMISED)
            return compiled, compiled.as_text(), None
        # Written by the compiler itself: `as_text` reads its program back, and fails on asynchronous collectives of
        # several operands, which v5p has.
        with tempfile.TemporaryDirectory() as folder:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            (dump,) = Path(folder).glob("*.after_optimizations.txt")
            return compiled, dump.read_text(), None
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise UserError(f"the compiler refuses the step: {first_line(error)}") from error
        said = re.search(r"(?:memory required[^(]*\(|Used )([\d.]+)([KMGT])", str(error))
        if said is None:
            return None, "", None
        needed = int(float(said.group(1)) * 1024 ** ("KMGT".index(said.group(2)) + 1))
        return None, "", needed + (shard_bytes(program.abstract) if "temporaries" in str(error) else 0)


def _slices(order: list) -> list[int]:
    return [getattr(device, "slice_index", None) or 0 for device in order]


def _by_kind(collectives: list[traffic.Collective]) -> dict[str, Sent]:
    found: dict[str, Sent] = {}
    for one in collectives:
        old = found.get(one.kind, Sent(0, 0.0, 0.0))
        found[one.kind] = Sent(old.count + one.times, old.ici_bytes + one.ici_sent, old.dcn_bytes + one.dcn_sent)
    return dict(sorted(found.items(), key=lambda item: -item[1].ici_bytes - item[1].dcn_bytes))

"""Looks for the mesh on which a step takes the least time, and for what makes it fit.

In: a written config and a `Topology`. Out: compiled `Plan`s, best first. Splits of the devices over data, fsdp and
tensor are ranked by an analytic estimate of their communication; only the first few are compiled. One that does not
fit is compiled again with more micro-batches or, where there are none left, with rematerialised layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sslx.errors import UserError
from sslx.planning.compilation import Plan, build_program, plan, shard_bytes
from sslx.planning.topology import Topology
from sslx.session import run_config
from sslx.train.initialise import part_of
from sslx.train.memory import REMAT

SEARCHED = ("data", "fsdp", "tensor")
LARGEST_TENSOR = 16  # beyond it, layers of published widths leave a chip too little to multiply
TRIES = 4  # remedies for a mesh that does not fit
SLACK = 1.1  # micro-batches do not shrink everything, and the compiler keeps some memory for itself


@dataclasses.dataclass(frozen=True)
class Step:
    """What the analytic estimate needs to know of a training step, for all chips together.

    Attributes:
      state_bytes: Parameters and optimizer state.
      parameter_bytes: Parameters in float32, which gradients are as large as.
      flops: Model FLOPs.
      activation_bytes: One residual stream of the whole batch; 0 where the model does not say.
      layers: Layers that reduce it over tensor, twice forward and twice backward.
    """

    state_bytes: int
    parameter_bytes: int
    flops: float
    activation_bytes: float
    layers: int


def search(
    written: Mapping[str, Any], topology: Topology, *, compile_at_most: int = 4, say: Callable[[str], None] = print
) -> list[Plan]:
    """Compiles the most promising meshes.

    Args:
      written: The whole config as plain dicts.
      topology: What to compile for; a TPU, since nothing is published of simulated devices.
      compile_at_most: Meshes to compile.
      say: Told of each mesh before it is compiled, and of each plan as it is made.

    Returns:
      Plans, those that fit first, by the predicted time of a step.

    Raises:
      UserError: no mesh is possible.
    """
    if topology.chip is None:
        raise UserError("--search ranks meshes by predicted time; expected a --topology, not --devices")
    meshes = rank(written, topology)
    plans, refused = [], ""
    for tried, mesh in enumerate(meshes):
        if len(plans) == compile_at_most:
            break
        wanted = min(compile_at_most, len(plans) + len(meshes) - tried)
        say(f"candidate {len(plans) + 1} of {wanted}: {_axes(mesh)}")
        try:
            found = fitting({**written, "mesh": {**written["mesh"], **mesh}}, topology, say)
        except UserError as error:  # a dimension that this mesh does not divide
            refused = str(error)
            say(f"  not possible: {refused}")
            continue
        plans.append(found)
    if not plans:
        raise UserError(f"no mesh of {len(topology.devices)} devices is possible: {refused}")
    return sorted(plans, key=_order)


def _order(found: Plan) -> tuple[bool, float, float]:
    times = found.roofline
    if not found.fits or times is None:
        return True, found.needed or math.inf, 0.0
    return False, times.overlapped, times.serial


def rank(written: Mapping[str, Any], topology: Topology) -> list[dict[str, int]]:
    """Meshes that the batch divides over and whose state fits, by estimated time, least first.

    Raises:
      UserError: the config cannot be, or no mesh can hold its state.
    """
    config = run_config(written, part_of(written))
    devices = len(topology.devices)
    sequence = max(1, config.mesh.sequence)
    rows = config.batch_size // config.micro_batches
    heads = written["model"].get("heads", 1)
    possible = [
        {"data": data, "fsdp": fsdp, "tensor": tensor}
        for data, fsdp, tensor in splits(devices // sequence)
        if rows % (data * fsdp) == 0 and tensor <= LARGEST_TENSOR and heads % tensor == 0
    ]
    if not possible:
        raise UserError(
            f"config.batch_size {config.batch_size} in {config.micro_batches} micro-batches divides over no mesh of "
            f"{devices} devices; nearest that does over all: {-(-rows // devices) * devices * config.micro_batches}"
        )
    step = describe({**written, "mesh": {**written["mesh"], **possible[0]}}, topology)
    holding = [mesh for mesh in possible if step.state_bytes / mesh["fsdp"] / mesh["tensor"] < topology.chip.hbm_bytes]
    if not holding:
        least = step.state_bytes / max(mesh["fsdp"] * mesh["tensor"] for mesh in possible)
        raise UserError(
            f"parameters and optimizer state are {least / 2**30:.1f} GiB a chip on the most split mesh; "
            f"a chip has {topology.chip.hbm_bytes / 2**30:.0f} GiB: take a larger topology"
        )
    return sorted(holding, key=lambda mesh: cost(step, topology, mesh, config.micro_batches))


def splits(devices: int) -> Iterator[tuple[int, int, int]]:
    """All ``(data, fsdp, tensor)`` whose product is ``devices``."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in divisors:
        for fsdp in divisors:
            if devices % (tensor * fsdp) == 0:
                yield devices // tensor // fsdp, fsdp, tensor


def describe(written: Mapping[str, Any], topology: Topology) -> Step:
    """The size of a step, from its shapes."""
    program = build_program(written, topology)
    state, params = program.abstract, program.abstract.params
    mesh = program.mesh.shape
    split = mesh["fsdp"] * mesh["tensor"]
    model = written["model"]
    tokens = max((math.prod(shape) for shape in program.batch_shapes.values()), default=0)
    return Step(
        state_bytes=split * (shard_bytes(params) + shard_bytes(state.opt_state) + shard_bytes(state.state)),
        parameter_bytes=4 * program.parameters,
        flops=program.flops,
        activation_bytes=tokens * model.get("width", 0) * (2 if model.get("dtype") == "bfloat16" else 4),
        layers=model.get("layers", 0),
    )


def sent(step: Step, topology: Topology, mesh: Mapping[str, int], micro_batches: int) -> tuple[float, float]:
    """Bytes that one chip sends in a step inside its slice and to other slices, estimated.

    Parameters and gradients count in float32. The compiler turns some of them to bfloat16 before it sends them, where
    layers compute in it, and reduces others whole where it could scatter: what compiles lies within a factor of 2.5.
    """
    data, fsdp, tensor = (mesh[axis] for axis in SEARCHED)
    shard = step.parameter_bytes / tensor
    within = max(1, data // topology.slices)
    # Every micro-batch gathers parameters over fsdp forward and backward and scatters gradients, and reduces these over
    # data: the step adds up reduced gradients.
    ici = micro_batches * 3 * shard * (fsdp - 1) / fsdp
    ici += micro_batches * 2 * shard / fsdp * (within - 1) / within
    ici += 4 * step.layers * 2 * step.activation_bytes * tensor / len(topology.devices) * (tensor - 1) / tensor
    # The compiler sends whole gradients to other slices, though each chip could send a part of them.
    return ici, micro_batches * 2 * shard / fsdp * (topology.slices - 1) / topology.slices


def cost(
    step: Step, topology: Topology, mesh: Mapping[str, int], micro_batches: int
) -> tuple[float, float, float, float]:
    """What meshes and remedies are ranked by: seconds of a step overlapping everything, then nothing, then bytes."""
    network = topology.chip.network
    ici_bytes, dcn_bytes = sent(step, topology, mesh, micro_batches)
    ici = ici_bytes / (2 * network.dimensions * network.link_bandwidth)
    dcn = dcn_bytes / network.dcn_bandwidth
    compute = step.flops / (len(topology.devices) * topology.chip.flops)
    return max(compute, ici, dcn), compute + ici + dcn, dcn_bytes, ici_bytes


def fitting(written: Mapping[str, Any], topology: Topology, say: Callable[[str], None]) -> Plan:
    """Compiles a mesh as written and, while it does not fit, with the first remedy added; returns the last plan.

    Raises:
      UserError: the config cannot be on this mesh.
    """
    found = plan(written, topology)
    say(line(found))
    for _ in range(TRIES):
        changes = remedies(written, found, topology)
        if found.fits or not changes:
            break
        written = changed(written, changes[0])
        found = plan(written, topology)
        say(line(found))
    return found


def remedies(written: Mapping[str, Any], refused: Plan, topology: Topology) -> list[dict[str, Any]]:
    """What to change in a config whose step does not fit, by what it costs as `rank` estimates it: the least first.

    Micro-batches, as many as the compiler's count says are needed, send once more for each what data and fsdp send.
    Rematerialised layers cost up to a third more arithmetic.
    """
    config = run_config(written, part_of(written))
    most = config.batch_size // (refused.mesh["data"] * refused.mesh["fsdp"])
    fixed = 2 * refused.parameter_bytes + refused.optimizer_bytes  # with the gradients
    room = (refused.hbm_bytes or math.inf) - fixed
    times = SLACK * (refused.needed - fixed) / room if refused.needed and room > 0 else 2.0
    enough = (parts for parts in range(config.micro_batches + 1, most + 1) if parts >= times * config.micro_batches)
    parts = next((parts for parts in enough if most % parts == 0), None) if room > 0 else None
    given = written["model"].get("remat")
    again = [{"model.remat": policy} for policy in (REMAT[REMAT.index(given) + 1 :] if given in REMAT else ())]
    if parts is None:
        return again
    changes: list[dict[str, Any]] = [{"micro_batches": parts}]
    step = Step(0, 4 * refused.parameters, refused.model_flops, 0, 0)  # activations are sent once either way
    redone = dataclasses.replace(step, flops=step.flops * 4 / 3)
    split = cost(step, topology, refused.mesh, parts)
    return changes + again if split <= cost(redone, topology, refused.mesh, config.micro_batches) else again + changes


def changed(written: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with some dotted keys changed."""
    result = dict(written)
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        if group:
            result[group] = {**result[group], name: value}
        else:
            result[name] = value
    return result


def as_planned(written: Mapping[str, Any], found: Plan) -> dict[str, Any]:
    """The config that a plan is of: with its mesh, micro-batches and rematerialisation."""
    changes = {f"mesh.{axis}": size for axis, size in found.mesh.items()}
    changes["micro_batches"] = found.settings["micro_batches"]
    if "remat" in found.settings:
        changes["model.remat"] = found.settings["remat"]
    return changed(written, changes)


def flags(found: Plan) -> str:
    """What to type to run a plan."""
    given = [f"--config.mesh.{axis}={size}" for axis, size in found.mesh.items() if size > 1 or axis == "data"]
    given.append(f"--config.micro_batches={found.settings['micro_batches']}")
    if "remat" in found.settings:
        given.append(f"--config.model.remat={found.settings['remat']}")
    return " ".join(given)


def line(found: Plan) -> str:
    """One plan in one line."""
    mesh = _axes(found.mesh)
    settings = f"micro_batches={found.settings['micro_batches']}, remat={found.settings.get('remat', '-')}"
    if not found.fits:
        needed = (
            f"needs {found.needed / 2**30:.1f} of {found.hbm_bytes / 2**30:.1f} GiB" if found.needed else "too large"
        )
        return f"{mesh}, {settings}: does not fit, {needed}"
    times = found.roofline
    return (
        f"{mesh}, {settings}: {times.overlapped * 1e3:.2f} ms a step, all overlapped ({times.bound}), "
        f"{found.memory.peak / 2**30:.2f} GiB a chip, compiled in {found.compile_seconds:.0f} s"
    )


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"

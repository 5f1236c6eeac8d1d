"""What one call of a compiled program moves and multiplies: collectives, HBM bytes, matrix products.

In: a module of `sslx.planning.hlo`. Out: counts per chip, loop bodies times their trips. What a collective sends is
what one chip hands to the network with the usual ring algorithms; across slices, with rings inside each slice and
between them. HBM bytes are an estimate: every scheduled instruction reads its operands and writes its results once, as
far as they lie in HBM; slices read and updates written inside a fusion count with their own size.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from sslx.planning.hlo import Array, Computation, Execution, Instruction, Module, executions

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Instructions that move nothing: they name, wait, or only call others.
_FREE = {
    "async-start",
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "domain",
    "recv",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: Such as ``all-reduce``.
      name: The instruction's.
      bytes: Size of the operands on one chip.
      times: How often it runs in one call.
      group: Chips that take part together.
      slices: Slices that these chips lie in.
      members: Numbers of the first group's chips, in the order of the mesh; () where a whole slice takes part.
    """

    kind: str
    name: str
    bytes: int
    times: int
    group: int
    slices: int = 1
    members: tuple[int, ...] = ()

    @property
    def ici_sent(self) -> float:
        """Bytes that one chip sends inside its slice, in one call of the program."""
        return self.times * _sent(self.kind, self.bytes, self.group, self.slices)[0]

    @property
    def dcn_sent(self) -> float:
        """Bytes that one chip sends to other slices, in one call of the program."""
        return self.times * _sent(self.kind, self.bytes, self.group, self.slices)[1]


def _sent(kind: str, size: int, group: int, slices: int) -> tuple[float, float]:
    """Bytes inside and between slices of one collective on operands of ``size`` bytes."""
    if group <= 1:
        return 0.0, 0.0
    inside = group // slices
    share_inside, share_across = (inside - 1) / inside, (slices - 1) / slices
    if kind == "all-reduce":  # scattered inside, reduced across, gathered inside
        return 2 * size * share_inside, 2 * size / inside * share_across
    if kind == "all-gather":
        return size * group * share_inside, size * slices * share_across
    if kind == "reduce-scatter":
        return size * share_inside, size / inside * share_across
    if kind.endswith("all-to-all"):
        return size * (inside - 1) / group, size * share_across
    return (float(size), 0.0) if slices == 1 else (0.0, float(size))


def collectives(module: Module, slice_of: Sequence[int]) -> list[Collective]:
    """Every collective that runs, with the chips it runs between.

    Args:
      module: A compiled program.
      slice_of: The slice of each device, in the order of the mesh. The TPU compiler writes the program of one slice
        (its groups then number the chips of that slice) and hands what goes to others to the host.
    """
    slices = len(set(slice_of))
    one_slice = module.partitions < len(slice_of)
    slice_of = [0] * module.partitions if one_slice else list(slice_of)
    found = []
    for execution in executions(module):
        instruction, computation = execution.instruction, execution.computation
        kind = instruction.opcode.removesuffix("-start")
        size = sum(array.bytes for operand in computation.operands(instruction) for array in operand.shape)
        if kind == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            kind = transfer.group(1).lower().replace("_", "-") if transfer else "collective-permute"
            kind = kind if kind in KINDS else "collective-permute"
            found.append(Collective(kind, instruction.name, size, execution.times, slices, slices))
        elif kind in KINDS and _counts(execution):
            if kind == "all-reduce" and execution.fused and computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how the TPU compiler writes one
            group, spans, members = _members(instruction, slice_of)
            found.append(Collective(kind, instruction.name, size, execution.times, group, spans, members))
    return found


def _counts(execution: Execution) -> bool:
    """Whether this is the collective itself, not the rest of an asynchronous one that fusions carry along with them."""
    if '"async_collective_fusion_config"' not in execution.instruction.attributes:
        return True
    return any("AsyncCollectiveStart" in other.attributes for other in execution.computation.instructions.values())


def _members(instruction: Instruction, slice_of: list[int]) -> tuple[int, int, tuple[int, ...]]:
    """How many chips take part together, in how many slices (of the group with most), and the first group's chips."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    if pairs:
        ends = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs.group(1))]
        crosses = any(slice_of[a] != slice_of[b] for a, b in ends)
        return (2 if ends else 1), (2 if crosses else 1), (ends[0] if ends else ())
    groups = replica_groups(instruction.attributes, len(slice_of))
    spans = max(len({slice_of[i] for i in group}) for group in groups)
    return len(groups[0]), spans, tuple(groups[0])


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective, from any of the ways in which XLA writes them.

    They are ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` (optionally ``<=[2,2]T(1,0)``), ``mesh['a'=2,'b'=2] {'a'}`` (optionally
    with ``device_ids``), or ``{}`` for one group of all.

    Raises:
      ValueError: none of them.
    """
    text = attributes.partition("replica_groups=")[2]
    listed = re.match(r"\{\{(.*?)\}\}", text)
    if listed:
        return [[int(i) for i in group.split(",") if i] for group in listed.group(1).split("},{")]
    if not text or text.startswith("{}"):
        return [list(range(devices))]
    counted = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if counted:
        return _iota(counted.group(2)).reshape(_numbers(counted.group(1))).tolist()
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", text)
    if not named:
        raise ValueError(f"cannot read the groups of a collective: {text[:80]}")
    return _mesh_groups(*named.groups())


def _mesh_groups(mesh: str, order: str | None, axes: str) -> list[list[int]]:
    """Groups along axes of a mesh; an axis may be split, as in ``'a':(2)4``: 4 in the middle, 2 before."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    shape = list(sizes.values())
    ids = _iota(f"<={order}") if order else np.arange(math.prod(shape))
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    split, moved = [], []
    for name, size in sizes.items():
        before, part = wanted.get(name, ("", ""))
        if name not in wanted:
            split.append(size)
        elif not part:
            moved.append(len(split))
            split.append(size)
        else:
            moved.append(len(split) + 1)
            split += [int(before), int(part), size // int(before) // int(part)]
    rest = [axis for axis in range(len(split)) if axis not in moved]
    width = math.prod(split[axis] for axis in moved)
    return ids.reshape(split).transpose(*rest, *moved).reshape(-1, width).tolist()


def _iota(text: str) -> np.ndarray:
    """The numbers that ``<=[2,8]T(1,0)`` or ``<=[16]`` stands for, flat."""
    source = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    shape = _numbers(source.group(1))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(source.group(2))) if source.group(2) else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def product_flops(module: Module) -> float:
    """FLOPs of all matrix products, recomputation included. For a module before optimisation: of the whole mesh."""
    total = 0.0
    for execution in executions(module):
        instruction = execution.instruction
        if instruction.opcode != "dot":
            continue
        left = execution.computation.instructions[instruction.operands[0]].shape[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        inner = math.prod(left.dims[axis] for axis in _numbers(contracted.group(1))) if contracted else 1
        total += execution.times * 2.0 * instruction.shape[0].elements * inner
    return total


def kernel_flops(module: Module) -> float:
    """FLOPs of the products inside splash attention's kernels, which an optimised module names; of one chip.

    Forward they are scores and values; backward once more the scores, and the gradients of what each kernel gives. All
    are counted in full, as those of plain attention are, which computes what a mask then hides.
    """
    total = 0.0
    for execution in executions(module):
        kernel = re.search(r"splash_mha_(fwd|dkv|dq)", execution.instruction.attributes)
        if execution.instruction.opcode != "custom-call" or kernel is None:
            continue
        operands = execution.computation.operands(execution.instruction)
        query, key = [array for one in operands for array in one.shape[:1] if array.dtype in ("bf16", "f32")][:2]
        total += execution.times * 2.0 * _SPLASH_PRODUCTS[kernel.group(1)] * query.elements * key.dims[-2]
    return total


def hbm_bytes(module: Module) -> float:
    """Bytes that one chip reads from and writes to its HBM, estimated."""
    total = 0.0
    for execution in executions(module):
        instruction, computation = execution.instruction, execution.computation
        opcode = instruction.opcode
        allocates = opcode == "custom-call" and not instruction.operands
        if execution.fused or allocates or opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "fusion":
            moved = _fusion_bytes(module, computation, instruction)
        elif opcode in ("dynamic-slice", "slice", "gather"):
            moved = 2 * _in_hbm(instruction.shape)
        elif opcode in ("slice-start", "dynamic-slice-start"):  # their result names their operands, then the slice
            piece = instruction.shape[len(instruction.operands)]
            moved = piece.bytes + _in_hbm((piece,))
        elif opcode == "dynamic-update-slice":
            moved = 2 * _in_hbm(computation.operands(instruction)[1].shape)
        else:
            read = sum(_in_hbm(operand.shape) for operand in computation.operands(instruction))
            # The result of a started copy or collective names its operands again.
            written = instruction.shape[:1] if opcode == "copy-start" else instruction.shape
            again = read if opcode.endswith("-start") and opcode != "copy-start" and len(instruction.shape) > 1 else 0
            moved = read + max(0, _in_hbm(written) - again)
        total += execution.times * moved
    return total


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> int:
    fused = module.computations.get(fusion.called("calls") or "")
    if fused is None or any("AsyncCollectiveDone" in i.attributes for i in fused.instructions.values()):
        return 0
    aliased = re.findall(r"\{(\d*)\}: \((\d+), \{", fusion.attributes.partition("output_to_operand_aliasing=")[2])
    same_outputs = {int(output or 0) for output, _ in aliased}
    same_operands = {int(operand) for _, operand in aliased}
    total = 0
    for number, operand in enumerate(computation.operands(fusion)):
        if number in fused.parameters and number not in same_operands:
            whole = _in_hbm(operand.shape)
            total += min(whole, _read(module, fused, fused.parameters[number], whole)) if whole else 0
    root = fused.instructions[fused.root]
    results = [(fused, name) for name in root.operands] if root.opcode == "tuple" else [(fused, fused.root)]
    for number, (result, array) in enumerate(zip(results, fusion.shape, strict=False)):
        updated = _updated(module, *result)
        if updated is not None and array.memory == 0:
            total += updated
        elif number not in same_outputs:
            total += _in_hbm((array,))
    return total


def _read(module: Module, fused: Computation, name: str, whole: int) -> int:
    """Bytes that a fusion reads of a value inside it: of the slices alone where nothing else is taken from it."""
    total = 0
    for use in fused.users.get(name, ()):
        inner = module.computations.get(use.called("calls") or "") if use.opcode == "fusion" else None
        if use.opcode in ("dynamic-slice", "slice", "gather") and use.operands[0] == name:
            total += sum(array.bytes for array in use.shape)
        elif use.opcode == "dynamic-update-slice" and use.operands[0] == name:
            continue  # written in place
        elif use.opcode == "bitcast":
            total += _read(module, fused, use.name, whole)
        elif inner is not None:
            numbers = [number for number, operand in enumerate(use.operands) if operand == name]
            total += sum(_read(module, inner, inner.parameters[number], whole) for number in numbers)
        else:
            return whole
    return total


def _updated(module: Module, fused: Computation, name: str) -> int | None:
    """Bytes that a fusion writes of a result that it updates in place; None: the result is new."""
    result = fused.instructions[name]
    while result.opcode in ("bitcast", "copy", "convert"):
        result = fused.instructions[result.operands[0]]
    inner = module.computations.get(result.called("calls") or "") if result.opcode == "fusion" else None
    if inner is not None:
        return _updated(module, inner, inner.root)
    if result.opcode != "dynamic-update-slice":
        return None
    return sum(array.bytes for array in fused.operands(result)[1].shape)


def _in_hbm(shape: Sequence[Array]) -> int:
    return sum(array.bytes for array in shape if array.memory == 0)

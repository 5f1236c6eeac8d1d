"""Reads HLO text: instructions with their shapes, and how often each of them runs.

In: the text of a module, before or after XLA's optimisation (``Lowered.as_text("hlo")``, ``Compiled.as_text()``). Out:
a `Module`, and `executions`, which walks it from the entry through calls and loops. XLA's own cost analysis counts a
loop's body once; here a body counts as often as its loop turns. Grammar: openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "bf16": 16, "token": 0, "opaque": 0}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*| )?\{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_BROKEN = re.compile(r'\{\n("[^\n]*)\n\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type, dimensions and memory (0 is HBM; TPUs have faster ones on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype, int(digits.group()) if digits else 0)
        return -(-self.elements * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; ``attributes`` is whatever follows the operands, as text."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses, as text: a parameter's number, a constant's value
    attributes: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as ``body=`` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        many = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if many:
            return [name.strip().lstrip("%") for name in many.group(1).split(",")]
        return [name for key in ("true_computation", "false_computation") if (name := self.called(key))]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last one marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(i.argument): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction reads."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name."""

    entry: str
    computations: dict[str, Computation]
    partitions: int


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction of a computation, how often it runs in one call of the module, and whether inside a fusion."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current, instructions, root = "", None, {}, ""
    # A kernel's metadata have lines of their own, the last of which looks like the end of a computation.
    for line in _BROKEN.sub(r"{\1}", text).splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current, instructions, root = header.group(2), {}, ""
                entry = current if header.group(1) else entry
        elif line.startswith("}"):
            computations[current] = Computation(current, instructions, root)
            current = None
        else:
            named = _NAMED.match(line)
            if named:
                instructions[named.group(2)] = _instruction(named.group(2), line[named.end() :])
                root = named.group(2) if named.group(1) or not root else root
    if not entry:
        raise ValueError("no ENTRY computation in the HLO text")
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Module(entry, computations, int(partitions.group(1)) if partitions else 1)


def executions(module: Module, unknown: list[str] | None = None) -> Iterator[Execution]:
    """Every instruction that the entry reaches, with the product of the trip counts around it.

    Both branches of a conditional count. An asynchronous operation's computation counts where it starts.

    Args:
      module: The module.
      unknown: Gets the names of loops whose trip count cannot be found; their bodies count once.
    """
    yield from _walk(module, module.computations[module.entry], 1, False, unknown if unknown is not None else [])


def _walk(module: Module, computation: Computation, times: int, fused: bool, unknown: list[str]) -> Iterator[Execution]:
    for instruction in computation.instructions.values():
        yield Execution(instruction, computation, times, fused)
        opcode, inner, turns, inside = instruction.opcode, [], 1, fused
        if opcode == "while":
            found = trip_count(module, computation, instruction)
            if found is None:
                unknown.append(instruction.name)
            turns, inner = (1 if found is None else found), [instruction.called("body")]
        elif opcode == "conditional":
            inner = instruction.branches()
        elif opcode == "fusion":
            inner, inside = [instruction.called("calls")], True
        elif opcode == "call":
            inner = [instruction.called("to_apply")]
        elif opcode == "async-start":
            inner = [instruction.called("calls")]
        for name in inner:
            if name in module.computations:
                yield from _walk(module, module.computations[name], times * turns, inside, unknown)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop turns: as XLA has noted, or from its first value, its step and its bound; None: not known."""
    noted = _TRIPS.search(loop.attributes)
    if noted:
        return int(noted.group(1))
    condition = module.computations.get(loop.called("condition") or "")
    body = module.computations.get(loop.called("body") or "")
    if condition is None or body is None:
        return None
    state = _skip_copies(computation, loop.operands[0])
    starts = state.operands if state.opcode == "tuple" else ()
    test, sides = _unwrapped(module, condition, condition.root)
    direction = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction is None or direction.group(1) not in ("LT", "LE"):
        return None
    counter, bound = (_element(*side) for side in sides)
    if counter is None or counter >= len(starts):
        return None
    limit = _constant(*sides[1])
    if limit is None and bound is not None and bound < len(starts):  # the bound is carried along unchanged
        limit = _constant(computation, starts[bound])
    start, step = _constant(computation, starts[counter]), _step(module, body, counter)
    if limit is None or start is None or not step:
        return None
    return max(0, -(-(limit + (direction.group(1) == "LE") - start) // step))


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """What a loop's body adds to element ``counter`` of its state."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or counter >= len(root.operands):
        return None
    added, operands = _unwrapped(module, body, root.operands[counter])
    if added.opcode != "add":
        return None
    return next((value for operand in operands if (value := _constant(*operand)) is not None), None)


def _unwrapped(
    module: Module, computation: Computation, name: str
) -> tuple[Instruction, list[tuple[Computation, str]]]:
    """An instruction and where its operands are, looking into the fusion or call that it may be wrapped in."""
    outer = _skip_copies(computation, name)
    inner = module.computations.get(outer.called("calls") or outer.called("to_apply") or "")
    if outer.opcode not in ("fusion", "call") or inner is None:
        return outer, [(computation, operand) for operand in outer.operands]
    root = _skip_copies(inner, inner.root)
    numbers = {parameter: number for number, parameter in inner.parameters.items()}
    return root, [
        (computation, outer.operands[numbers[operand]]) if operand in numbers else (inner, operand)
        for operand in root.operands
    ]


def _skip_copies(computation: Computation, name: str) -> Instruction:
    found = computation.instructions[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        found = computation.instructions[found.operands[0]]
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _skip_copies(computation, name)
    if found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.argument):
        return None
    return int(found.argument)


def _element(computation: Computation, name: str) -> int | None:
    """Which element of the computation's one parameter a value is."""
    found = _skip_copies(computation, name)
    if found.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", found.attributes)
    return int(index.group(1)) if index else None


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    begin = len(opcode)
    end = _closing(rest, begin)
    argument = rest[begin + 1 : end - 1]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(argument) if part.strip())
    return Instruction(name, opcode.strip(), _shape(shape), operands, argument, rest[end:])


def _shape(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        arrays.append(Array(dtype, sizes, int(memory.group(1)) if memory else 0))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """Just behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def _split(text: str) -> list[str]:
    """Splits at the commas that stand in no bracket."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, begin = [], 0, 0
    for position, sign in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append(text[begin:position])
            begin = position + 1
    return [*parts, text[begin:]]

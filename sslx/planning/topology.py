"""Names of TPU slices, their shapes, and their devices as the TPU compiler describes them, with no TPU present.

In: ``v5e:16x16`` (generation and chips along each axis of the torus) or a name as Cloud sells it (``v5e-256``,
``v5p-128``), or a number of CPU devices to simulate. Out: a `Topology` whose devices a mesh can be made of.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax

from sslx.errors import UserError, first_line, nearest
from sslx.train.chips import Chip, chip_of

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# Published slices of each generation that the compiler can be asked for. TPU v4 is not among them: without the hardware
# the compiler shows each core as a device, where a real v4 shows each chip as one.
SHAPES = {"v5e": _FLAT, "v5p": (*_CUBES, "16x16x24"), "v6e": _FLAT}

# Cloud counts TensorCores in the names of v5p slices, two to a chip, and chips in those of v5e and v6e.
CORES_IN_NAME = {"v5e": 1, "v5p": 2, "v6e": 1}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for.

    Attributes:
      name: For people, such as ``2 x v5e:16x16 (512 chips)``.
      devices: What a mesh is made of.
      chip: Published numbers of one device; None for simulated CPU devices.
      shape: Chips along each axis of one slice; () for CPU devices.
      slices: Slices connected by the data-centre network.
      note: How the name was read, where it can be misread.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    shape: tuple[int, ...]
    slices: int
    note: str = ""

    def wraps(self, axis: int) -> bool:
        """Whether the chips along an axis of the slice form a ring: 16 of v5e and v6e, whole 4x4x4 cubes of v5p."""
        if len(self.shape) == 2:
            return self.shape[axis] == 16
        return all(size % 4 == 0 for size in self.shape)


def names() -> dict[str, tuple[str, str]]:
    """Every short name with its generation and shape: ``{"v5p-128": ("v5p", "4x4x4"), ...}``."""
    return {
        f"{generation}-{chips(shape) * CORES_IN_NAME[generation]}": (generation, shape)
        for generation, shapes in SHAPES.items()
        for shape in shapes
    }


def chips(shape: str) -> int:
    """How many chips ``4x4x8`` is."""
    return math.prod(map(int, shape.split("x")))


def read_name(name: str) -> tuple[str, str]:
    """Generation and shape of ``v5e:16x16``, ``v5e-256`` or Cloud's ``v5litepod-256``.

    Raises:
      UserError: no such slice; names the nearest.
    """
    short = names()
    given = name.strip().lower().replace("v5litepod", "v5e")
    if given in short:
        return short[given]
    generation, _, shape = given.partition(":")
    if shape in SHAPES.get(generation, ()):
        return generation, shape
    whole_cubes = re.fullmatch(r"\d+x\d+x\d+", shape) and all(int(n) and int(n) % 4 == 0 for n in shape.split("x"))
    if generation == "v5p" and whole_cubes and chips(shape) <= chips("16x16x24"):
        return generation, shape
    raise UserError(f"unknown topology {name!r}; {_nearest(given)}")


def _nearest(given: str) -> str:
    """Ends the error line: of a known generation the slice with the nearest number of chips, else the likest name."""
    generation, separator, size = re.fullmatch(r"([^:-]*)([:-]?)(.*)", given, re.DOTALL).groups()
    if generation not in SHAPES:
        return nearest(given, [f"{known}:{shapes[-1]}" for known, shapes in SHAPES.items()] + list(names()))
    if separator == ":":
        valid = {f"{generation}:{shape}": chips(shape) for shape in SHAPES[generation]}
    else:
        valid = {short: int(short.partition("-")[2]) for short in names() if short.startswith(f"{generation}-")}
    listing = f"valid: {', '.join(valid)}"
    if re.fullmatch(r"\d+(x\d+)*", size):
        wanted = max(chips(size), 0.5)
        close = min(valid, key=lambda known: abs(math.log(valid[known] / wanted)))
        return f"did you mean {close!r}? ({listing})"
    return listing


def tpu(name: str, slices: int = 1) -> Topology:
    """Describes slices of TPU chips through the TPU compiler.

    Raises:
      UserError: the name or the number of slices cannot be, or libtpu is not installed.
    """
    generation, shape = read_name(name)
    if slices < 1:
        raise UserError(f"--slices is {slices}; expected at least 1")
    count = chips(shape)
    note = ""
    if CORES_IN_NAME[generation] > 1 and "-" in name:
        note = f"{name} counts TensorCores, {CORES_IN_NAME[generation]} to a chip: {count} chips, {shape}"
    devices = _describe(f"{generation}:{shape}", slices, single=count == 1)
    axes = tuple(map(int, shape.split("x")))
    each = f"{generation}:{shape}"
    total = f"{count * slices} chip{'s' if count * slices > 1 else ''}"
    whole = f"{slices} x {each} ({total})" if slices > 1 else f"{each} ({total})"
    return Topology(whole, tuple(devices), chip_of(devices[0]), axes, slices, note)


def simulated(count: int) -> Topology:
    """CPU devices of this machine.

    Raises:
      UserError: the process was started with another number of them.
    """
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--devices is {count}; this process has {len(devices)} CPU devices")
    return Topology(f"{count} simulated CPU devices", tuple(devices[:count]), None, (), 1)


def _describe(layout: str, slices: int, *, single: bool) -> list[Any]:
    # Or libtpu looks for the metadata server of a TPU machine, and warns that there is none.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", layout.replace(":", "-"))
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Its lock is for hardware; compiling shares nothing.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("planning for a TPU needs its compiler, libtpu; pip install 'sslx[plan]'") from None
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if single:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices
    except Exception as error:  # the compiler's own errors have no common class
        raise UserError(f"the TPU compiler does not describe {layout}: {first_line(error)}") from error

"""The most expensive operations of a step, from jax's profiler.

In: steps to trace, and the compiled step's HLO text. Out: operations by the time that the devices spend on them, with
where in the model and in the source they come from. The trace itself is for TensorBoard's profile tab or Perfetto.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
from jax.profiler import ProfileData

from sslx.errors import UserError
from sslx.planning import hlo
from sslx.runtime import display
from sslx.train.origin import LIBRARIES, module_of

NAME = re.compile(r"%?([\w.\-]+)")
PRODUCTS = ("dot", "convolution")
STRUCTURE = (
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "rematted_computation",
)  # parts of a path, no modules
DEVICE_LINES = ("XLA Ops",)  # of a TPU's plane; its other lines say the same once more, by module or by step


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the compiled step, or several of one place: the same product of all layers, say.

    Attributes:
      name: In the compiled program, such as ``fusion.12``; of several, the most expensive one's.
      count: How many they are.
      opcode: What it is, such as ``fusion`` or ``convolution``.
      seconds: Spent in one step, over all devices and threads.
      share: Of the time of all operations.
      origin: The module and the jax primitive, ``encoder/attention: dot_general (backward)``, or "".
      place: ``file.py:12``, or "".
    """

    name: str
    count: int
    opcode: str
    seconds: float
    share: float
    origin: str
    place: str


def trace(run: Callable[[], None], folder: Path) -> Path:
    """Traces ``run()`` into a folder, whole or not at all; returns the file that `operations` reads.

    Raises:
      UserError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="sslx-bench-") as made:
        with jax.profiler.trace(made):
            run()
        try:
            shutil.copytree(made, folder, dirs_exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
        (file,) = Path(made).rglob("*.xplane.pb")
        return folder / file.relative_to(made)


def operations(file: Path, text: str, steps: int) -> list[Operation]:
    """The operations of a traced step, the most expensive first; those of one module, primitive, pass and line are one.

    Of what XLA has made without saying where from, those that it has named alike are one.

    Args:
      file: What `trace` returned.
      text: HLO of the compiled step.
      steps: How many of them were traced.
    """
    module, places = hlo.parse(text), source_lines(text)
    known = {name: found for one in module.computations.values() for name, found in one.instructions.items()}
    spent = times(ProfileData.from_file(str(file)), known)
    whole = sum(spent.values())
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(spent, key=lambda name: -spent[name]):
        said = _telling(module, known[name]).attributes
        frame = re.search(r"stack_frame_id=(\d+)", said)
        origin, place = _origin(said), places.get(int(frame.group(1)), "") if frame else ""
        alike.setdefault((origin, place, "" if origin else name.partition(".")[0]), []).append(name)
    found = []
    for (origin, place, _), names in alike.items():
        seconds, opcode = sum(spent[name] for name in names), known[names[0]].opcode
        found.append(Operation(names[0], len(names), opcode, seconds / steps, seconds / whole, origin, place))
    return sorted(found, key=lambda one: -one.seconds)


def times(profile: ProfileData, known: Mapping[str, object]) -> dict[str, float]:
    """Seconds by operation, each without what ran inside it: a loop without its body.

    On a CPU the operations are among the events of its threads, on accelerators on lines of the device's plane.
    """
    spent: dict[str, float] = {}
    for plane in profile.planes:
        on_device = plane.name.startswith("/device:")
        lines = list(plane.lines)
        if on_device and any(line.name in DEVICE_LINES for line in lines):
            lines = [line for line in lines if line.name in DEVICE_LINES]
        for line in lines:
            events = []
            for event in line.events:
                name = _operation(event, on_device)
                if name in known:
                    events.append((event.start_ns, event.start_ns + event.duration_ns, name))
            for name, seconds in own_times(events):
                spent[name] = spent.get(name, 0.0) + seconds
    return spent


def own_times(events: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """Seconds of each event of one thread, less those of the events inside it; times are in nanoseconds."""
    found: list[list] = []
    around: list[tuple[float, int]] = []  # (end, index) of what the next event may lie in
    for begin, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while around and around[-1][0] <= begin:
            around.pop()
        if around:
            found[around[-1][1]][1] -= (min(end, around[-1][0]) - begin) * 1e-9
        around.append((end, len(found)))
        found.append([name, (end - begin) * 1e-9])
    return [(name, max(seconds, 0.0)) for name, seconds in found]


def _operation(event: object, on_device: bool) -> str:
    name = next((value for key, value in event.stats if key == "hlo_op"), event.name if on_device else "")
    written = NAME.match(str(name))  # a TPU writes the whole instruction
    return written.group(1) if written else ""


def _telling(module: hlo.Module, instruction: hlo.Instruction) -> hlo.Instruction:
    """What tells most of where an instruction comes from: of a fusion its product, as XLA names it after its end."""
    inside = module.computations.get(instruction.called("calls") or "")
    products = [one for one in inside.instructions.values() if one.opcode in PRODUCTS] if inside else []
    return products[-1] if products else instruction


def _origin(attributes: str) -> str:
    said = re.search(r'op_name="([^"]*)"', attributes)
    if not said:
        return ""
    path, _, primitive = re.sub(r"^(jit\([^/]*\)/)+", "", said.group(1)).rpartition("/")
    module = "/".join(part for part in module_of(path).split("/") if part and part not in STRUCTURE)
    return f"{module or '-'}: {primitive}" + (" (backward)" if "transpose(" in path else "")


def source_lines(text: str) -> dict[int, str]:
    """``file.py:12`` by the number of a stack frame in a module's tables: its innermost line that is no library's.

    The tables count from 1, but a frame's parent is written as its number plus 1, 1 for none.
    """
    tables: dict[str, dict[int, str]] = {}
    for name, body in re.findall(r"^(\w+)\n((?:\d+ .*\n)+)", text, re.MULTILINE):
        tables[name] = {int(number): said for number, _, said in (line.partition(" ") for line in body.splitlines())}

    def number(said: str, key: str) -> int:
        found = re.search(rf"\b{key}=(\d+)", said)
        return int(found.group(1)) if found else 0

    files, spots, frames = (tables.get(name, {}) for name in ("FileNames", "FileLocations", "StackFrames"))
    found = {}
    for first in frames:
        frame = first
        while frame in frames:
            spot = spots.get(number(frames[frame], "file_location_id"), "")
            file = files.get(number(spot, "file_name_id"), "").strip('"')
            if file and not LIBRARIES.search(file):
                found[first] = f"{display(file)}:{number(spot, 'line')}"
                break
            frame, before = number(frames[frame], "parent_frame_id") - 1, frame
            if frame >= before:  # a parent has been numbered before its child
                break
    return found

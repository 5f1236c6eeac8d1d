"""Seconds of a step from what it counts and what the chips can do at best (roofline, doi 10.1145/1498765.1498785).

In: counts per chip (FLOPs, HBM bytes, collectives) and a `Topology`. Out: a `Roofline`. Its rates are optimistic:
matrix products at the published bf16 peak, memory and links at their published rates, no latency, nothing for vector
work. The HBM bytes are an estimate that may be off either way, and times bound by them with it. ``overlapped`` takes
the slowest of the four resources, as if all ran at the same time; ``serial`` adds them up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sslx.planning.topology import Topology
from sslx.planning.traffic import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource needs for one step, and model FLOPs per chip and second at its peak."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    model: float  # seconds that the model's own FLOPs take at peak: MFU is this over the step's time

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by resource."""
        return {"compute": self.compute, "hbm": self.hbm, "ici": self.ici, "dcn": self.dcn}

    @property
    def bound(self) -> str:
        """The slowest resource."""
        return max(self.parts, key=self.parts.get)

    @property
    def overlapped(self) -> float:
        """Seconds of a step that hides everything behind its slowest resource."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """Seconds of a step that overlaps nothing."""
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation of the overlapped step."""
        return self.model / self.overlapped

    @property
    def serial_mfu(self) -> float:
        """Model FLOP utilisation of the serial step."""
        return self.model / self.serial


def estimate(
    topology: Topology,
    order: Sequence,
    *,
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    collectives: Sequence[Collective],
) -> Roofline:
    """Times one step.

    Args:
      topology: The chips; they must have published numbers.
      order: Its devices in the order of the mesh, which collectives number them by.
      model_flops: FLOPs of the model for one step, all chips together, no recomputation.
      executed_flops: FLOPs of all matrix products of one step, all chips together, evenly split.
      hbm_bytes: Bytes that one chip reads and writes.
      collectives: What the compiled step sends.
    """
    chip = topology.chip
    peak = chip.flops * len(order)
    return Roofline(
        compute=executed_flops / peak,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        ici=sum(one.ici_sent / ici_bandwidth(topology, order, one) for one in collectives if one.ici_sent),
        dcn=sum(one.dcn_sent for one in collectives) / chip.network.dcn_bandwidth,
        model=model_flops / peak,
    )


def ici_bandwidth(topology: Topology, order: Sequence, collective: Collective) -> float:
    """Bytes a second that one chip sends to its group inside the slice.

    Along each axis of the torus that the group spans: both links if the chips there form a ring, else one, since the
    ends of a line wait for its middle. A group that takes every n-th chip shares these links with the n - 1 groups
    between its chips, which send at the same time. A permute uses one link.
    """
    link = topology.chip.network.link_bandwidth
    if collective.kind == "collective-permute":
        return link
    coordinates = [order[member].coords for member in collective.members] or [device.coords for device in order]
    links = 0.0
    for axis, size in enumerate(topology.shape):
        places = sorted({place[axis] for place in coordinates})
        if len(places) > 1:
            apart = (places[-1] - places[0]) / (len(places) - 1)
            links += (2 if len(places) * apart == size and topology.wraps(axis) else 1) / apart
    return link * (links or 1.0)

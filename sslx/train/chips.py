"""What accelerators can do at best, in one table: MFU is measured against it, and ``sslx.plan`` predicts from it."""

from __future__ import annotations

import dataclasses
import glob
import re

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Network:
    """How the chips of one slice, and the slices, are connected.

    Attributes:
      dimensions: Axes of the torus or mesh of chips; a chip has two links along each.
      link_bandwidth: Bytes a second over one link in one direction.
      dcn_bandwidth: Bytes a second that one chip's share of its host can send over the data-centre network.
    """

    dimensions: int
    link_bandwidth: float
    dcn_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published numbers of one kind of JAX device: a chip, or a core of TPU v2 and v3.

    Attributes:
      flops: Dense bf16 FLOP/s.
      hbm_bytes: Size of its memory; None where no plan is made for it.
      hbm_bandwidth: Bytes a second between memory and chip.
      network: Its links; None where no plan is made for it.
      source: Where the numbers are published.
    """

    flops: float
    hbm_bytes: int | None = None
    hbm_bandwidth: float | None = None
    network: Network | None = None
    source: str = ""


# The TPU compiler names this chip with its letter, the chip itself without.
_V5P = Chip(459e12, 95 * GIB, 2765e9, Network(3, 1200e9 / 6 / 2, 50e9 / 8), "cloud.google.com/tpu/docs/v5p")

# By words of a device's ``device_kind``; the first that matches counts. A link's rate is the published bidirectional
# rate of a chip over its links and both directions; a chip's share of the data-centre network is the published rate
# of a chip (v5p) or of a pod over its 256 chips (v5e, v6e).
CHIPS = {
    "TPU v6 lite": Chip(
        918e12,
        32 * GIB,
        1600e9,
        Network(2, 800e9 / 4 / 2, 25.6e12 / 8 / 256),
        "cloud.google.com/tpu/docs/v6e",
    ),
    "TPU v5p": _V5P,
    "TPU v5 lite": Chip(
        197e12,
        16 * GIB,
        819e9,
        Network(2, 400e9 / 4 / 2, 6.4e12 / 8 / 256),
        "cloud.google.com/tpu/docs/v5e",
    ),
    "TPU v5": _V5P,
    "TPU v4": Chip(275e12, source="cloud.google.com/tpu/docs/v4"),
    "TPU v3": Chip(61.5e12, source="cloud.google.com/tpu/docs/v3"),
    "TPU v2": Chip(22.5e12, source="cloud.google.com/tpu/docs/v2"),
    "H200": Chip(989e12, source="NVIDIA H200 data sheet, without sparsity"),
    "H100 PCIe": Chip(756e12, source="NVIDIA H100 data sheet (PCIe), without sparsity"),
    "H100 NVL": Chip(835e12, source="NVIDIA H100 data sheet (NVL), without sparsity"),
    "H100": Chip(989e12, source="NVIDIA H100 data sheet (SXM), without sparsity"),
    "A100": Chip(312e12, source="NVIDIA A100 data sheet, without sparsity"),
    "L4": Chip(121e12, source="NVIDIA L4 data sheet, without sparsity"),
    "T4": Chip(65e12, source="NVIDIA T4 data sheet (fp16)"),
    "V100": Chip(125e12, source="NVIDIA V100 data sheet (fp16)"),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is published of a device, or None (a CPU)."""
    kind = device.device_kind
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", kind)), None)


def peak_flops(device: jax.Device) -> float | None:
    """Peak bf16 FLOP/s of a device, or None where none is published (a CPU)."""
    chip = chip_of(device)
    return chip.flops if chip else None


def tpu_device_files() -> list[str]:
    """The files by which this machine's kernel offers TPU chips; [] where there are none."""
    return glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")

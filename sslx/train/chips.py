"""Published peak arithmetic of accelerators, one table; MFU is measured against it."""

from __future__ import annotations

import re

import jax

# Dense bf16 FLOP/s of one JAX device (a core of TPU v2 and v3, else a chip), by words of its ``device_kind``; the first
# that matches counts.
# Sources: Google Cloud TPU system architecture pages; NVIDIA data sheets (dense, without sparsity).
PEAK_BF16_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bf16 FLOP/s of a device, or None where none is published (a CPU)."""
    kind = device.device_kind
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{name}\b", kind)), None)

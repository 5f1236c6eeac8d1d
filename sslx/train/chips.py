"""Published peak arithmetic of accelerators, one table; MFU is measured against it."""

from __future__ import annotations

import jax

# Dense bf16 FLOP/s of one chip, by a part of jax's ``device_kind``; the first that matches counts.
# Sources: Google Cloud TPU system architecture pages; NVIDIA data sheets (dense, without sparsity).
PEAK_BF16_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
    "TPU v2": 45e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bf16 FLOP/s of a device, or None where none is published (a CPU)."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device.device_kind), None)

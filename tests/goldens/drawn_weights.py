"""Weights that are drawn from their names, so that a golden need hold no more than what was computed with them."""

from __future__ import annotations

import zlib

import numpy as np


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32[shape] of a name and shape as PyTorch has them: kernels, scales near 1, biases near 0, variances."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        return np.float32(normal * (2.0 / np.prod(shape[1:])) ** 0.5)
    if name.endswith("running_var"):
        return np.float32(np.exp(0.3 * normal))
    return np.float32((1.0 if name.endswith(("weight", "gamma")) else 0.0) + 0.3 * normal)


def drawn_images(rows: int, size: int, channels: int) -> np.ndarray:
    """float32[rows, size, size, channels] in [0, 1]."""
    return np.random.default_rng(0).uniform(size=(rows, size, size, channels)).astype(np.float32)

"""Convolutions of a ResNet on CPU, with and without what `sslx.compiler` asks XLA for.

    python tests/benchmarks/convolutions.py

3 x 3 kernels of ResNet-18's stages on pictures of 32 pixels, 128 of them: rates of the forward pass and of the
gradients by input and by kernel, by XLA's own choice and by ours, in GFLOP/s of useful arithmetic, the best of
``--repeats``. Under a minute on two cores; use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sslx.compiler import compiler_options
from sslx.runtime import configure, describe_devices

ROWS = 128
LAYERS = ((32, 3, 64, 1), (32, 64, 64, 1), (32, 64, 128, 2), (16, 128, 128, 1), (8, 256, 256, 1), (4, 512, 512, 1))


def convolve(stride: int, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """What ``nn.Conv`` computes."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def passes(stride: int) -> dict[str, Callable[..., Any]]:
    """Functions of image, kernel and the gradient of what comes out."""
    forward = functools.partial(convolve, stride)
    return {
        "forward": lambda image, kernel, out: forward(image, kernel),
        "by input": lambda image, kernel, out: jax.vjp(lambda image: forward(image, kernel), image)[1](out),
        "by kernel": lambda image, kernel, out: jax.vjp(lambda kernel: forward(image, kernel), kernel)[1](out),
    }


def best(function: Callable[..., Any], arguments: tuple, options: dict[str, Any], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    jitted = jax.jit(function, compiler_options=options)
    jax.block_until_ready(jitted(*arguments))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> None:
    """Prints a line for each layer and pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    configure()
    print(f"{describe_devices()}, jax {jax.__version__}; ours: {compiler_options(jax.default_backend())}")
    draw = np.random.default_rng(0)
    for side, inputs, outputs, stride in LAYERS:
        shapes = (ROWS, side, side, inputs), (3, 3, inputs, outputs), (ROWS, side // stride, side // stride, outputs)
        arrays = tuple(jax.device_put(draw.normal(size=shape).astype(np.float32)) for shape in shapes)
        flops = 2 * ROWS * (side // stride) ** 2 * 9 * inputs * outputs
        for name, function in passes(stride).items():
            rates = [
                flops / best(function, arrays, options, repeats) / 1e9
                for options in ({}, compiler_options(jax.default_backend()))
            ]
            layer = f"{side} x {side}, {inputs} to {outputs}, stride {stride}"
            print(f"{layer:<34} {name:<10} {rates[0]:6.0f} {rates[1]:6.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main()

"""Each program that computes attention beside plain products: how far apart, and how long, by the length of a row.

  python tests/benchmarks/attention_kernels.py

For a GPU (cuDNN) or a TPU (splash attention); elsewhere it says what each kernel is missing. Forward and backward in
bfloat16, rows of packed documents and rows of one document, causal and not. The reference is computed in float32, on
the same bfloat16 numbers; the error of plain products in bfloat16 stands beside a kernel's, which should not be larger
by more than a small factor. Times are medians of at least ten runs, forward and backward together.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sslx.models.attention import attend
from sslx.models.attention_kernels import PLATFORMS, call_of, refused

TOKENS = 16_384  # of a batch, whatever the length of its rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape."""

    length: int
    heads: int
    head_width: int
    packed: bool
    causal: bool


def documents(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """int32[rows, length]: documents of a third of a row on average, and some padding at the end."""
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < length * 0.95:
            stop = min(length, start + int(rng.integers(length // 16, length * 5 // 8)))
            segments[row, start:stop], start, segment = segment, stop, segment + 1
    return segments


def step_of(case: Case, implementation: str, dtype: str) -> Callable:
    """Forward and backward of one program: the output and the gradients, float32."""

    def step(query, key, value, gradient, segments, places):
        ids, order = (segments, segments) if case.packed else (None, None), (places, places) if case.causal else None

        def out_of(*given):
            out = attend(*(one.astype(dtype) for one in given), *ids, order=order, implementation=implementation)
            return out.astype(jnp.float32)

        out, pull = jax.vjp(out_of, query, key, value)
        return out, pull(gradient)

    return jax.jit(step)


def measured(step: Callable, given: tuple, runs: int) -> tuple[list[np.ndarray], float]:
    """What a step gives, and the median of its seconds."""
    found = jax.block_until_ready(step(*given))
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(step(*given))
        seconds.append(time.perf_counter() - begin)
    return [np.asarray(one, np.float32) for one in jax.tree.leaves(found)], float(np.median(seconds))


def compare(case: Case, kernel: str, runs: int) -> str:
    """A line on one shape."""
    rng, rows = np.random.default_rng(0), max(1, TOKENS // case.length)
    shape = (rows, case.length, case.heads, case.head_width)
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    call = call_of(query, query, masked=case.packed, causal=case.causal, dropout=False)
    name = f"{case.length:>6} x {case.heads} x {case.head_width:<4} {'packed' if case.packed else 'whole ':<6}"
    name += " causal" if case.causal else "       "
    if reason := refused(kernel, call):
        return f"{name}  {kernel} {reason}"
    drawn = (rng.normal(0, 1, shape).astype(jnp.bfloat16).astype(np.float32) for _ in range(4))
    places = np.broadcast_to(np.arange(case.length, dtype=np.int32), shape[:2])
    given = jax.device_put((*drawn, documents(rng, rows, case.length), places))
    with jax.default_matmul_precision("highest"):
        exact, _ = measured(step_of(case, "xla", "float32"), given, 1)
    plain, plain_seconds = measured(step_of(case, "xla", "bfloat16"), given, runs)
    ours, seconds = measured(step_of(case, kernel, "bfloat16"), given, runs)

    def apart(found: list[np.ndarray]) -> list[float]:
        return [float(np.abs(one - right).max() / np.abs(right).max()) for one, right in zip(found, exact, strict=True)]

    errors = " ".join(f"{one:.1e}/{other:.1e}" for one, other in zip(apart(ours), apart(plain), strict=True))
    times = f"{seconds * 1e3:8.2f} ms, xla {plain_seconds * 1e3:8.2f} ms, ratio {plain_seconds / seconds:5.2f}"
    return f"{name}  {times}; largest error out, dq, dk, dv ({kernel}/xla): {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--head_widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--runs", type=int, default=20)
    given = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; batches of {TOKENS} tokens, bfloat16", flush=True)
    kernels = [kernel for kernel, platform in PLATFORMS.items() if platform == device.platform] or list(PLATFORMS)
    shapes = itertools.product(given.lengths, given.head_widths, (True, False), (False, True))
    for (length, width, packed, causal), kernel in itertools.product(shapes, kernels):
        print(compare(Case(length, given.heads, width, packed, causal), kernel, max(given.runs, 10)), flush=True)


if __name__ == "__main__":
    main()

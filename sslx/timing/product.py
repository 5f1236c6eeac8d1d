"""What the devices can do at a matrix product, measured: the rate that a step's arithmetic is a share of.

In: a mesh and a dtype. Out: FLOP/s of all devices together, each of which multiplies square matrices of its own, at the
precision that jax has for products in models.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sslx.train.sharding import one_per_device

# Long enough a product that starting it counts for nothing, short enough to be repeated.
SIZES = {"cpu": 1536, "gpu": 8192, "tpu": 8192}
CHAINED = {"cpu": 1, "gpu": 8, "tpu": 8}


class Product:
    """Products of square matrices, compiled for a mesh."""

    def __init__(self, mesh: Mesh, dtype: str):
        platform = mesh.devices.flat[0].platform
        self.size, self._chained, self.dtype = SIZES.get(platform, 4096), CHAINED.get(platform, 1), dtype
        sharding, size = one_per_device(mesh), self.size

        def draw() -> tuple[jax.Array, jax.Array]:
            keys = jax.random.split(jax.random.key(0))
            shape = (mesh.size * size, size)
            # The second keeps what it multiplies at its length, so that nothing overflows however many are chained.
            return tuple(jax.random.normal(key, shape, jnp.float32) * size**-0.5 for key in keys)

        def cast() -> tuple[jax.Array, jax.Array]:
            return jax.tree.map(lambda array: array.astype(dtype), draw())

        def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
            for _ in range(self._chained):
                x = jnp.dot(x, y)
            return x

        spec = sharding.spec
        each = jax.shard_map(multiply, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        self._multiply: Callable = jax.jit(each)
        self._draw = jax.jit(cast, out_shardings=sharding)
        self._flops = 2.0 * size**3 * self._chained * mesh.size

    def rates(self, count: int) -> list[float]:
        """FLOP/s of all devices, measured ``count`` times; the matrices are not kept, for a step needs the memory."""
        found, matrices = [], self._draw()
        jax.block_until_ready(self._multiply(*matrices))  # compiled, and warm
        for _ in range(count):
            begin = time.perf_counter()
            jax.block_until_ready(self._multiply(*matrices))
            found.append(self._flops / (time.perf_counter() - begin))
        return found

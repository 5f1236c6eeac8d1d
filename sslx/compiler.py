"""What XLA is asked for when it compiles a run's programs: one table, by platform.

What the user's ``XLA_FLAGS`` say as ``--NAME=VALUE`` goes first. An option that this XLA does not know is left out,
since they come and go with its releases.
"""

from __future__ import annotations

import functools
import os

import jax

OPTIONS: dict[str, dict[str, str | bool]] = {
    # Convolutions by Eigen, not by YNNPACK, whose list is products, convolutions and sums unless told otherwise, and
    # whose gradients by kernel are several times slower (tests/benchmarks/convolutions.py).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"},
    # Collectives beside arithmetic. On TPUs that is the compiler's own default.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


@functools.cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """The options for ``jax.jit(..., compiler_options=...)`` on ``cpu``, ``gpu`` or ``tpu``.

    For a platform that this process has no devices of, as when a pod is planned, there are none.
    """
    if platform not in OPTIONS or platform != jax.default_backend():
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    wanted = {name: value for name, value in OPTIONS[platform].items() if f"--{name}=" not in given}
    return {name: value for name, value in wanted.items() if _is_known(name, value)}


def _is_known(name: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # INVALID_ARGUMENT
        return False
    return True

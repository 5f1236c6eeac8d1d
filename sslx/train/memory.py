"""What to change when the devices run out of memory: the runtime says how many bytes were missing, and no more.

In: a run's config and mesh. Out: a block in which such an error becomes one line for who typed the config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from sslx.errors import UserError, first_line
from sslx.settings import RunConfig
from sslx.train.sharding import batch_shards

REMAT = ("none", "dots", "full")  # from the least recomputation to the least memory


def exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device, or the compiler for it, has too little memory; hosts' messages have limits of the same name."""
    text = str(error)
    return "Ran out of memory" in text or ("RESOURCE_EXHAUSTED" in text and ("emory" in text or "lloc" in text))


@contextlib.contextmanager
def explained(config: RunConfig, model: Mapping[str, Any], mesh: Mesh) -> Iterator[None]:
    """Tells what to change when the block runs out of device memory.

    Args:
      config: The run's.
      model: ``config.model`` as written, which may have ``remat``.
      mesh: Where it runs.

    Raises:
      UserError: it did.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise UserError(
            f"a device has too little memory ({first_line(error)}); what needs less: {_advice(config, model, mesh)}; "
            "for TPUs, python -m sslx.plan --search says which of them fits"
        ) from error


def _advice(config: RunConfig, model: Mapping[str, Any], mesh: Mesh) -> str:
    """The flags that would help this run, the cheapest first."""
    found = []
    parts = config.batch_size // batch_shards(mesh)  # rows of a device in a step
    more = next((count for count in range(config.micro_batches + 1, parts + 1) if parts % count == 0), None)
    if more is not None:
        found.append(f"--config.micro_batches={more}")
    if model.get("remat") in REMAT[:-1]:
        found.append(f"--config.model.remat={REMAT[REMAT.index(model['remat']) + 1]}")
    if mesh.shape["data"] > 1:
        found.append(f"--config.mesh.data=1 --config.mesh.fsdp={batch_shards(mesh)}")
    smaller = "a smaller --config.batch_size or model"
    return f"{', '.join(found)}, or {smaller}" if found else smaller

"""A trained model as StableHLO, which any runtime of it takes, through ``jax.export``; with the parameters inside.

In: an objective and its parameters. Out: ``features.stablehlo``, rows to vectors, and ``logits.stablehlo`` where there
is a head; for any number of rows, on CPU, GPU and TPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import export

from sslx.objective import Objective

PLATFORMS = ("cpu", "cuda", "tpu")
INPUTS = ("tokens", "segment_ids", "positions", "token_types", "image")  # of the arrays in a row, what a model reads


def write(
    objective: Objective, params: Any, state: Any, row: Mapping[str, jax.ShapeDtypeStruct], folder: Path
) -> dict[str, Any]:
    """Writes the functions of a model into a folder.

    Args:
      objective: What the model was trained for.
      params: Its parameters.
      state: Its state.
      row: Shapes of one row, as ``Objective.abstract`` gives them.
      folder: Where to; exists.

    Returns:
      For each file, its input and output as text.
    """
    (batch,) = export.symbolic_shape("batch")
    inputs = {
        name: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype) for name, leaf in row.items() if name in INPUTS
    }
    encoder = objective.encoder(params, state)
    functions = {
        "features": lambda rows: objective.encode(encoder, rows),
        "logits": lambda rows: objective.logits(params, state, rows),
    }
    written = {}
    for name, function in functions.items():
        if name == "logits" and jax.eval_shape(function, inputs) is None:
            continue
        with _without_places():
            exported = export.export(jax.jit(function), platforms=PLATFORMS)(inputs)
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        given = ", ".join(f"{key} {leaf.dtype}{list(leaf.shape)}" for key, leaf in inputs.items())
        written[f"{name}.stablehlo"] = f"{given} -> {exported.out_avals[0].str_short()}"
    return written


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Leaves out of what is lowered where its source lies, which are paths on this machine."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)

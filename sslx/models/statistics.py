"""Running averages of batch normalisation, which an objective keeps in its state as ``batch_stats``."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import PRNGKeyArray

from sslx.objective import Sum, Variables

NAME = "batch_stats"


def apply_with_statistics(
    module: nn.Module, params: Any, state: Any, batch: Any, key: PRNGKeyArray, *, train: bool, **further: Any
) -> tuple[Any, dict[str, Sum]]:
    """The module's output, and what `with_statistics` needs; a module without batch normalisation gives nothing.

    ``further`` are arguments of the module.
    """
    given = {"params": params, **({NAME: state[NAME]} if NAME in state else {})}
    options = dict(deterministic=not train, rngs={"dropout": key}, **further)
    if NAME not in state or not train:
        return module.apply(given, batch, **options), {}
    out, moved = module.apply(given, batch, mutable=[NAME], **options)
    return out, {NAME: Sum(moved[NAME])}


def with_statistics(state: Any, stats: dict[str, Any]) -> Any:
    """The state with the averages moved by an update."""
    return {**state, NAME: stats[NAME].value} if NAME in stats else state


def encoder_variables(params: Any, state: Any) -> Variables:
    """Parameters of the encoder, with its running averages if it has any."""
    averages = state.get(NAME, {})
    kept = {NAME: averages["encoder"]} if "encoder" in averages else {}
    return {"params": params["encoder"], **kept}

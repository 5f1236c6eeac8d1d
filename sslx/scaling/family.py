"""A one-parameter family of models: the width decides depth, heads, MLP width and learning rate.

In: a width and the base config. Out: the values of ``config.model`` and the learning rate, and what such a model costs,
counted on its own abstract parameters. Depth is ``width / aspect``: the loss hardly depends on the aspect ratio between
10 and 200 (Kaplan et al., arXiv 2001.08361, figure 5). The MLP keeps its multiple of the width, and with it what a gate
(GLU) makes of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sslx.errors import UserError, choose, nearest
from sslx.objective import Objective
from sslx.train.initialise import objective_class
from sslx.train.sharding import is_box

# Learning rate as a power of width / the base config's width.
RATE_RULES = {"constant": 0.0, "sqrt": -0.5, "inverse": -1.0}
# An array with one of these axes is a look-up table or the output over the vocabulary, which Kaplan et al. leave out.
TABLE_AXES = ("vocab", "length")
MODEL_KEYS = ("layers", "width", "heads", "mlp_width")


@dataclasses.dataclass(frozen=True)
class Family:
    """The rule from a width to a model."""

    aspect: float = 32.0  # width / layers
    head_width: int = 32
    rate_rule: str = "sqrt"

    def __post_init__(self):
        if not self.aspect > 0:
            raise UserError(f"--aspect is {self.aspect}; expected more than 0")
        if self.head_width < 1:
            raise UserError(f"--head_width is {self.head_width}; expected at least 1")
        choose(self.rate_rule, RATE_RULES, "--rate_rule")

    def model(self, width: int, base: Mapping[str, Any]) -> dict[str, int]:
        """The values of ``config.model`` that the width decides.

        Args:
          width: Width of the residual stream.
          base: ``config.model`` of the base config, which has the MLP's multiple.

        Raises:
          UserError: the width is no multiple of the head width, or the model has no such values.
        """
        check_base(base)
        if width < 1 or width % self.head_width:
            below = width // self.head_width * self.head_width
            around = [w for w in (below, below + self.head_width) if w > 0]
            near = "sizes are" if len(around) > 1 else "size is"
            raise UserError(
                f"size {width} is no multiple of --head_width={self.head_width}; "
                f"the nearest {near} {', '.join(map(str, around))}"
            )
        multiple = base["mlp_width"] / base["width"]
        return {
            "layers": max(1, round(width / self.aspect)),
            "width": width,
            "heads": width // self.head_width,
            "mlp_width": max(8, 8 * round(width * multiple / 8)),
        }

    def learning_rate(self, width: int, base_width: int, base_rate: float) -> float:
        """The peak learning rate: the config's at the config's width, scaled by the rule, to 4 digits."""
        return float(f"{base_rate * (width / base_width) ** RATE_RULES[self.rate_rule]:.4g}")

    def ladder(self, smallest: int, largest: int, ratio: float = 1.35) -> list[int]:
        """Widths of the family from ``smallest`` up to ``largest``, each at least ``ratio`` times the one before."""
        widths = [smallest]
        while widths[-1] < largest:
            step = math.ceil(widths[-1] * ratio / self.head_width) * self.head_width
            widths.append(max(step, widths[-1] + self.head_width))
        return widths


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the family and what it costs."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    total: int  # parameters, all of them; what is tied counts once
    non_embedding: int  # without tables over the vocabulary and over positions (Kaplan et al.)
    flops_per_token: float  # of training, from ``Objective.flops``

    def parameters(self, count: str) -> int:
        """N as ``count`` says: ``total`` or ``non_embedding``.

        The default is ``total``: the table is the output layer too, most of a small model's FLOPs are its, and counting
        without it bends the exponents of small studies (Pearce and Song, arXiv 2406.12907).
        """
        return self.total if count == "total" else self.non_embedding


def parse_sizes(text: str) -> list[int]:
    """Widths from ``32,64,96``, in rising order.

    Raises:
      UserError: not whole numbers, or one twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("no sizes given; expected widths, such as --sizes=64,96,128,192")
    for part in parts:
        if not part.isdecimal():
            raise UserError(f"unknown size {part!r} in --sizes={text}; expected widths, such as --sizes=64,96,128,192")
    widths = [int(part) for part in parts]
    if len(set(widths)) < len(widths):
        raise UserError(f"--sizes={text} has a size twice")
    return sorted(widths)


def check_base(base: Mapping[str, Any]) -> None:
    """Refuses a config whose model is no stack of transformer layers.

    Raises:
      UserError: ``config.model`` lacks layers, width, heads or mlp_width.
    """
    for key in MODEL_KEYS:
        if key not in base:
            raise UserError(f"config.model has no {key}, which sizes are made of; {nearest(key, base)}")


def measure(written: Mapping[str, Any], family: Family, widths: list[int]) -> tuple[list[Size], dict[str, Any]]:
    """Counts parameters and FLOPs of the family's members, without making one.

    Args:
      written: The base config as plain dicts.
      family: The rule.
      widths: Which members.

    Returns:
      The sizes; and of the data ``rows``, ``tokens_per_row`` (1 where rows have no tokens) and ``fingerprint``.

    Raises:
      UserError: a model or the data cannot be.
    """
    sizes, statistics = [], {}
    for width in widths:
        model = family.model(width, written["model"])
        config = {**written, "model": {**written["model"], **model}}
        objective, data = _prepare(config)
        statistics = _statistics(data)
        sample = data.train.fetch(np.zeros(1, np.int64)) | {"row": np.zeros(1, np.int32)}
        boxed = jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch)["params"], sample)  # noqa: B023
        total = tables = 0
        for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
            count = math.prod((leaf.value if is_box(leaf) else leaf).shape)
            total += count
            tables += count if any(axis in TABLE_AXES for axis in getattr(leaf, "names", ())) else 0
        shapes = {name: (written["batch_size"], *array.shape[1:]) for name, array in sample.items()}
        per_token = objective.flops(shapes) / (written["batch_size"] * statistics["tokens_per_row"])
        sizes.append(Size(**model, total=total, non_embedding=total - tables, flops_per_token=per_token))
    return sizes, statistics


def data_statistics(written: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure` returns of the data, without a model being counted."""
    return _statistics(_prepare(written)[1])


def _prepare(written: Mapping[str, Any]) -> tuple[Objective, Any]:
    return objective_class(written).prepare(written)


def _statistics(data: Any) -> dict[str, Any]:
    return {
        "rows": len(data.train),
        "tokens_per_row": float(data.statistics.get("tokens_per_row", 1.0)),
        "fingerprint": data.statistics.get("fingerprint", ""),
    }

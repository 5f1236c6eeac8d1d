"""The grid of a study: every size with every budget, each an ordinary run of its own length.

In: sizes, budgets and a base config. Out: rows with the values of the config that each changes, and ``study.json``,
which says what a folder's study is. Every row has a schedule as long as itself: a loss read in the middle of a longer
schedule is not what training to that point would have reached (Hoffmann et al., arXiv 2203.15556, section 3.1).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from etils.epath import Path

from sslx.config import differences
from sslx.errors import UserError
from sslx.scaling.family import Family, Size, data_statistics, measure, parse_sizes
from sslx.settings import may_change
from sslx.storage import write_text

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
LADDER = 4  # widths are counted up to this many times the largest, for what is said of larger budgets


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much a row trains."""

    amount: float
    unit: str  # tokens | flops

    def __str__(self) -> str:
        if self.unit == "flops":
            return f"{self.amount:g}flops".replace("e+", "e")
        return short(self.amount)


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of the study."""

    index: int
    name: str  # its folder
    size: Size
    budget: str
    held_out: bool  # not fitted, but compared with what the fit predicts
    steps: int
    warmup_steps: int
    learning_rate: float
    tokens: float  # D, seen in training, repetitions included
    flops: float  # C
    epochs: float

    def overrides(self) -> dict[str, Any]:
        """What the row changes in the base config, by dotted key."""
        model = {f"model.{key}": getattr(self.size, key) for key in ("layers", "width", "heads", "mlp_width")}
        return model | {
            "steps": self.steps,
            "optimizer.schedule_steps": self.steps,
            "optimizer.warmup_steps": self.warmup_steps,
            "optimizer.learning_rate": self.learning_rate,
            # The last step alone is evaluated, on all held-out rows; stopping early would be another budget.
            "eval.every_steps": self.steps,
            "eval.batches": None,
            "eval.patience": None,
        }


@dataclasses.dataclass(frozen=True)
class Asked:
    """What was asked for; another answer to this is another study."""

    sizes: list[int]
    budgets: list[Budget]
    held_out: list[tuple[int, Budget]]
    family: Family
    warmup_share: float

    def __post_init__(self):
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"--warmup_share is {self.warmup_share}; expected 0 or a share below 1")

    @classmethod
    def parse(cls, sizes: str, budgets: str, held_out: str, family: Family, warmup_share: float) -> Asked:
        """From the flags' texts.

        Raises:
          UserError: one of them is no list of sizes or budgets.
        """
        parsed = [parse_budget(part) for part in budgets.split(",") if part.strip()]
        if not parsed:
            raise UserError(
                "no budgets given; expected tokens, such as --budgets=250k,500k,1M, or FLOPs, such as 1e13flops"
            )
        if len({budget.unit for budget in parsed}) > 1:
            raise UserError(f"--budgets={budgets} mixes tokens and FLOPs; expected one of them")
        if len(set(parsed)) < len(parsed):
            raise UserError(f"--budgets={budgets} has a budget twice")
        parsed.sort(key=lambda budget: budget.amount)
        return cls(parse_sizes(sizes), parsed, parse_points(held_out, "held_out"), family, warmup_share)


@dataclasses.dataclass(frozen=True)
class Study:
    """A planned study."""

    rows: list[Row]
    ladder: list[Size]  # members of the family up to `LADDER` times the largest width
    statistics: dict[str, Any]  # of the data, see `measure`
    unit: str  # of the budgets

    @property
    def fitted(self) -> list[Row]:
        """The rows of the grid."""
        return [row for row in self.rows if not row.held_out]


def parse_budget(text: str) -> Budget:
    """``500k``, ``1.5M``, ``2e6`` (tokens) or ``1e13flops``.

    Raises:
      UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)([kmbgt]?)(tokens|flops?)?", text.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise UserError(
            f"unknown budget {text.strip()!r}; expected tokens, such as 500k or 1e9, or FLOPs, such as 1e13flops"
        )
    unit = "flops" if (match[3] or "").startswith("flop") else "tokens"
    return Budget(float(match[1]) * SUFFIXES[match[2]], unit)


def parse_points(text: str, flag: str) -> list[tuple[int, Budget]]:
    """Pairs ``SIZE:BUDGET``, separated by commas.

    Raises:
      UserError: one is no such pair.
    """
    points = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        size, given, budget = part.partition(":")
        if not given or not size.strip().isdecimal():
            raise UserError(f"--{flag}: {part!r} is no SIZE:BUDGET; expected one such as 256:4M")
        points.append((int(size), parse_budget(budget)))
    return points


def short(amount: float, digits: int = 4) -> str:
    """``1.5M`` for 1,500,000."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= unit:
            return f"{amount / unit:.{digits}g}{suffix}"
    return f"{amount:.{digits}g}"


def plan(asked: Asked, written: Mapping[str, Any]) -> Study:
    """Counts every size, and turns every budget into steps.

    Raises:
      UserError: a size, a budget or the base config cannot be.
    """
    grid = [(width, budget) for width in asked.sizes for budget in asked.budgets]
    points = [(*point, False) for point in grid] + [(*point, True) for point in asked.held_out]
    widths = sorted({width for width, _, _ in points})
    ladder = asked.family.ladder(widths[0], LADDER * widths[-1])
    sizes, statistics = measure(written, asked.family, sorted({*widths, *ladder}))
    by_width = {size.width: size for size in sizes}
    rows = [
        make_row(index, by_width[width], budget, held_out, asked, written, statistics)
        for index, (width, budget, held_out) in enumerate(points)
    ]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is in the grid and in --held_out; a held-out row is one that is not fitted")
    return Study(rows, sizes, statistics, asked.budgets[0].unit)


def make_row(
    index: int, size: Size, budget: Budget, held_out: bool, asked: Asked, written: Mapping[str, Any], statistics: dict
) -> Row:
    """One row; the budget is met to the nearest step.

    Raises:
      UserError: the budget is below one step, or too short for its warm-up.
    """
    tokens_per_step = written["batch_size"] * statistics["tokens_per_row"]
    per_step = tokens_per_step * (size.flops_per_token if budget.unit == "flops" else 1.0)
    steps, name = round(budget.amount / per_step), f"w{size.width}_{budget}"
    if steps < 1:
        raise UserError(
            f"budget {budget} is less than one batch at size {size.width} (config.batch_size={written['batch_size']}): "
            f"expected at least {_up(per_step, budget.unit)}"
        )
    warmup = round(asked.warmup_share * steps)
    if asked.warmup_share and (warmup < 1 or warmup >= steps):
        least = next(n for n in range(2, 10**6) if 1 <= round(asked.warmup_share * n) < n)
        raise UserError(
            f"budget {budget} is {steps} step{'s' * (steps > 1)} at size {size.width}, too few for a warm-up of "
            f"--warmup_share={asked.warmup_share}: expected {least} steps or more, {_up(least * per_step, budget.unit)}"
        )
    rate = asked.family.learning_rate(size.width, written["model"]["width"], written["optimizer"]["learning_rate"])
    tokens = steps * tokens_per_step
    return Row(
        index=index,
        name=name,
        size=size,
        budget=str(budget),
        held_out=held_out,
        steps=steps,
        warmup_steps=warmup,
        learning_rate=rate,
        tokens=tokens,
        flops=tokens * size.flops_per_token,
        epochs=steps * written["batch_size"] / statistics["rows"],
    )


def _up(amount: float, unit: str) -> str:
    """Rounded up to two digits, so that what is named is enough."""
    digits = 10 ** max(len(str(int(amount))) - 2, 0)
    return str(Budget(float(-(-amount // digits) * digits), unit))


def open_study(workdir: Path, asked: Asked, written: Mapping[str, Any], *, write: bool) -> Study:
    """The folder's study if it is the one asked for, else a new one.

    Args:
      workdir: The study's folder.
      asked: Sizes, budgets and rules.
      written: The base config.
      write: Whether a new study is written to ``study.json``.

    Raises:
      UserError: a size cannot be, the folder holds a run or another study, or the data has changed since then.
    """
    for width in (*asked.sizes, *(width for width, _ in asked.held_out)):
        asked.family.model(width, written["model"])  # what cannot be is told before what differs from an earlier study
    path = Path(workdir) / "study.json"
    if (Path(workdir) / "config.json").is_file():
        raise UserError(f"{workdir} is the folder of a run; give the study another --workdir")
    document = json.loads(json.dumps({"asked": dataclasses.asdict(asked), "config": written}))
    if path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf8"))
            study = _from_json(old)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
        _check_same(workdir, old, document, study.rows[0])
        if data_statistics(written)["fingerprint"] != study.statistics["fingerprint"]:
            raise UserError(
                f"the training data has changed since the study in {workdir} was planned (files, splits or package "
                "versions), so its rows could not be compared; restore the data or give another --workdir"
            )
        return study
    study = plan(asked, written)
    if write:
        write_text(path, json.dumps(document | dataclasses.asdict(study), indent=1) + "\n")
    return study


def _from_json(document: Mapping[str, Any]) -> Study:
    rows = [Row(**{**row, "size": Size(**row["size"])}) for row in document["rows"]]
    ladder = [Size(**size) for size in document["ladder"]]
    return Study(rows, ladder, document["statistics"], document["unit"])


def _check_same(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any], row: Row) -> None:
    changed = {f"--{key}": values for key, values in differences(old["asked"], new["asked"]).items()}
    for key, values in differences(old["config"], new["config"]).items():
        decided = key in row.overrides() and key not in ("optimizer.learning_rate", "model.width", "model.mlp_width")
        if not decided and not may_change(key):
            changed[f"config.{key}"] = values
    if changed:
        told = "; ".join(f"{key} was {_told(a)}, now {_told(b)}" for key, (a, b) in changed.items())
        raise UserError(f"{workdir} holds another study: {told}; give another --workdir")


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_told(item) for item in value) or "none"
    if isinstance(value, Mapping) and set(value) == {"amount", "unit"}:
        return str(Budget(**value))
    return str(value)

"""Labels: what records have as names of classes or as numbers, which can be classes at all, and those that a run keeps.

In a run's folder the names of its classes are ``labels.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslx.errors import UserError, quoted

if TYPE_CHECKING:
    from sslx.data.text import PreparedText, TextConfig

MANY = 20  # labels, from which on they are asked whether nearly every record has its own


def class_name(label: Any, where: Callable[[], str], field: str) -> str:
    """A label as the name of its class; 1 and 1.0 are the same.

    Raises:
      UserError: it is empty or holds several values; says ``where()``.
    """
    if label == "":
        raise UserError(f"{where()}: the field {field!r} is empty")
    if isinstance(label, float) and math.isnan(label):  # as pandas writes what is missing
        raise UserError(f"{where()}: the field {field!r} is empty (NaN)")
    if isinstance(label, list | dict):
        kind = "a list" if isinstance(label, list) else "an object"
        raise UserError(f"{where()}: the field {field!r} is {kind}; expected a label, a string or a number")
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def number_of(label: str, where: Callable[[], str]) -> float:
    """A label as the number that it is.

    Raises:
      UserError: it is none, or not finite; says ``where()``.
    """
    try:
        value = float(label)
    except ValueError:
        raise UserError(f"{where()}: label {quoted(label)} is no number") from None
    if not math.isfinite(value):
        raise UserError(f"{where()}: label {quoted(label)} is not finite")
    return value


def check_classes(data: PreparedText, config: TextConfig) -> None:
    """Refuses texts whose labels are no classes to learn: none or one, numbers, or what tells single records apart.

    Raises:
      UserError: these are such texts.
    """
    names, source = data.label_names, f"config.data.source {config.source!r}"
    if not names:
        raise UserError(
            f"{source} has no labels that are classes; "
            f"expected a column {config.label_field!r} (config.data.label_field)"
        )
    if len(names) < 2:
        raise UserError(f"{source} has one label, {quoted(names[0])}; expected at least 2")
    values = [_finite(name) for name in names]
    numbers = all(value is not None for value in values)
    file = f"configs/finetune/{'text_pairs' if config.pair_field else 'text_classification'}.py"
    regression = (
        "numbers are predicted by python -m sslx.finetune with the argument labels=number, "
        f"as in --config={file}:data=...,labels=number"
    )
    if numbers and not all(value.is_integer() for value in values):
        broken = next(name for name, value in zip(names, values, strict=True) if not value.is_integer())
        found = f"are numbers ({quoted(broken)} is one of {len(names):,}) and would each be a class"
        raise UserError(f"the labels of {source} {found}; {regression}")
    records = sum(data.statistics.get(f"{role}_documents", 0) for role in ("train", "eval", "test"))
    if len(names) >= MANY and 2 * len(names) > records:
        way = regression if numbers else "config.data.label_field names the field that they are read from"
        found = f"are {len(names):,} different ones in {records:,} records, and no classes"
        raise UserError(f"the labels of {source} {found}; {way}")


def _finite(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # "nan" and "infinity" are words too


def save_labels(folder: Path, label_names: Sequence[str] | None) -> None:
    """Writes ``folder/labels.json`` if there are labels."""
    if label_names:
        (Path(folder) / "labels.json").write_text(json.dumps(label_names) + "\n", encoding="utf8")


def saved_labels(run: Path) -> tuple[str, ...]:
    """The label names that `save_labels` has written into a run's folder.

    Raises:
      UserError: there are none.
    """
    file = Path(run) / "labels.json"
    if not file.is_file():
        raise UserError(f"{run} has no labels.json; expected the folder of a run that was trained on labels")
    return tuple(json.loads(file.read_text(encoding="utf8")))

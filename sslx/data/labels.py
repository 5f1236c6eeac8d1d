"""Labels: what records have as names of classes or as numbers, and the names that a run keeps in ``labels.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslx.errors import UserError, quoted


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

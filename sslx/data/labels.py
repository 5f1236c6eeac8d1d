"""The names of classes, as a run keeps them: ``labels.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sslx.errors import UserError


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

"""Pictures as a run takes them, whatever a row is of: classes, boxes or masks.

In: a config, an opened collection, and what makes the rows of one slice. Out: `PreparedPictures`: the rows of each
role, and the statistics that a run is told of and recognised by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslx.data.cache import hash_of
from sslx.data.labels import save_labels
from sslx.data.sources import Collection, Source
from sslx.data.text import role_splits
from sslx.errors import UserError


@dataclass(frozen=True)
class PictureSource:
    """What every ``config.data`` on pictures says."""

    source: str = ""
    train_split: str = "train"  # TFDS slices, also for files and folders
    eval_split: str = "validation"
    test_split: str = ""  # "" = none
    broken_share: float = 0.01  # of the pictures may be undecodable
    cache_dir: str = ""  # "" = $SSLX_CACHE or ~/.cache/sslx

    def __post_init__(self):
        if not 0 <= self.broken_share < 1:
            raise UserError(f"config.data.broken_share is {self.broken_share}; expected 0 or a share below 1")


def check_shape(image_size: int, channels: int) -> None:
    """Refuses a shape that rows cannot have.

    Raises:
      UserError: it is none.
    """
    if image_size < 1:
        raise UserError(f"config.data.image_size is {image_size}; expected at least 1")
    if channels not in (1, 3):
        raise UserError(f"config.data.channels is {channels}; expected 3 (RGB) or 1 (grey)")


@dataclass(frozen=True, eq=False)
class PreparedPictures:
    """Rows of each role.

    ``statistics`` has the splits used, the rows of each role, what was found in it and left out, ``unread_splits``
    (names of those that no role reads) and ``fingerprint`` (of all data).
    """

    train: Any
    eval: Any
    test: Any | None
    label_names: tuple[str, ...] | None
    statistics: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes ``folder/labels.json`` if there are labels."""
        save_labels(folder, self.label_names)


def prepare_roles(
    config: PictureSource,
    collection: Collection,
    rows_of: Callable[[str, Source], tuple[Any, dict[str, Any]]],
    kind: str,
    recipe: int,
    settings: Sequence[Any],
) -> PreparedPictures:
    """Prepares train, eval and, if asked for, test rows.

    Args:
      config: As it was written.
      collection: What it names.
      rows_of: Makes the rows of a role from its slice, and says by name what it found.
      kind: What the rows are of.
      recipe: A number that is raised whenever the same pictures would come out as other rows.
      settings: What else decides how rows look.

    Raises:
      UserError: whatever the splits do not allow, or ``rows_of``.
    """
    splits = role_splits(config, collection)
    collection.check_disjoint(splits)
    rows, statistics, content = {}, {"row_unit": "images"}, {}
    for role, split in splits.items():
        source = collection.slice(split)
        rows[role], found = rows_of(role, source)
        statistics |= {f"{role}_split": split, f"{role}_rows": len(rows[role])}
        statistics |= {f"{role}_{name}": value for name, value in found.items()}
        content[role] = source.fingerprint
    statistics["unread_splits"] = collection.unread(splits.values())
    statistics["fingerprint"] = hash_of(kind, recipe, content, *settings)
    return PreparedPictures(rows["train"], rows["eval"], rows.get("test"), collection.label_names, statistics)

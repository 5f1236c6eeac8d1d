"""A run is a folder: configs, versions, checkpoints, metrics, events, tokenizer, pictures.

Every entry takes the folder. This file reads and writes what is not a checkpoint and not a metric, and decides
whether a config may resume a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path as LocalPath
from typing import Any

import filelock
from etils.epath import Path

from sslx.config import differences
from sslx.errors import UserError, nearest
from sslx.settings import RunConfig, may_change
from sslx.storage import absolute, is_remote, write_text

PACKAGES = (
    "sslx",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "transformers",
    "numpy",
)


def read_config(run: Path, *, published: bool = False) -> dict[str, Any]:
    """The resolved config of a run.

    Args:
      run: Its folder.
      published: A folder of published weights would do as well.

    Raises:
      UserError: the folder is no run (names the one that it lies in, those in it or the nearest one beside it) or its
        config is damaged.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        expected = f"no run in {str(run)!r}: expected a folder with config.json and checkpoints"
        raise UserError("; ".join([expected, *_meant(Path(run), published)]))
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _meant(run: Path, published: bool) -> list[str]:
    """Ends an error line: the run around ``run/checkpoints/8``, ``run/config.json`` and the like, or those in a folder
    of runs, or those beside it; nothing where there are none."""
    for around in (run.parent, run.parent.parent):
        if run.name not in ("", ".", "..") and _usable(around, published):
            return [f"did you mean {str(around)!r}?"]
    for folder in (run, run.parent):
        whole = absolute(folder)
        inner = [file.parent for file in whole.glob("*/config.json")] if whole.is_dir() else []
        found = [str(folder / one.name) for one in inner if _usable(one, published)]
        if len(found) == 1 and folder == run:
            return [f"did you mean {found[0]!r}?"]
        if found:
            return [nearest("" if folder == run else str(run), found)]  # all that are in it are as near
    return []


def _usable(folder: Path, published: bool) -> bool:
    """Whether it has what a run is read for: one that has not saved yet has a config alone."""
    if not (folder / "config.json").is_file():
        return False
    return has_checkpoint(folder) or (published and any(folder.glob("*.safetensors")))


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    """Writes ``config.json`` and ``versions.json``."""
    write_text(Path(run) / "config.json", json.dumps(config, indent=2) + "\n")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    write_text(Path(run) / "versions.json", json.dumps(versions, indent=2) + "\n")


def write_splits(folder: LocalPath, statistics: Mapping[str, Any]) -> None:
    """Writes ``splits.json``: the split of each role as it is, which the config may leave to the data to decide."""
    roles = {role: statistics[f"{role}_split"] for role in ("train", "eval", "test") if f"{role}_split" in statistics}
    (folder / "splits.json").write_text(json.dumps(roles) + "\n", encoding="utf8")


def read_splits(run: Path) -> dict[str, str]:
    """What `write_splits` has written into a run; {} in one that is older."""
    file = Path(run) / "splits.json"
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}


def resolve(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config a run goes on with: checked against the folder's own, with the schedule's length written out.

    ``optimizer.schedule_steps`` of None means the steps the run was first started with, so that raising ``steps`` on a
    finished run does not stretch a schedule that has already been walked.

    Raises:
      UserError: it is a file, or holds a run that this config does not continue; names the differing keys.
    """
    if Path(run).is_file():
        raise UserError(f"--workdir={run} is a file, expected a folder")
    config = json.loads(json.dumps(config))
    path = Path(run) / "config.json"
    old = read_config(run) if path.is_file() and has_checkpoint(run) else None
    if old:
        old = _completed(old, json.loads(json.dumps(dataclasses.asdict(RunConfig()))), config)
    if config["optimizer"]["schedule_steps"] is None:
        config["optimizer"]["schedule_steps"] = old["optimizer"]["schedule_steps"] if old else config["steps"]
    if old:
        refused = {key: pair for key, pair in differences(old, config).items() if not _may_differ(key, *pair)}
        if refused:
            listing = "; ".join(f"config.{key}: {a!r} there, {b!r} now" for key, (a, b) in refused.items())
            raise UserError(
                f"{run} holds a run with another config ({listing}); give the same values or another --workdir"
            )
    return config


def _completed(old: Any, defaults: Any, new: Any) -> Any:
    """An older config with the fields that are younger than it.

    They have the default of the run's own groups; those of other groups, of which only their class knows it, have what
    stands now if that is nothing (0, False, ""), since what is added to a method is off unless it is asked for.
    """
    if not all(isinstance(of, Mapping) for of in (old, new)):
        return old
    defaults = defaults if isinstance(defaults, Mapping) else {}
    added = {key: defaults.get(key) if key in defaults else value for key, value in new.items() if key not in old}
    added = {key: value for key, value in added.items() if key in defaults or not value}
    return added | {key: _completed(value, defaults.get(key), new.get(key)) for key, value in old.items()}


def _may_differ(key: str, old: Any, new: Any) -> bool:
    """Whether a run may go on with another value; prepared rows may have moved, since their fingerprint is compared."""
    rows = key == "data.source" and all(str(value).startswith("rows:") for value in (old, new))
    return rows or may_change(key)


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder has something to resume from, damaged or not."""
    folder = Path(run) / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


TOKEN = ".token"  # a file that host 0 writes and the others look for


def check_shared(run: Path, token: str, patience: float = 30.0) -> None:
    """Checks that this host sees the run folder in which host 0 has written ``token``.

    Raises:
      UserError: it does not: the folder is on a disk of host 0's own.
    """
    deadline = time.monotonic() + patience  # network file systems show others' files late
    while not ((path := Path(run) / TOKEN).is_file() and path.read_text() == token):
        if time.monotonic() > deadline:
            raise UserError(
                f"cannot see the run folder {run} that host 0 has made; expected storage that all hosts share"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Creates the folder and holds it, so that no second process trains into it (object stores have no locks).

    Raises:
      UserError: another process holds it, or it cannot be created.
    """
    try:
        Path(run).mkdir(parents=True, exist_ok=True)
        if is_remote(run):
            yield
            return
        lock = filelock.FileLock(Path(run) / ".lock")
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"another process is training in {run}; stop it or give another --workdir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {run}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()

"""An embedded text dataset: the docstrings of the Python standard library and of the packages sslx depends on.

It needs no download and no network: what it reads is installed wherever sslx runs. It is a pretraining corpus (about
11 MB of technical English in 11,200 texts) and, through its labels (which package a docstring comes from), a
classification set to fine-tune on.

In: a cache folder. Out: a TFDS builder, written as ArrayRecord without TensorFlow, with features ``text`` (str) and
``label`` (class), and splits ``train``, ``validation`` and ``test``.

How it is made, in this order; each step is a function of the installed files alone, so two machines with the same
versions hold the same bytes:

1. Source files are parsed, never imported. One process does it in some 20 s, so there are no workers to start, which
   keeps it safe inside a process that already runs JAX's threads, under pytest, and in a script without a main guard.
2. Texts are cleaned, short ones dropped, and near-duplicates reduced to one (`near_duplicates`): packages copy one
   another's functions, and classes quote their parents. No text of one split has a twin in another.
3. Packages left with too few texts are dropped and large ones cut to a sample. Each package's texts are dealt to the
   splits in the order of their hash, so that every class is in every split in the same proportion. Inside a split the
   order is another part of that hash: any slice, such as ``train[:2000]``, is a random sample.

The text is the docstring alone: no path or qualified name goes before it, which would give the label away.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import absl.logging
import tensorflow_datasets as tfds

from sslx.data import near_duplicates
from sslx.data.cache import prepare_once
from sslx.errors import UserError

NAME = "python_docs"
# The layout of the records, for TFDS. What the records hold is told by `fingerprint`.
VERSION = "1.0.0"
# Raise this whenever the code below (or `near_duplicates`) would make other texts from the same packages.
_RECIPE = 1

FEATURES = ("text", "label")
SPLITS = {"train": 0.88, "validation": 0.04, "test": 0.08}
MIN_CHARACTERS = 200
# Below this a class would have fewer than 4 texts in validation and 8 in test, too few to score.
MIN_TEXTS_PER_LABEL = 100
# Above this SciPy alone would be a quarter of the corpus, and the largest class twenty times the smallest.
MAX_TEXTS_PER_LABEL = 1000
# Two texts are twins if this share of the shorter one's word 5-shingles is in the other; see `near_duplicates`. At 0.5
# some functions that jax took over from numpy, with the arguments' types rewritten, would stay beside the original.
CONTAINMENT = 0.4


class Package(NamedTuple):
    """Where one label's docstrings are: the distribution gives the version, the modules give the files."""

    distribution: str
    modules: tuple[str, ...]


# Only what installing sslx installs, directly or through its dependencies. A missing one is left out. In order of
# precedence for a text that two packages have word for word.
PACKAGES = {
    "numpy": Package("numpy", ("numpy",)),
    "scipy": Package("scipy", ("scipy",)),
    "scikit-learn": Package("scikit-learn", ("sklearn",)),
    "matplotlib": Package("matplotlib", ("matplotlib", "mpl_toolkits")),
    "jax": Package("jax", ("jax",)),
    "flax": Package("flax", ("flax",)),
    "optax": Package("optax", ("optax",)),
    "orbax": Package("orbax-checkpoint", ("orbax",)),
    "grain": Package("grain", ("grain",)),
    "treescope": Package("treescope", ("treescope",)),
    "transformers": Package("transformers", ("transformers",)),
    "huggingface_hub": Package("huggingface_hub", ("huggingface_hub",)),
    "tensorflow-datasets": Package("tensorflow-datasets", ("tensorflow_datasets",)),
    "absl": Package("absl-py", ("absl",)),
    "pillow": Package("pillow", ("PIL",)),
    "fonttools": Package("fonttools", ("fontTools",)),
    "pyparsing": Package("pyparsing", ("pyparsing",)),
    "narwhals": Package("narwhals", ("narwhals",)),
    "rich": Package("rich", ("rich",)),
    "fsspec": Package("fsspec", ("fsspec",)),
    "click": Package("click", ("click",)),
    "packaging": Package("packaging", ("packaging",)),
}
STANDARD_LIBRARY = "python"

# Other projects' code under a package's folder, code that is not documentation, and other packages inside the stdlib's.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "test_utils", "internal_test_util", "__pycache__"}
    | {"_vendor", "_vendored", "vendored", "externals", "extern", "_external", "third_party"}
    | {"site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
)
# Hundreds of folders, one a model or dataset, that repeat one another's docstrings or have none worth the time.
_SKIPPED_PATHS = frozenset({"transformers/models", "tensorflow_datasets/datasets", "scipy/_lib/array_api_compat"})
_TEST_FILE = re.compile(r"(^|_)(tests?|testing|conftest|testutils?)(_|\.py$)")
_TRAILING_BLANKS = re.compile(r"[^\S\n]+$", re.MULTILINE)
# Control characters other than the line feed, and halves of surrogate pairs, which UTF-8 cannot hold.
_NOT_TEXT = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def python_docs(cache_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """Returns the dataset's read-only builder; builds it under ``cache_dir`` the first time (30 s, 7 MB).

    ``python_docs(folder).as_data_source("train[:2000]")[0]`` is ``{"text": bytes, "label": int}``; the names of the
    labels are ``builder.info.features["label"].names``. Several processes may call it at once: one builds, the others
    wait.

    Raises:
      UserError: the folder cannot be written (read-only, full), or nothing to read is installed.
    """
    folder = prepare_once(Path(cache_dir) / NAME, fingerprint(), _build)
    with _quiet_tfds():
        return tfds.builder_from_directory(folder)


def fingerprint() -> str:
    """Returns 12 hex digits that change with whatever decides the content: recipe, Python, the packages' versions."""
    lines = [f"{NAME} {_RECIPE}", f"{platform.python_implementation()} {platform.python_version()}"]
    lines += [f"{label} {version}" for label, version in _versions().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    versions = {}
    for label, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[label] = importlib.metadata.version(package.distribution)
    return versions


# --- 1. Extraction ---------------------------------------------------------------------------------------------------


def extract() -> dict[str, str]:
    """Returns ``{text: label}`` of all installed packages: cleaned, at least `MIN_CHARACTERS` long, each text once."""
    found: dict[str, str] = {}
    with _no_garbage_collection(), warnings.catch_warnings():
        # Old escapes in others' sources ("\d") are not for our user to read.
        warnings.simplefilter("ignore")
        for label in (*PACKAGES, STANDARD_LIBRARY):
            for folder in _folders(label):
                for path in source_files(folder):
                    for raw in docstrings(path.read_bytes()):
                        # Cleaning only shortens a text, and most are too short as they are.
                        if len(raw) >= MIN_CHARACTERS and len(text := clean(raw)) >= MIN_CHARACTERS:
                            found.setdefault(text, label)
    return found


def docstrings(source: bytes) -> Iterator[str]:
    """Yields the raw docstrings in a source file, and the strings given to ``add_newdoc`` (numpy's docs of its C code).

    A file that does not parse (templates, other versions' syntax) yields nothing.
    """
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _docstrings_in(tree)


def clean(docstring: str) -> str:
    """Removes indentation, trailing blanks and control characters, and composes Unicode (NFC)."""
    text = _TRAILING_BLANKS.sub("", _NOT_TEXT.sub("", inspect.cleandoc(docstring)))
    return unicodedata.normalize("NFC", text).strip()


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """Walks statements only: `ast.walk` would visit every expression and take five times as long."""
    body = node.body
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.value.value
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                called = child.value.func
                if getattr(called, "attr", getattr(called, "id", "")).startswith("add_newdoc"):
                    strings = (part.value for part in ast.walk(child) if isinstance(part, ast.Constant))
                    yield from (string for string in strings if isinstance(string, str))
            elif hasattr(child, "body"):
                yield from _docstrings_in(child)


def _folders(label: str) -> list[Path]:
    """The installed folders of a label, found without importing anything; none if it is not installed."""
    if label == STANDARD_LIBRARY:
        return [Path(sysconfig.get_path("stdlib"))]
    folders = []
    for module in PACKAGES[label].modules:
        # ValueError: a module put into sys.modules by hand, without a spec.
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module)
            folders += [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return folders


def source_files(root: Path) -> Iterator[Path]:
    """The source files under a folder in sorted order; tests and other projects' copies left out."""
    for folder, children, files in os.walk(root):
        inside = Path(folder).relative_to(root.parent)
        children[:] = sorted(
            child for child in children if child not in _SKIPPED_FOLDERS and str(inside / child) not in _SKIPPED_PATHS
        )
        for name in sorted(files):
            if name.endswith(".py") and not _TEST_FILE.search(name):
                yield Path(folder, name)


# --- 2 and 3. Near-duplicates, labels, splits ------------------------------------------------------------------------


def documents() -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Returns the label names and, per split, the ``(text, label)`` records in the order of the dataset."""
    found = extract()
    # Sorted, so that nothing below sees the order of the files.
    texts = sorted(found)
    groups = near_duplicates.representatives(texts, containment=CONTAINMENT)
    kept = [texts[i] for i in sorted(set(groups.tolist()))]
    counts = Counter(found[text] for text in kept)
    names = sorted(label for label, count in counts.items() if count >= MIN_TEXTS_PER_LABEL)
    records = {split: [] for split in SPLITS}
    for label in names:
        dealt = deal(text for text in kept if found[text] == label)
        for split, members in dealt.items():
            records[split] += [(text, label) for text in members]
    # Another part of the hash than the one that dealt the splits, or the labels would come in waves.
    return names, {split: sorted(rows, key=lambda row: _digest(row[0])[16:]) for split, rows in records.items()}


def deal(texts: Iterable[str]) -> dict[str, list[str]]:
    """Deals one label's texts to the splits by the rank of their hash, in the proportions of `SPLITS`.

    Texts beyond the first `MAX_TEXTS_PER_LABEL` are left out, as if drawn at random.
    """
    ranked = sorted(texts, key=lambda text: _digest(text)[:16])[:MAX_TEXTS_PER_LABEL]
    dealt, begin, share = {}, 0, 0.0
    for split, proportion in SPLITS.items():
        share += proportion
        end = round(share * len(ranked))
        dealt[split], begin = ranked[begin:end], end
    return dealt


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


# --- Writing ---------------------------------------------------------------------------------------------------------


def _build(folder: Path) -> None:
    """Makes the dataset and writes it into an empty folder.

    Raises:
      OSError: writing failed.
      UserError: there is nothing to write.
    """
    names, records = documents()
    if not names:
        raise UserError(f"no package with {MIN_TEXTS_PER_LABEL} docstrings is installed: {NAME} would be empty")
    try:
        with _quiet_tfds():
            _write(folder, names, records)
    except RuntimeError as error:  # how ArrayRecord's C++ reports a full disk
        raise OSError(str(error)) from error


def _write(folder: Path, names: list[str], records: dict[str, list[tuple[str, str]]]) -> None:
    # Built by hand: a builder class would look for its README and tags in the package that defines it.
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
        ),
        description="Docstrings of the Python standard library and of the packages sslx depends on.",
        features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=names)}
        ),
        supervised_keys=FEATURES,
        metadata=tfds.core.MetadataDict(python=platform.python_version(), packages=_versions()),
    )
    # One shard a split: the largest is some 10 MB.
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2**31, file_format="array_record")
    writer.initialize_splits(list(records))
    for split, rows in records.items():
        writer.add_examples({split: [dict(zip(FEATURES, row, strict=True)) for row in rows]})
    writer.close_all()
    # Read the last records back before anyone relies on them: some file systems tell late that they are full.
    for split, rows in records.items():
        source = tfds.builder_from_directory(folder).as_data_source(split)
        if len(source) != len(rows) or source[len(rows) - 1]["text"].decode() != rows[-1][0]:
            raise OSError(f"split {split} does not read back")


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS tells every file it opens at INFO; at most warnings while we call it."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(min(verbosity, absl.logging.WARNING))
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of short-lived objects without cycles; collecting among them doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""A folder of published weights as a start: its config and tokenizer, and its tensors under our names.

In: a folder as transformers writes it: ``config.json`` with a ``model_type``, ``model.safetensors`` or shards of it
with an index, and the files of the tokenizer. Out: what starting a run takes from another run, too. Everything that can
be wrong is found from names and shapes, before any tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from sslx.config import build, load_class
from sslx.data.tokenizer import load_tokenizer, vocabulary
from sslx.errors import LISTED, UserError, first_line
from sslx.interop.architecture import Architecture, Sizes, Tensor, architecture, shapes_there, to_ours
from sslx.interop.preprocessor import pixel_statistics
from sslx.models import MODELS
from sslx.models.vit import VitConfig
from sslx.storage import local_copy

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` is one of transformers and not of a run."""
    return "model_type" in config


class PublishedFolder:
    """A folder of published weights whose architecture and tokenizer are known; no tensor has been read."""

    def __init__(self, folder: Path):
        self.folder = self.tokenizer = folder
        self._folder, self._name = _local(str(folder)), str(folder)
        raw = json.loads((self._folder / "config.json").read_text(encoding="utf8"))
        self.architecture: Architecture = architecture(raw["model_type"], f"{folder}/config.json")
        self._theirs = _complete(self._folder, self._name)
        written = self.architecture.model_from(self._theirs, f"{folder}/config.json")
        if self.architecture.model == VitConfig.name:
            written |= pixel_statistics(self._folder, self._name)
        model_class = load_class(self.architecture.model, MODELS, "model_type")
        self._built = build(model_class, written, f"{folder}/config.json, as config.model")
        self.model: dict[str, Any] = dataclasses.asdict(self._built)
        rows = self._theirs.get("vocab_size")
        self.vocab_size = _tokens(self._folder, self._name, rows) if rows is not None else 0

    @property
    def sizes(self) -> Sizes:
        """What the rules of the table need."""
        offset = self._theirs["pad_token_id"] + 1 if self.architecture.position_offset else 0
        built = self._built
        return Sizes(self.vocab_size, offset, getattr(built, "patch_size", 0), getattr(built, "channels", 0))

    def statistics(self) -> dict[str, Any]:
        """Running averages of batch normalisation: no architecture of the table has it."""
        return {}

    def check(self) -> None:
        """Looks at the names and shapes of the tensors.

        Raises:
          UserError: the encoder's are missing or of another shape; names each.
        """
        rows = self._theirs.get("vocab_size", 0)  # of the table, which may have more than there are tokens
        sizes = dataclasses.replace(self.sizes, vocab_size=rows)
        there = {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._tensors.items()}
        expected = shapes_there(self.architecture.encoder, encoder_shapes(self._built, rows), sizes)
        problems = []
        if missing := [name for name in expected if name not in there]:
            problems.append(f"missing: {listed(missing)}")
        reshaped = [
            f"{name} {list(there[name])} there, {list(shape)} expected"
            for name, shape in expected.items()
            if name in there and there[name] != shape
        ]
        if reshaped:
            problems.append(f"of another shape: {listed(reshaped)}")
        if problems:
            raise UserError(f"the weights in {self._name} are not those of its config.json; {'; '.join(problems)}")

    def params(self) -> dict[str, Any]:
        """``{"encoder": ...}`` and the parts of the heads that are there, as host arrays under our names.

        Raises:
          UserError: as `check`.
        """
        self.check()
        tables = {"encoder": self.architecture.encoder}
        for head in self.architecture.heads:
            tables |= {part: table for part, table in head.parts.items() if self._has(table)}
        wanted = encoder_shapes(self._built, self.vocab_size)
        found = {}
        for part, table in tables.items():
            names = wanted if part == "encoder" else [name for row in table for name in row.ours]
            flat = to_ours(table, self._read, names, self.model["layers"], self.sizes)
            found[part] = traverse_util.unflatten_dict(flat, sep="/")
        return found

    def unused(self) -> list[str]:
        """The tensors that the architecture does not know, or that are of a head which is not there as a whole."""
        heads = [table for head in self.architecture.heads for table in head.parts.values() if self._has(table)]
        layers = self.model["layers"]
        known = {name for table in (self.architecture.encoder, *heads) for row in table for name in row.names(layers)}
        known |= {name.format(layer) for name in self.architecture.copies for layer in range(layers)}
        return sorted(stored for name, (_, stored) in self._tensors.items() if name not in known)

    def _has(self, table: tuple[Tensor, ...]) -> bool:
        return all(row.theirs in self._tensors for row in table)

    def _read(self, name: str) -> np.ndarray:
        file, stored = self._tensors[name]
        return file.get_tensor(stored)

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[Any, str]]:
        """Where each tensor is, by the name that it has in a class with a head: its file, and its name there."""
        folder, found = self._folder, {}
        for file in _files(folder, self._name):
            try:
                opened = safe_open(folder / file, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self._name}/{file} cannot be read: {first_line(error)}") from None
            found |= {name: (opened, name) for name in opened.keys()}  # noqa: SIM118
        prefix = f"{self.architecture.prefix}."
        bare = not any(name.startswith(prefix) for name in found)  # saved from the class without a head

        def now(name: str) -> str:
            # The first BERTs were converted from TensorFlow, whose layer norms have a gamma and a beta.
            for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
                name = name.removesuffix(old) + new if name.endswith(old) else name
            return prefix + name if bare else name

        return {now(name): where for name, where in found.items()}


def encoder_shapes(model: Any, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's encoder by ``a/b/c`` name."""
    ids, row = jax.ShapeDtypeStruct((1, 1), jnp.int32), {}
    if isinstance(model, VitConfig):
        encoder, side = model.encoder(), model.image_size
        row = {"image": jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)}
    else:
        encoder, row = model.encoder(vocab_size), {"tokens": ids, "segment_ids": ids, "positions": ids}
    boxed = jax.eval_shape(lambda batch: encoder.init(jax.random.key(0), batch, deterministic=True), row)
    flat = traverse_util.flatten_dict(nn.meta.unbox(boxed["params"]), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


@functools.cache
def _local(folder: str) -> LocalPath:
    return local_copy(folder)


def _complete(folder: LocalPath, name: str) -> dict[str, Any]:
    """The config with the defaults of what it leaves out."""
    from transformers import AutoConfig

    try:
        with warnings.catch_warnings(action="ignore"):
            return AutoConfig.from_pretrained(str(folder)).to_dict()
    except Exception as error:  # transformers checks each field in its own way
        raise UserError(f"{name}/config.json is not right: {first_line(error)}") from None


def _tokens(folder: LocalPath, name: str, rows: int) -> int:
    """Tokens of the folder's tokenizer, each of which has a row in the embedding."""
    # Without any of these, transformers makes an empty tokenizer of the model's kind and says nothing.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{name} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)} beside the weights")
    try:
        tokenizer = load_tokenizer(str(folder.absolute()), None, vocab_size=0, lowercase=False, cache_dir="")
    except UserError as error:
        raise UserError(f"the tokenizer in {name} cannot be read: {error}") from None
    size = vocabulary(tokenizer).size
    if size > rows:
        beyond = [piece for piece, token in sorted(tokenizer.get_vocab().items(), key=lambda p: p[1]) if token >= rows]
        raise UserError(
            f"the tokenizer in {name} has {size} tokens and the embedding {rows} rows (vocab_size in config.json); "
            f"without a row: {listed(beyond)}"
        )
    return size


def _files(folder: LocalPath, name: str) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{name}/{INDEX} is damaged; expected a weight_map from tensors to files") from None
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise UserError(f"{name} lacks shards that its index names: {listed(missing)}")
        return files
    if not (folder / WEIGHTS).is_file():
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".safetensors", ".h5")]
        beside = f"; there is {listed(others)}" if others else ""
        raise UserError(f"no weights in {name}: expected {WEIGHTS}, or shards with {INDEX}{beside}")
    return [WEIGHTS]


def listed(names: list[str]) -> str:
    """The names, or the first of them and how many more there are."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

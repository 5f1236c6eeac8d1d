"""How an architecture's weights and config are called in transformers and here: a table, and what walks it.

A row of a table is a `Tensor`: our names, theirs, and the rule between the two arrays. Where their name has ``{}`` for
the number of the layer, ours is one stack over all layers. A rule is exact both ways, so weights that come in and go
out again are the same bits.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sslx.errors import UserError, choose
from sslx.interop import ARCHITECTURES
from sslx.models.layers import padded_vocabulary

# Ours to theirs; of two of theirs that are the same, the first is written.
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the rules need to know beside the array."""

    vocab_size: int = 0
    position_offset: int = 0  # rows of their position table in front of position 0
    patch: int = 0
    channels: int = 0


@dataclasses.dataclass(frozen=True)
class Rule:
    """The same numbers there and here, without the axis of layers."""

    to_theirs: Callable[[np.ndarray, Sizes], np.ndarray]
    to_ours: Callable[[np.ndarray, Sizes], np.ndarray]


def _pad_vocabulary(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    rows = padded_vocabulary(sizes.vocab_size)
    array = array[:rows]  # some tables have rows that no token uses
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def _add_positions(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return np.concatenate([np.zeros((sizes.position_offset, *array.shape[1:]), array.dtype), array])


def _to_convolution(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return array.reshape(sizes.patch, sizes.patch, sizes.channels, -1).transpose(3, 2, 0, 1)


def _from_convolution(array: np.ndarray, sizes: Sizes) -> np.ndarray:
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


RULES = {
    "same": Rule(lambda array, _: array, lambda array, _: array),
    "transposed": Rule(lambda array, _: array.T, lambda array, _: array.T),  # PyTorch's Linear is [out, in]
    "vocabulary": Rule(lambda array, sizes: array[: sizes.vocab_size], _pad_vocabulary),
    # RoBERTa counts positions from pad_id + 1; what is in the rows before, no token looks up.
    "positions": Rule(_add_positions, lambda array, sizes: array[sizes.position_offset :]),
    "patches": Rule(_to_convolution, _from_convolution),  # a convolution [width, channels, p, p]
    "batched": Rule(lambda array, _: array[None], lambda array, _: array[0]),  # an axis of length 1 in front
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a table. Of several names of ours, the arrays lie side by side in theirs, on the last axis."""

    ours: tuple[str, ...]
    theirs: str
    rule: str = "same"

    def names(self, layers: int) -> list[str]:
        """Their names, one a layer."""
        return [self.theirs.format(layer) for layer in range(layers)] if self.stacked else [self.theirs]

    @property
    def stacked(self) -> bool:
        """Whether ours has an axis of layers in front."""
        return "{}" in self.theirs


def one(ours: str, theirs: str, rule: str = "same") -> tuple[Tensor, ...]:
    """A single array."""
    return (Tensor((ours,), theirs, rule),)


def dense(ours: str, theirs: str) -> tuple[Tensor, ...]:
    """A dense layer; ``ours`` is "" where it is the whole part."""
    inside = f"{ours}/" if ours else ""
    return one(f"{inside}kernel", f"{theirs}.weight", "transposed") + one(f"{inside}bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Tensor, ...]:
    """A layer norm."""
    return one(f"{ours}/scale", f"{theirs}.weight") + one(f"{ours}/bias", f"{theirs}.bias")


@dataclasses.dataclass(frozen=True)
class Head:
    """A class of transformers with a head: the parts of our parameters beside the encoder, with a table for each."""

    name: str
    parts: Mapping[str, tuple[Tensor, ...]]
    activation: str | None = None  # what it computes whatever the config says; None: it follows the config
    reads: str = "rows"  # what its ``head`` is about, as `Objective.head_reads`

    def __str__(self) -> str:
        about = "" if self.reads == "rows" else f" of {self.reads}"
        return f"{self.name} {' and '.join(self.parts) or 'the encoder alone'}{about}"


def token_heads(kind: str) -> tuple[Head, ...]:
    """The two classes with one dense layer on every token, which all kinds of encoders have."""
    return (
        Head(f"{kind}ForTokenClassification", {"head": dense("", "classifier")}, reads="tokens"),
        Head(f"{kind}ForQuestionAnswering", {"head": dense("", "qa_outputs")}, reads="spans"),
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One ``model_type`` of transformers."""

    model_type: str
    model: str  # our name of it, in `sslx.models.MODELS`
    base: str  # the class without a head
    prefix: str  # of the encoder's tensors in the classes with one
    encoder: tuple[Tensor, ...]
    heads: tuple[Head, ...]
    fields: Mapping[str, str]  # config keys, theirs to ours
    fixed_theirs: Mapping[str, Any]  # what we compute, and they unless told otherwise; else it cannot come in
    fixed_ours: Mapping[str, Any]  # what they compute; anything else cannot go out
    repeated: Mapping[str, str] = dataclasses.field(default_factory=dict)  # keys of theirs, written as another one is
    position_offset: bool = False
    copies: tuple[str, ...] = ()  # names of theirs that tell nothing new: tied tables and numbers that can be counted
    left_out: frozenset[str] = frozenset()  # parts of our parameters that belong to training and not to the model
    example: str = "configs/bert_mlm.py:base and configs/gpt_clm.py:small"  # of what they have

    def model_from(self, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our ``config.model`` from their config.

        Raises:
          UserError: they compute something that we do not; names each key.
        """
        activation = next((key for key, theirs_ in self.fields.items() if theirs_ == "activation"), None)
        values = {ours: theirs[key] for key, ours in self.fields.items() if key in theirs}
        wrong = [
            f"{key}={theirs[key]!r} (expected {value!r})"
            for key, value in self.fixed_theirs.items()
            if theirs.get(key, value) != value
        ]
        known = {name: ours for ours, names in ACTIVATIONS.items() for name in names}
        if activation and values["activation"] not in known:
            wrong.append(f"{activation}={values['activation']!r} (expected one of {', '.join(known)})")
        if wrong:
            raise UserError(f"{where} is of a kind that sslx does not compute: {', '.join(wrong)}")
        values["activation"] = known[values["activation"]]
        if values.get("mlp_width") is None:  # GPT-2's way to say four times the width
            values["mlp_width"] = 4 * values["width"]
        if self.position_offset:
            values["max_length"] -= theirs["pad_token_id"] + 1
        return dict(self.fixed_ours) | values | {"name": self.model}

    def config_from(self, model: Any, head: Head | None, sizes: Sizes) -> dict[str, Any]:
        """Their config from our model's.

        Raises:
          UserError: we compute something that they do not; names each key.
        """
        required = dict(self.fixed_ours)
        if head is not None and head.activation:
            required["activation"] = head.activation
        wrong = [
            f"config.model.{key}={getattr(model, key)} (expected {value})"
            for key, value in required.items()
            if getattr(model, key) != value
        ]
        if wrong:
            raise UserError(
                f"transformers has no {head.name if head else self.base} with {', '.join(wrong)}; what it has are the "
                f"original sizes (such as {self.example}), and --format=stablehlo exports any model"
            )
        values = {key: getattr(model, ours) for key, ours in self.fields.items()}
        for key, ours in self.fields.items():
            if ours == "activation":
                values[key] = ACTIVATIONS[model.activation][0]
            elif ours == "embed_width":
                values[key] = model.table_width
            elif ours == "max_length":
                values[key] += sizes.position_offset
            elif key == "n_inner" and model.mlp_width == 4 * model.width:
                values[key] = None
        return values | {key: values[other] for key, other in self.repeated.items()}

    def head_for(self, parts: Iterable[str], reads: str) -> Head | None:
        """The class with just these parts beside the encoder, whose ``head`` is about the same; or None."""
        wanted = set(parts) - self.left_out
        return next((head for head in self.heads if set(head.parts) == wanted and head.reads == reads), None)


def architecture(model_type: str, where: str) -> Architecture:
    """The architecture that transformers calls ``model_type``.

    Raises:
      UserError: none of ours.
    """
    module, name = ARCHITECTURES[choose(str(model_type), ARCHITECTURES, f"model_type in {where}")].split(":")
    return getattr(importlib.import_module(module), name)


def to_theirs(
    table: Iterable[Tensor], ours: Mapping[str, np.ndarray], sizes: Sizes
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, from ours by ``a/b/c`` name.

    Raises:
      UserError: an array of ours is in no row.
    """
    table = [row for row in table if row.ours[0] in ours]  # a projection that narrow embeddings alone have
    if left := set(ours) - {name for row in table for name in row.ours}:
        raise UserError(f"transformers has no place for the parameters {', '.join(sorted(left))}")
    for row in table:
        arrays = [ours[name] for name in row.ours]
        for layer, theirs in enumerate(row.names(len(arrays[0]))):
            parts = [array[layer] if row.stacked else array for array in arrays]
            array = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            yield theirs, np.ascontiguousarray(RULES[row.rule].to_theirs(array, sizes))


def to_ours(
    table: Iterable[Tensor], theirs: Callable[[str], np.ndarray], ours: Mapping[str, Any], layers: int, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Our arrays by ``a/b/c`` name, float32; ``ours`` has the names that are wanted, ``theirs`` reads a tensor."""
    found = {}
    for row in table:
        if row.ours[0] not in ours:
            continue
        arrays = []
        for name in row.names(layers):
            array = RULES[row.rule].to_ours(np.asarray(theirs(name), np.float32), sizes)
            arrays.append(np.split(array, len(row.ours), axis=-1))
        for name, of_layers in zip(row.ours, zip(*arrays, strict=True), strict=True):
            found[name] = np.stack(of_layers) if row.stacked else np.ascontiguousarray(of_layers[0])
    return found


def shapes_there(
    table: Iterable[Tensor], ours: Mapping[str, tuple[int, ...]], sizes: Sizes
) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors that make ours."""
    # Arrays of zeros that take no memory go through the rules, so that no shape is written twice.
    zeros = {name: np.broadcast_to(np.zeros((), bool), shape) for name, shape in ours.items()}
    return {name: array.shape for name, array in to_theirs(table, zeros, sizes)}

"""A trained model as transformers has it: its class, its config and its tensors.

In: the model's configuration and its parameters by part. Out: what ``from_pretrained`` loads, with the rows that pad
the vocabulary cut off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from sslx.errors import UserError
from sslx.interop.architecture import Architecture, Sizes, architecture, to_theirs
from sslx.interop.vit import with_learned_positions, without_pooling
from sslx.models.bert import BertConfig
from sslx.models.gpt import GptConfig
from sslx.models.igpt import IgptConfig
from sslx.models.vit import VitConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """A model in the form of transformers.

    Attributes:
      class_name: The class that has all of the tensors.
      config: What its config is made from, beside the tokens and labels.
      tensors: Contiguous float32 arrays by name.
    """

    model_type: str
    class_name: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def architecture_of(model: Any, parts: Mapping[str, Any]) -> Architecture:
    """The architecture that a model of ours is one of."""
    if isinstance(model, GptConfig) and not isinstance(model, IgptConfig):
        return architecture("gpt2", "the model")
    if isinstance(model, VitConfig):
        return architecture("vit", "the model")
    if not isinstance(model, BertConfig):
        raise UserError(f"transformers has no counterpart of {type(model).__name__}; --format=stablehlo exports it")
    if "discriminator_head" in parts or model.embed_width is not None:
        return architecture("electra", "the model")
    return architecture("roberta" if model.token_types == 1 else "bert", "the model")


def published(
    model: Any,
    params: Mapping[str, Any],
    *,
    vocab_size: int,
    pad_id: int,
    head_reads: str = "rows",
    encoder_only: bool = False,
) -> Published:
    """Turns a model into the form of transformers.

    Args:
      model: Its configuration.
      params: ``encoder``, and the parts beside it.
      vocab_size: Tokens; the rows of the tables that are beyond are cut off.
      pad_id: The padding token, from which RoBERTa counts positions.
      head_reads: The objective's own.
      encoder_only: Without a head.

    Raises:
      UserError: transformers has no such model; names what differs and what can be exported.
    """
    kind = architecture_of(model, params)
    parts = {name: tree for name, tree in params.items() if name != "encoder" and name not in kind.left_out}
    head = None if encoder_only else kind.head_for(parts, head_reads)
    sizes = Sizes(
        vocab_size,
        pad_id + 1 if kind.position_offset else 0,
        getattr(model, "patch_size", 0),
        getattr(model, "channels", 0),
    )
    encoder = _flat(params["encoder"])
    if isinstance(model, VitConfig):
        model, encoder = with_learned_positions(without_pooling(model) if head is None else model, encoder)
    config = kind.config_from(model, head, sizes) | ({"vocab_size": vocab_size} if vocab_size else {})
    if kind.position_offset:
        config["pad_token_id"] = pad_id  # even where the tokenizer has none, since positions depend on it
    if head is not None and "head" in head.parts:
        config["num_labels"] = np.shape(params["head"]["kernel"])[1]
        if config["num_labels"] == 1:
            config["problem_type"] = "regression"
    if parts and head is None and not encoder_only:
        classes = "; ".join(map(str, kind.heads))
        raise UserError(
            f"transformers has no class with the head that this run has ({', '.join(sorted(parts))}); its classes "
            f"have: {classes or 'none'}. --encoder_only exports the encoder, --format=stablehlo all of it"
        )
    tensors = dict(to_theirs(kind.encoder, encoder, sizes))
    if head is None:
        tensors = {name.removeprefix(f"{kind.prefix}."): array for name, array in tensors.items()}
    else:
        for part, table in head.parts.items():
            tensors |= to_theirs(table, _flat(params[part]), sizes)
    return Published(kind.model_type, head.name if head else kind.base, config, tensors)


def write(form: Published, folder: Path, tokenizer: Any, label_names: tuple[str, ...] | None = None) -> None:
    """Writes ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Args:
      form: The model.
      folder: Where to; exists.
      tokenizer: Its tokenizer, or None.
      label_names: The classes of a classifier, in order.
    """
    from transformers import AutoConfig

    values = dict(form.config)
    if tokenizer is not None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        values = {name: getattr(tokenizer, name) for name in names} | values
    if label_names:
        values["id2label"] = dict(enumerate(label_names))
        values["label2id"] = {name: label for label, name in enumerate(label_names)}
    config = AutoConfig.for_model(form.model_type, **values)
    config.architectures, config.dtype = [form.class_name], "float32"
    config.save_pretrained(folder)
    save_file(form.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # made for its owner's eyes alone, unlike the files beside it
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    return {name: np.asarray(array, np.float32) for name, array in flat.items()}

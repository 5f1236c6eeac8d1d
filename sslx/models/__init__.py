"""Index of the models: ``config.model.name`` to the class of its configuration, which makes the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslx.config import build, load_class
from sslx.errors import UserError, choose

MODELS = {
    "bert": "sslx.models.bert:BertConfig",  # sees both ways; the original, ModernBERT-like, RoBERTa and ELECTRA
    "gpt": "sslx.models.gpt:GptConfig",  # sees what came before; GPT-2 or LLaMA-like
    "vit": "sslx.models.vit:VitConfig",  # patches of an image
    "resnet": "sslx.models.resnet:ResnetConfig",  # convolutions with batch normalisation
    "convnext": "sslx.models.convnext:ConvnextConfig",  # convolutions without
    "igpt": "sslx.models.igpt:IgptConfig",  # the colours of an image's pixels, one after the other
}


def build_model(written: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Builds ``config.model``.

    Args:
      written: The part as it was written.
      names: The models that the objective can use; the first is meant where none is named.

    Raises:
      UserError: another model, or something in it that cannot be.
    """
    return build(load_class(chosen_model(written, names), MODELS, "config.model.name"), written, "config.model")


def chosen_model(written: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The name of the model that ``config.model`` means; arguments as of `build_model`.

    Raises:
      UserError: it is none of ``names``.
    """
    name = str(written.get("name", names[0]))
    if name in MODELS and name not in names:
        raise UserError(
            f"config.model.name is {name!r}, which this objective cannot use; expected {' or '.join(names)}"
        )
    return choose(name, names, "config.model.name")

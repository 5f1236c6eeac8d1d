"""The image model that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslx.data.images import ImageConfig
from sslx.errors import UserError
from sslx.models import build_model
from sslx.models.convnext import ConvnextConfig
from sslx.models.igpt import IgptConfig
from sslx.models.resnet import ResnetConfig
from sslx.models.vit import VitConfig

IMAGE_MODELS = ("vit", "resnet", "convnext", "igpt")
ImageModel = VitConfig | ResnetConfig | ConvnextConfig | IgptConfig


def build_image_model(
    written: Mapping[str, Any], data: ImageConfig, names: tuple[str, ...] = IMAGE_MODELS
) -> ImageModel:
    """Builds ``config.model``.

    Args:
      written: The part as it was written.
      data: What it will see.
      names: The models that the objective can use.

    Raises:
      UserError: another model, something in it that cannot be, or pictures of another size or other channels.
    """
    model = build_model(written, names)
    for field in ("image_size", "channels"):
        wanted, given = getattr(model, field), getattr(data, field)
        if wanted != given:
            raise UserError(
                f"config.data.{field} is {given} and config.model.{field} is {wanted}; expected the same: "
                f"--config.data.{field}={wanted}, or for a new model --config.model.{field}={given}"
            )
    return model

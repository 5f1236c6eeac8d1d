"""What the last layer of a ViT looks at: a sheet of pictures with the attention of each laid over them."""

from __future__ import annotations

from typing import Any

import jax
import matplotlib
import numpy as np
from jaxtyping import Float, UInt8

from sslx.models.vit import VitConfig
from sslx.picture_sheet import sheet

HEADS = 4  # shown one by one
OVER = 0.7  # of what is seen is attention, the rest the picture


def attention_maps(model: VitConfig, encoder: Any, images: np.ndarray) -> Float[np.ndarray, "images heads grid grid"]:
    """Attention over the patches by head; ``encoder`` as ``Objective.encoder`` gives it."""
    shares = jax.jit(lambda given, batch: model.encoder().apply(given, batch, method="attention"))(
        encoder, {"image": images}
    )
    return np.asarray(shares).reshape(*shares.shape[:2], model.grid, model.grid)


def attention_sheet(model: VitConfig, encoder: Any, images: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """Each picture uint8, then the mean over the heads and some heads; the brightest patch of each map has the most."""
    maps = attention_maps(model, encoder, images)
    shown = np.unique(np.linspace(0, maps.shape[1] - 1, min(HEADS, maps.shape[1])).round().astype(int))
    columns = {"picture": images / 255.0, f"mean of {maps.shape[1]}": _over(images, maps.mean(axis=1))}
    columns |= {f"head {head + 1}": _over(images, maps[:, head]) for head in shown}
    of = "class token" if model.class_token else "patches, on average (there is no class token)"
    return sheet(columns, heading=f"Where the last layer looks, from the {of}")


def _over(images: np.ndarray, maps: Float[np.ndarray, "images grid grid"]) -> Float[np.ndarray, "images side side 3"]:
    size = images.shape[1] // maps.shape[1]
    bright = maps / maps.max(axis=(1, 2), keepdims=True)
    colour = matplotlib.colormaps["inferno"](bright)[..., :3].repeat(size, axis=1).repeat(size, axis=2)
    grey = images.mean(axis=-1, keepdims=True) / 255.0
    return OVER * colour + (1 - OVER) * grey

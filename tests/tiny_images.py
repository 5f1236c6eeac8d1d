"""Small experiments on scikit-learn's handwritten digits, with models that compile fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sslx.entry import load_config
from sslx.models.vit import VitConfig
from sslx.objective import Objective

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# One layer over four patches in color.
TINY_VIT = VitConfig(
    layers=1,
    width=16,
    heads=2,
    mlp_width=32,
    image_size=8,
    patch_size=2,
    channels=3,
    positions="sincos",
    pool="mean",
    pixel_mean=(0.4, 0.5, 0.6),
    pixel_std=(0.2, 0.3, 0.25),
)


def picture_rows(rows: int, size: int = 8, channels: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, size, size, channels), dtype=np.uint8)
    return {"image": images, "row": 100 + np.arange(rows, dtype=np.int32)}


def tiny_images(name: str, argument: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """The config of a small run on digits; changes are written with ``__`` for a dot."""
    config = load_config(CONFIGS / f"{name}.py", argument)
    size = {
        "data.source": "digits",
        "data.image_size": 8,
        "data.test_split": "",
        "model.image_size": 8,
        "steps": 6,
        "batch_size": 64,
        "optimizer.warmup_steps": 2,
        "optimizer.learning_rate": 3e-3,
        "eval.every_steps": 1000,
        "eval.examples": 0,
        "diagnostics.rows": 0,
        "checkpoint.every_steps": 1000,
        "checkpoint.best_metric": "eval/loss",
        "checkpoint.best_mode": "min",
        "log.every_steps": 1,
    }
    if "layers" in config.model:
        size |= {"model.layers": 1, "model.width": 32, "model.heads": 2, "model.mlp_width": 64}
    else:
        size |= {"model.width": 4}
    if "patch_size" in config.model:
        size["model.patch_size"] = 2
    size |= {name.replace("__", "."): value for name, value in changes.items()}
    with config.unlocked():
        config.update_from_flattened_dict(size)
    return config


class Compiled:
    """The methods of an objective, each compiled as a whole: one operation after the other they take far longer."""

    def __init__(self, objective: Objective):
        key = jax.random.key(1)
        self.views = jax.jit(lambda batch, train: objective.views(batch, key, 0, train=train), static_argnums=1)
        self.loss = jax.jit(
            lambda params, state, viewed, train: objective.loss(params, state, viewed, key, 0, train=train),
            static_argnums=3,
        )
        self.logits, self.predict, self.encode = map(jax.jit, (objective.logits, objective.predict, objective.encode))

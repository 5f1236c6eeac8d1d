"""A masked autoencoder trained for two steps on small pictures, and larger pictures with one square each."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from entries import REPOSITORY
from PIL import Image

from sslx.entry import load_config
from sslx.objective import Batch, Objective
from sslx.session import train
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_train_step

MAE = {
    "data.image_size": 16,
    "data.train_split": "train[:16]",
    "data.eval_split": "train[16:]",
    "model.image_size": 16,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.mlp_width": 32,
    "pretext.decoder_layers": 1,
    "pretext.decoder_width": 16,
    "pretext.decoder_heads": 2,
    "steps": 2,
    "batch_size": 8,
    "optimizer.warmup_steps": 1,
    "eval.every_steps": 1000,
    "eval.examples": 0,
    "checkpoint.every_steps": 1000,
    "log.every_steps": 1,
}


def squares(count: int, side: int) -> tuple[list[np.ndarray], list[tuple[int, int, int]]]:
    """Grey noise with a dark or a bright square in turn, and where it is: left, top, side."""
    draw = np.random.default_rng(0)
    pictures, places = [], []
    for number in range(count):
        picture = draw.integers(90, 160, (side, side)).astype(np.uint8)
        size = int(draw.integers(side // 4, side // 2))
        x, y = (int(draw.integers(0, side - size)) for _ in range(2))
        picture[y : y + size, x : x + size] = 255 * (number % 2)
        pictures.append(picture)
        places.append((x, y, size))
    return pictures, places


def memorised(objective: Objective, batch: Batch, steps: int) -> dict[str, np.ndarray]:
    """What an objective predicts of a batch after it has been trained on nothing else, from random parameters."""
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    optimizer = optax.adam(schedule)

    variables = jax.jit(lambda: unbox(objective.init(jax.random.key(0), batch)))()
    state = TrainState(jnp.int32(0), variables["params"], variables["state"], optimizer.init(variables["params"]))
    step = jax.jit(make_train_step(objective, optimizer, schedule, seed=0), donate_argnums=0)
    for _ in range(steps):
        state, _ = step(state, batch)
    view = lambda: objective.views(batch, jax.random.key(1), jnp.int32(0), train=False)  # noqa: E731
    return jax.device_get(jax.jit(lambda params: objective.predict(params, {}, view()))(state.params))


def pretrained(folder: Path) -> Path:
    """Trains it; the folder of the run."""
    (folder / "pictures").mkdir()
    for number, picture in enumerate(squares(24, 16)[0]):
        Image.fromarray(picture).save(folder / "pictures" / f"{number}.png")
    config = load_config(REPOSITORY / "configs/vit_mae.py", f"data=images:{folder / 'pictures'}")
    with config.unlocked():
        config.update_from_flattened_dict(MAE)
    train(config.to_dict(), folder / "run", part="pretext", tokenizer=None, title="test")
    return folder / "run"

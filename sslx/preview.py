"""Shows what the model will see: ``python -m sslx.preview --config=configs/bert_mlm.py``, before any training.

The config may be one of a downstream task, with the --config.init that it will be trained from. Of pictures, a
sheet of rows, views and masks is drawn, ``preview_views.png``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sslx import entry
from sslx.data.batches import training_rows
from sslx.runtime import configure
from sslx.session import run_config
from sslx.storage import local_copy, write_picture
from sslx.train.console import Console
from sslx.train.initialise import inherited, objective_class, part_of
from sslx.train.step import train_keys

ROWS = 4


def main(config: ml_collections.ConfigDict, workdir: Path) -> list[dict[str, str]]:
    """Prints the first rows of step 0 exactly as training would see them, with masks and segments."""
    configure()
    written = config.to_dict()
    run = run_config(written, part_of(written))
    written, tokenizer = inherited(written | dataclasses.asdict(run), entry.given_keys())
    objective, data = objective_class(written).prepare(written, str(local_copy(tokenizer)) if tokenizer else None)
    order = data.train.order(run.seed)
    # One more than is shown: a row may be mixed with the next one, and the last of the batch with the first.
    seen = np.arange(min(ROWS + 1, run.batch_size, len(data.train)))
    batch = training_rows(data.train, order, seen, run.seed)
    step = jnp.zeros((), jnp.int32)
    key = train_keys(run.seed, step)[0]
    viewed = jax.device_get(jax.jit(lambda b: objective.views(b, key, step, train=True))(batch))
    batch, viewed = jax.tree.map(lambda array: array[:ROWS] if np.ndim(array) else array, (batch, viewed))
    console = Console()
    for name, value in data.statistics.items():
        console.say(f"{name:<24} {value:,.4f}" if isinstance(value, float) else f"{name:<24} {value}")
    shown = objective.preview(batch, viewed)
    for row, fields in zip(batch["row"], shown, strict=True):
        console.say("")
        console.say(f"row {row}")
        for name, value in fields.items():
            console.say(f"  {name}: {value}")
    for name, picture in objective.preview_pictures(batch, viewed).items():
        write_picture(f"preview_{name}.png", picture)
        console.say(f"written: preview_{name}.png")
    return shown


if __name__ == "__main__":
    entry.run(main, needs_workdir=False)

"""Pictures per second of the host pipeline, and what share of a training step augmentation takes.

    python tests/benchmarks/image_pipeline.py

Host: JPEGs of 500 x 375 pixels, quality 90, from files in the page cache: decoding, a random crop, 224 x 224 pixels, in
batches of 64 rows of ``config.data.crop="host"``, with one thread and with two. Step: MAE on 32 x 32 pixels, as
`configs/vit_mae.py` has it, batch 64, whole steps beside views compiled by themselves, for some policies; the share is
of CPU time.
Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sslx.augment.policy import AugmentConfig, Views, augment, crop_views
from sslx.data import images
from sslx.data.images import ImageConfig, prepare_images
from sslx.entry import load_config
from sslx.objective import row_keys
from sslx.pretext.mae import Mae
from sslx.runtime import configure
from sslx.session import run_config
from sslx.train.hosts import Votes
from sslx.train.loop import Trainer
from sslx.train.sharding import on_mesh

ROWS = 64
SIMCLR = AugmentConfig(
    jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, crop_area=(0.08, 1.0)
)
POLICIES = {
    "crop and flip": AugmentConfig(),
    "SimCLR's": SIMCLR,
    "RandAugment(2, 9)": AugmentConfig(randaugment=2),
}


def photograph(place: int) -> Image.Image:
    """Something with edges, slopes and grain, which costs a decoder about what a photograph does."""
    draw = np.random.default_rng(place)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(np.clip(smooth + draw.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


class Cost(NamedTuple):
    """Medians of one call: seconds that passed, and seconds of CPU over all threads, which other processes spare."""

    wall: float
    cpu: float


def cost(call: Callable[[], Any], times: int) -> Cost:
    """Of some calls after one that is not counted."""
    call()
    walls, cpus = [], []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Cost(statistics.median(walls), statistics.median(cpus))


def host(folder: Path, times: int) -> None:
    """Prints pictures per second by threads."""
    for place in range(ROWS + 2):
        photograph(place).save(folder / f"{place:03}.jpg", quality=90)
    size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / (ROWS + 2)
    splits = dict(train_split="train[:-2]", eval_split="train[-2:]", cache_dir=str(folder / "cache"))
    rows = prepare_images(ImageConfig(f"images:{folder}", image_size=224, crop="host", **splits)).train
    for threads in (1, 2):
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        images.decoders = lambda pool=pool: pool
        found = cost(lambda: rows.draw(np.arange(ROWS), np.zeros(ROWS, np.int64), 0), times)
        print(
            f"host, {threads} threads: {ROWS / found.wall:.0f} pictures/s, {found.cpu / ROWS * 1e3:.2f} ms of CPU and "
            f"{size / 1024:.0f} KiB each",
            flush=True,
        )


def step(times: int) -> None:
    """Prints seconds of a step and of views alone."""
    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "vit_mae.py", "data=digits")
    with config.unlocked():
        config.batch_size = ROWS
        config.data.channels = config.model.channels = 3
    written = config.to_dict()
    objective, data = Mae.prepare(written)
    trainer = Trainer(run_config(written, "pretext"), objective, data)
    program, batch = trainer.program, trainer.batches.at(0)
    state, votes, held = program.fresh(), Votes(program.mesh)(stop=0, save=False), program.nothing_held()

    def one() -> None:
        nonlocal state
        with on_mesh(program.mesh):
            state, metrics = program.train_step(state, batch, votes, held)
        jax.block_until_ready((state, metrics))

    whole = cost(one, times)
    print(f"step: {whole.wall * 1e3:.0f} ms, {whole.cpu * 1e3:.0f} ms of CPU, for {ROWS} pictures", flush=True)

    def report(name: str, make: Callable) -> None:
        run = jax.jit(lambda batch: make(batch["image"], row_keys(jax.random.key(0), batch["row"]), jax.random.key(1)))
        alone = cost(lambda: jax.block_until_ready(run(batch)), times)
        print(
            f"views, {name}: {alone.wall * 1e3:.1f} ms, {alone.cpu * 1e3:.1f} ms of CPU, "
            f"{alone.cpu / whole.cpu:.0%} of such a step's",
            flush=True,
        )

    for name, policy in POLICIES.items():
        report(name, lambda x, keys, order, policy=policy: augment(x, keys, order, policy))
    kinds = (Views(2, 32, SIMCLR), Views(6, 16, SIMCLR))
    report("SimCLR's, 2 of 32 and 6 of 16 pixels", lambda x, keys, order: crop_views(x, keys, order, kinds))


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    configure()
    with tempfile.TemporaryDirectory() as folder:
        host(Path(folder), arguments.times)
    step(arguments.times)


if __name__ == "__main__":
    main()

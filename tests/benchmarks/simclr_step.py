"""SimCLR from pictures to the update, beside PyTorch with torchvision's augmentation, in one sitting on one CPU.

All sides: the same PNG files of 32 x 32 pixels in colour, two views of each (crop, flip, jitter, grey, blur:
solo-learn's "symmetric" policy), ResNet-18 with the stem for CIFAR, a projector of 2,048 and 256, NT-Xent, SGD with
momentum 0.9, float32. sslx is its real train step on the batches of its own pipeline, which has decoded the files once
before (``preparation``, in seconds), with views made inside the step. The peer transforms Pillow pictures in
`--workers` processes, for a model in channels-last, in two forms: torch_files is an `ImageFolder`, which opens and
decodes files in each step; torch_decoded has all of them in memory, as torchvision's CIFAR-10 has.

    pip install -e ".[peers]" && python tests/benchmarks/simclr_step.py

The sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. The share of augmentation is
of CPU time (sslx: views compiled by themselves; the peer: its transforms of decoded pictures in one process), over that
of a step. Use an otherwise idle machine. ``--torch-python`` names another interpreter for the peer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import WARMUP, Size, compare
from PIL import Image

SIDE, HIDDEN, OUT, TEMPERATURE, RATE, FILES = 32, 2048, 256, 0.2, 0.1, 2048
SIZES = {"cifar": Size(256)}
Found = dict[str, float]


def write_pictures(arguments: argparse.Namespace) -> Found:
    """Pictures that compress about as photographs of this size do, in two classes that nobody looks at."""
    for place in range(FILES):
        draw = np.random.default_rng(place)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + draw.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        file = arguments.folder / "pictures" / f"{place % 2}" / f"{place:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return {"pictures": FILES}


def measure_sslx(arguments: argparse.Namespace) -> Found:
    """Seconds of a real train step on batches of the real pipeline, and the share of its CPU time that views take."""
    import jax

    from sslx.compiler import compiler_options
    from sslx.entry import load_config
    from sslx.pretext.simclr import SimClr
    from sslx.runtime import configure
    from sslx.session import run_config
    from sslx.train.hosts import Votes
    from sslx.train.loop import Trainer
    from sslx.train.sharding import on_mesh

    configure()
    rows, steps = arguments.size.rows, arguments.steps
    file, folder = Path(__file__).resolve().parents[2] / "configs" / "simclr.py", arguments.folder
    config = load_config(file, f"cifar10,data=images:{folder / 'pictures'}")
    with config.unlocked():
        config.batch_size, config.data.cache_dir = rows, str(folder / "cache")
        config.data.train_split, config.data.eval_split = "train[:95%]", "train[95%:]"
        config.optimizer.name, config.optimizer.learning_rate = "sgd", RATE
        config.online.probe = False
        config.model.dtype = arguments.dtype
    written = config.to_dict()
    begin = time.perf_counter()
    objective, data = SimClr.prepare(written)
    preparation = time.perf_counter() - begin
    trainer = Trainer(run_config(written, "pretext"), objective, data)
    program = trainer.program
    state, votes, held = program.fresh(), Votes(program.mesh)(stop=0, save=False), program.nothing_held()
    walls, cpus = [], []
    with on_mesh(program.mesh):
        for step in range(steps + WARMUP):
            wall, cpu = time.perf_counter(), time.process_time()
            batch = trainer.batches.at(step)
            state, metrics = program.train_step(state, batch, votes, held)
            jax.block_until_ready((state, metrics))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        options = compiler_options(jax.default_backend())
        views = jax.jit(lambda batch: objective.source.views(batch, jax.random.key(0)), compiler_options=options)
        jax.block_until_ready(views(batch))
        begin = time.process_time()
        for _ in range(3):
            jax.block_until_ready(views(batch))
        augmenting = (time.process_time() - begin) / 3
    return {
        "seconds": statistics.median(walls[WARMUP:]),
        "augmentation": augmenting / statistics.median(cpus[WARMUP:]),
        "preparation": preparation,
    }


def measure_torch(decoded: bool, arguments: argparse.Namespace) -> Found:
    """The same by PyTorch, on pictures that are ``decoded`` or on files."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torchvision import datasets, models, transforms

    torch.manual_seed(0)
    rows, steps, workers = arguments.size.rows, arguments.steps, arguments.workers
    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(3, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ]
    )

    def two(picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return one(picture), one(picture)

    class Decoded(torch.utils.data.Dataset):
        """Of Pillow pictures in memory."""

        def __init__(self, files: Any) -> None:
            self.kept = list(files)

        def __len__(self) -> int:
            return len(self.kept)

        def __getitem__(self, place: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
            picture, label = self.kept[place]
            return two(picture), label

    folder = str(arguments.folder / "pictures")
    in_memory = Decoded(datasets.ImageFolder(folder))
    pictures = in_memory if decoded else datasets.ImageFolder(folder, two)
    loader = torch.utils.data.DataLoader(
        pictures, rows, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    encoder = models.resnet18()
    encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    encoder.fc = nn.Sequential(nn.Linear(512, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))
    device, half = arguments.torch_device, arguments.torch_dtype == "bfloat16"
    encoder = encoder.train().to(device, memory_format=torch.channels_last)
    if arguments.torch_compile:
        encoder.compile()
    optimizer = torch.optim.SGD(encoder.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    partner = torch.cat([torch.arange(rows) + rows, torch.arange(rows)]).to(arguments.torch_device)

    def batches() -> Any:
        while True:
            yield from loader

    walls, cpus, stream = [], [], batches()
    for _ in range(steps + WARMUP):
        wall, cpu = time.perf_counter(), time.process_time()
        (first, second), _ = next(stream)
        optimizer.zero_grad(set_to_none=True)
        views = torch.cat([first, second]).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            seen = encoder(views)
        seen = functional.normalize(seen.float())
        alike = (seen @ seen.T / TEMPERATURE).fill_diagonal_(-1e9)
        functional.cross_entropy(alike, partner).backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    begin = time.process_time()
    for place in range(rows):
        in_memory[place]
    augmenting = time.process_time() - begin
    training = statistics.median(cpus[WARMUP:])  # without what worker processes do
    return {
        "seconds": statistics.median(walls[WARMUP:]),
        "augmentation": augmenting / (training + augmenting * (workers > 0)),
    }


PEERS = {f"torch_{name}": functools.partial(measure_torch, name == "decoded") for name in ("files", "decoded")}

if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, shared=write_pictures, sizes=SIZES, **PEERS)

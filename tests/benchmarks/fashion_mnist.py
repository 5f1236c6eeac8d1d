"""How good the features of each pretext task are on Fashion-MNIST, beside raw pixels, random and supervised encoders.

A row of the table is one seed of one method. Each pretrains on the first 54,000 training pictures without their labels.
Its frozen features go through the probes of ``python -m sslx.evaluate`` (20,000 labelled pictures; settings chosen on
the last 2,000 of the training set): linear probe, nearest neighbours, and a linear classifier on 10 labels a class.
Then the whole encoder is fine-tuned on 100 labels a class. ``supervised`` has trained on all 54,000 labels, ``random``
on nothing; both have the architecture of ``mae``. So have the methods on patches; what compares whole pictures trains a
ResNet-10 of 16 to 128 channels, which ``supervised_resnet`` and ``random_resnet`` are to be held against (column
``encoder``). All scores are accuracies on the 10,000 test pictures.

    apt-get install dataset-fashion-mnist    # or the four files of MNIST's format in another folder: --data
    python tests/benchmarks/fashion_mnist.py --workdir=runs/fashion_mnist
    python tests/benchmarks/fashion_mnist.py --workdir=/tmp/smoke --steps=4 --seeds 0    # to see that it runs
    python tests/benchmarks/fashion_mnist.py --workdir=runs/fashion_mnist_large --size=large    # for an accelerator

Started again with the same workdir, it takes finished rows from ``rows.jsonl`` and goes on with the run it was in.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from sslx import evaluate, finetune
from sslx import main as pretrain
from sslx.config import build
from sslx.entry import load_config
from sslx.inference.loading import load_run
from sslx.probing.images import ImageProbeConfig
from sslx.session import Session, run_config
from sslx.train.initialise import from_scratch, objective_class

CONFIGS = Path(__file__).parent.parent.parent / "configs"
MIRRORED = {"pretext.augment.flip": 0.5}
TWO = {"pretext.views.first.flip": 0.5, "pretext.views.second.flip": 0.5}
CROPS = {**TWO, "pretext.views.local.flip": 0.5, "pretext.views.local_size": 14}
# Steps are what two minutes on two cores allow.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("vit_mae", {"steps": 1400, "batch_size": 64, "optimizer.learning_rate": 2e-3, **MIRRORED}),
    "igpt": (
        "vit_igpt",
        {"steps": 500, "batch_size": 32, "model.width": 96, "model.mlp_width": 384, "data.image_size": 14}
        | {"model.image_size": 14, **MIRRORED},
    ),
    "rotation": ("rotation", {"steps": 400, "batch_size": 32, **MIRRORED}),
    "simclr": ("simclr", {"steps": 500, **TWO}),
    "moco_v3": ("moco_v3", {"steps": 400, **TWO}),
    "byol": ("byol", {"steps": 400, **TWO}),
    "simsiam": ("simsiam", {"steps": 500, **TWO}),
    "barlow_twins": ("barlow_twins", {"steps": 500, **TWO}),
    "vicreg": ("vicreg", {"steps": 500, **TWO}),
    "infomax": ("infomax", {"steps": 500, **TWO}),
    "swav": ("swav", {"steps": 400, **CROPS}),
    "dino": ("dino", {"steps": 300, **CROPS}),
    "ibot": ("ibot", {"steps": 500, "model.patch_size": 7, **CROPS}),
    "ijepa": ("ijepa", {"steps": 1000, **MIRRORED}),
    "data2vec": ("data2vec", {"steps": 500, **MIRRORED}),
    "supervised": ("finetune/image_classification", {"steps": 800, "batch_size": 64, "task.augment.flip": 0.5}),
    "supervised_resnet": (
        "finetune/image_classification",
        {"steps": 800, "batch_size": 64, "task.augment.flip": 0.5, "task.drop_path": 0.0},
    ),
    "random": ("vit_mae", {}),
    "random_resnet": ("simclr", {}),
}
# Whose architecture these have.
LIKE = {"supervised": "mae", "supervised_resnet": "simclr", "random": "mae", "random_resnet": "simclr"}
UNTRAINED = ("random", "random_resnet")
LARGE = {
    "steps": 50_000,
    "batch_size": 1024,
    "model.layers": 12,
    "model.width": 384,
    "model.heads": 6,
    "model.mlp_width": 1536,
    "model.dtype": "bfloat16",
}
LARGE_RESNET = {"steps": 50_000, "batch_size": 1024, "model.depth": 18, "model.width": 64, "model.dtype": "bfloat16"}
SPLITS = {"train_split": "train[:54000]", "eval_split": "train[54000:]"}
COLUMNS = {"linear": "linear", "knn": "kNN", "ten": "10 labels a class", "tuned": "fine-tuned, 100 labels a class"}


def config_of(method: str, arguments: argparse.Namespace, seed: int) -> ml_collections.ConfigDict:
    """The config that a method trains with."""
    name, changes = METHODS[method]
    config = load_config(CONFIGS / f"{name}.py")
    given = {"data.source": f"idx:{arguments.data}", "data.image_size": 28, "model.image_size": 28, **changes}
    given |= {f"data.{split}": part for split, part in SPLITS.items()} | {"seed": seed}
    if arguments.size == "large":
        given |= LARGE if "layers" in config.model else LARGE_RESNET
    return _changed(config, given, arguments.steps)


def _changed(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any], steps: int | None
) -> ml_collections.ConfigDict:
    """A config with changes, its warm-up and evaluations fitted to its steps."""
    with config.unlocked():
        config.update_from_flattened_dict(dict(changes))
        config.steps = steps or config.steps
        config.optimizer.warmup_steps = config.steps // 10
        config.eval.every_steps = config.checkpoint.every_steps = max(config.steps // 2, 1)
        config.eval.batches = 8
    return config


def teraflops(config: ml_collections.ConfigDict) -> float:
    """Model FLOPs of a whole run (`Objective.flops`), in 1e12."""
    written = config.to_dict()
    objective, row = objective_class(written).abstract(written)
    part = "task" if "task" in written else "pretext"
    batch = run_config(written, part).batch_size
    return config.steps * objective.flops({name: (batch, *leaf.shape) for name, leaf in row.items()}) / 1e12


def encoder_of(config: ml_collections.ConfigDict) -> str:
    """The encoder in a few words."""
    model = config.model
    size = f" {model.layers} x {model.width}" if "layers" in model else f"-{model.depth}, width {model.width}"
    return model.name + size + (f", patches of {model.patch_size}" if "patch_size" in model else "")


def minutes(run: Path, config: ml_collections.ConfigDict) -> float:
    """What the steps of a run took, at its median rate, without compilation and evaluations."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf8").splitlines())
    rates = [record["rows_per_second"] for record in records if "rows_per_second" in record]
    return config.steps * config.batch_size / statistics.median(rates) / 60 if rates else 0.0


def probed(method: str, run: Path, config: ml_collections.ConfigDict, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies of the probes by features and column, with ``mae`` those of raw pixels, too.

    Those of random parameters of the same architecture are there with ``mae`` and of ``random_resnet``.
    """
    given = load_config(CONFIGS / "evaluate" / "image_probe.py")
    changes = {"source": config.data.source, "train_split": "train[:20000]", "eval_split": "train[58000:]"}
    with given.unlocked():
        given.data.update(changes | {"test_split": "test"})
        given.supervised = {}
        given.seed, given.few_shot.labels = seed, (10,)
        given.random_encoders, given.raw_pixels = int(method in ("mae", "random_resnet")), method == "mae"
    values = evaluate.evaluate(build(ImageProbeConfig, given.to_dict()), epath.Path(run), load_run(epath.Path(run)))
    found: dict[str, dict[str, float]] = {}
    for result in values["results"]:
        column = {"10 a class": "ten"}.get(result["probe"], result["probe"])
        score = result["accuracy"] if "accuracy" in result else statistics.mean(result["accuracies"])
        found.setdefault(result["features"], {})[column] = score
    return found


def tuned(
    init: str, config: ml_collections.ConfigDict, workdir: Path, arguments: argparse.Namespace, seed: int
) -> float:
    """Test accuracy of the whole encoder, fine-tuned on 100 labels a class."""
    given = load_config(CONFIGS / "finetune" / "image_classification.py")
    changes = {f"data.{name}": config.data[name] for name in ("source", "image_size", "channels")}
    changes |= {"data.labels_per_class": 100, "data.test_split": "test", "task.augment.flip": 0.5}
    changes |= {f"data.{split}": part for split, part in SPLITS.items()}
    changes |= {"init": init, "seed": seed, "steps": 800, "batch_size": 32, "optimizer.learning_rate": 2e-3}
    # Lower rates protect what was pretrained, and from random parameters nothing was.
    changes["optimizer.layer_decay"] = 1.0 if from_scratch(init) or "layers" not in config.model else 0.9
    changes["task.drop_path"] = given.task.drop_path if "drop_path" in config.model else 0.0
    _to_the_end(finetune.main(_changed(given, changes, arguments.steps), epath.Path(workdir)))
    return json.loads((workdir / "report.json").read_text(encoding="utf8"))["test/accuracy"]


def _to_the_end(session: Session) -> None:
    """Ends the benchmark with a run that a signal has stopped; the same command goes on with it."""
    if session.trained.signal:
        raise SystemExit(1)


def rows_of(method: str, arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Trains, probes and fine-tunes one seed of a method."""
    folder, config = arguments.workdir, config_of(method, arguments, seed)
    like = folder / f"{LIKE.get(method, method)}_{seed}"
    if method in UNTRAINED:
        row = {"method": method, "seed": seed, "encoder": encoder_of(config_of(LIKE[method], arguments, seed))}
        if method == "random_resnet":
            row |= probed(method, like, config, seed)["random 0"]
        return [row | {"tuned": tuned(f"scratch:{like}", config, folder / f"tuned_{method}_{seed}", arguments, seed)}]
    run = folder / f"{method}_{seed}"
    if method in LIKE:
        with config.unlocked():
            config.init, config.data.test_split = f"scratch:{like}", "test"
            config.model = config_of(LIKE[method], arguments, seed).model  # as it will be
            config.optimizer.layer_decay = 1.0
        _to_the_end(finetune.main(config, epath.Path(run)))
    else:
        _to_the_end(pretrain.main(config, epath.Path(run)))
    found = probed(method, run, config, seed)
    cost = {"steps": config.steps, "teraflops": teraflops(config), "minutes": minutes(run, config)}
    row = {"method": method, "encoder": encoder_of(config), "seed": seed, **cost, **found["pretrained"]}
    if method in LIKE:
        row["head"] = json.loads((run / "report.json").read_text(encoding="utf8"))["test/accuracy"]
    else:
        row["tuned"] = tuned(str(run), config, folder / f"tuned_{method}_{seed}", arguments, seed)
    beside = {"raw": "raw pixels", "random 0": "random"}
    return [row] + [{"method": name, "seed": seed, **found[key]} for key, name in beside.items() if key in found]


def settings(method: str, arguments: argparse.Namespace) -> list[Any]:
    """What a row was made with; a finished one is taken only where it is the same."""
    return [arguments.size, arguments.steps, METHODS[method][1]]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation over seeds, in per cent."""
    lines = [
        f"| method | encoder | steps | TFLOPs | minutes | {' | '.join(COLUMNS.values())} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        cells = [
            method,
            next((row["encoder"] for row in members if "encoder" in row), "–"),
            _one(members, "steps", ",.0f"),
            _one(members, "teraflops", ".1f"),
            _one(members, "minutes", ".1f"),
        ]
        lines.append(f"| {' | '.join(cells + [_spread(members, column) for column in COLUMNS])} |")
    for method in dict.fromkeys(row["method"] for row in rows if "head" in row):
        heads = [row for row in rows if row["method"] == method]
        lines.append(f"{method}, by its own head: {_spread(heads, 'head')}")
    return "\n".join(lines)


def _one(rows: list[dict[str, Any]], name: str, form: str) -> str:
    found = [row[name] for row in rows if name in row]
    return format(statistics.mean(found), form) if found else "–"


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    found = [100 * row[name] for row in rows if name in row]
    if not found:
        return "–"
    return f"{statistics.mean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")


def main() -> None:
    """Makes the rows that are missing and prints the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder of MNIST's files")
    parser.add_argument("--size", choices=("small", "large"), default="small")
    parser.add_argument("--steps", type=int, help="of every run; default: its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="mae comes first")
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    file = arguments.workdir / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []
    if any(row["settings"] != settings(row["of"], arguments) for row in rows):
        parser.error(f"{file} holds rows of other settings; expected another --workdir")
    for seed in arguments.seeds:
        for method in arguments.methods:
            if any(row["of"] == method and row["seed"] == seed for row in rows):
                continue
            beside = {"of": method, "settings": settings(method, arguments)}
            made = [row | beside for row in rows_of(method, arguments, seed)]
            rows += made
            with file.open("a", encoding="utf8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in made)
            print(table(rows), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

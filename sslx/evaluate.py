"""Probes a frozen encoder: ``python -m sslx.evaluate --run=runs/bert_mlm --config=configs/evaluate/text_probe.py``.

Features of labelled rows (`Objective.encode`) go through a linear probe, nearest neighbours, and classifiers that have
seen 1, 5 or 10 labels of each class. In the same table are honest baselines: the same architecture with random
parameters and, where the config asks for it, trained on the labels for as many steps; raw pixels of pictures, TF-IDF of
texts. The table is printed, and written to RUN/evaluate/NAME/ with pictures, also for TensorBoard: of the features and,
of a ViT, of what its last layer attends to. An evaluation with another config or of another checkpoint that finds this
folder taken goes to NAME_2, NAME_3 and so on, so that nothing is lost; the same evaluation again replaces its own.

  --run=FOLDER            the run
  --step=N                which checkpoint; default: the best of a task's run, the newest of any other
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from etils.epath import Path
from PIL import Image
from tensorboardX import SummaryWriter

from sslx import entry, finetune
from sslx.config import build, load_class
from sslx.errors import UserError
from sslx.inference.loading import LoadedRun, load_run, modality_of
from sslx.probing import PROBES
from sslx.probing.features import Encoder, Labelled
from sslx.probing.few_shot import few_shot
from sslx.probing.knn import knn_scores
from sslx.probing.linear import linear_probe
from sslx.probing.picture import draw_projections
from sslx.probing.probe import SPLITS, Probe, ProbeConfig, result
from sslx.runtime import configure, display
from sslx.settings import OptimizerConfig
from sslx.storage import upload, write_figure, write_picture, write_text
from sslx.train.console import Console
from sslx.train.initialise import CODEBOOK
from sslx.train.sharding import unbox

PUBLISHED = {"text": "text_probe.py", "images": "image_probe.py"}  # the config of each modality


def main(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Probes, prints the table, writes it, and returns what was written."""
    if not flags.FLAGS.run:
        raise UserError("no --run given; expected --run=FOLDER, for example --run=runs/bert_mlm")
    for part, what in (("pretext", "pretrain"), ("task", "fine-tune")):
        if part in config:
            expected = f"configs/evaluate/{PUBLISHED[modality_of(flags.FLAGS.run)]}"
            raise UserError(
                f"--config is one to {what} with (it has config.{part}); expected {expected} or one like it"
            )
    configure()
    run = load_run(Path(flags.FLAGS.run), flags.FLAGS.step)
    return evaluate(_built(config.to_dict(), run), Path(flags.FLAGS.run), run)


def _built(written: Mapping[str, Any], run: LoadedRun) -> ProbeConfig:
    """The config, of the run's modality.

    Raises:
      UserError: it is wrong, or one for runs of another modality.
    """
    try:
        return build(probe_of(run).config_class, written)
    except UserError:
        own = run.objective.modality
        if others := [other for other in PUBLISHED if other != own and _fits(written, other)]:
            raise UserError(
                f"--config is one for runs on {others[0]}, and {flags.FLAGS.run} is one on {own}; expected "
                f"configs/evaluate/{PUBLISHED[own]} or one like it"
            ) from None
        raise


def _fits(written: Mapping[str, Any], modality: str) -> bool:
    try:
        build(load_class(modality, PROBES, "modality").config_class, written)
    except UserError:
        return False
    return True


def probe_of(run: LoadedRun) -> Probe:
    """What the run's modality adds to an evaluation."""
    return load_class(run.objective.modality, PROBES, "modality")()


def evaluate(config: ProbeConfig, folder: Path, run: LoadedRun) -> dict[str, Any]:
    """As `main`.

    Raises:
      UserError: the run, the data or the probes cannot be, before anything is written; or the supervised baseline.
    """
    probe = probe_of(run)
    if not config.data.test_split:
        raise UserError("config.data.test_split is empty; expected a split to test on, such as test or train[90%:]")
    data = probe.open(config, folder, run)
    rows = dict(zip(SPLITS, (data.train, data.eval, data.test), strict=True))
    console, classes = Console(), len(data.label_names)
    sizes = ", ".join(f"{len(of):,} {split}" for split, of in rows.items())
    console.say(f"step {run.step} of {folder} on {config.data.source}: {sizes} rows, {classes} labels")
    values = {
        "run": str(folder),
        "step": run.step,
        "config": dataclasses.asdict(config),
        "rows": {split: len(of) for split, of in rows.items()},
        "labels": list(data.label_names),
    }
    made = {"pretrained": _features(run, config, rows, run.variables)}
    _check_features(made["pretrained"], run)
    batch = {name: value for name, value in data.train.fetch(np.arange(1)).items() if name != "label"}
    fresh = jax.jit(lambda key: unbox(run.objective.init(key, batch | {"row": np.arange(1)})))
    for seed in range(config.random_encoders):
        made[f"random {seed}"] = _features(run, config, rows, fresh(jax.random.key(config.seed + seed)))
    raw = probe.raw(config, rows, run)
    made |= {"raw": raw} if raw else {}
    labels = {split: found.labels for split, found in made["pretrained"].items()}
    target, results = _target(folder / "evaluate", config.name, values), []
    if config.supervised:
        trained = _supervised(config, probe.data(config, run), folder, run, target / "supervised")
        made["supervised"] = _features(trained, config, rows, trained.variables)
        predicted = _head(trained, rows["test"], config.batch_size)
        results.append(result("supervised", "its head", predicted, labels["test"], {}))
    for name, split in made.items():
        results += _probes(name, split, config, classes)
    results += probe.baselines(config, rows, labels, run)
    commonest = np.full(len(labels["test"]), np.bincount(labels["train"]).argmax())
    results.append(result("commonest label", "none", commonest, labels["test"], {}))
    console.table(f"{config.name}: test rows", _table(results))
    write_text(target / "probes.json", json.dumps(values | {"results": results}, indent=2) + "\n")
    shown = {name: of["test"].features for name, of in made.items() if name in ("pretrained", "random 0")}
    write_figure(
        target / "projection.png", draw_projections(shown, labels["test"], data.label_names, config.projection)
    )
    pictures = probe.pictures(config, rows, run)
    for name, picture in pictures.items():
        write_picture(target / f"{name}.png", picture)
    drawn = [f"{name}.png" for name in ("projection", *pictures)]
    _to_tensorboard(target, drawn, run.step)
    console.say(f"written: {', '.join(f'{display(target)}/{name}' for name in ('probes.json', *drawn))}")
    return values | {"results": results}


def _features(run: LoadedRun, config: ProbeConfig, rows: Mapping[str, Any], variables: Any) -> dict[str, Labelled]:
    encoder = Encoder(run.objective.encode, config.batch_size)
    frozen, trained = (run.objective.encoder(of["params"], of["state"]) for of in (variables, run.variables))
    if CODEBOOK in trained["params"]:  # which no training has made, so that random encoders have it too
        frozen = {**frozen, "params": {**frozen["params"], CODEBOOK: trained["params"][CODEBOOK]}}
    return {split: encoder(frozen, of) for split, of in rows.items()}


def _supervised(config: ProbeConfig, data: Mapping[str, Any], folder: Path, run: LoadedRun, workdir: Path) -> LoadedRun:
    """The same architecture trained on the labels alone, for as many steps of as many rows; resumed if it was begun."""
    equal = {"steps": run.step, "batch_size": run.written["batch_size"], "seed": config.seed}
    written = {**config.supervised, "init": f"scratch:{folder}", **equal}
    written["data"] = dict(data)
    optimizer = written.get("optimizer", {})
    warmup = optimizer.get("warmup_steps", OptimizerConfig.warmup_steps)
    # As for the run, so for its baseline: a run that was stopped early is compared with one that warms up in time.
    written["optimizer"] = {**optimizer, "warmup_steps": min(warmup, run.step // 10)}
    finetune.main(ml_collections.ConfigDict(written), workdir)
    return load_run(workdir)


def _head(run: LoadedRun, rows: Any, batch_size: int) -> np.ndarray:
    """The classes that a classifier gives to rows."""
    logits = lambda variables, batch: run.objective.logits(variables["params"], variables["state"], batch)  # noqa: E731
    return Encoder(logits, batch_size)(run.variables, rows).features.argmax(-1)


def _target(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """The folder of this evaluation: the first of its name that is free, or of one of the same kind, even a killed one.

    What it is of is written first: a baseline may train there for minutes, which only the same evaluation goes on with.
    """
    kind = json.loads(json.dumps({key: values[key] for key in ("step", "config")}))
    for number in itertools.count(1):
        target = folder / (name if number == 1 else f"{name}_{number}")
        file = target / "evaluation.json"
        if not target.exists():
            write_text(file, json.dumps(kind, indent=2) + "\n")
            return target
        try:
            if json.loads(file.read_text(encoding="utf8")) == kind:
                return target
        except (OSError, ValueError):  # cut short, or a folder of something else; it stays
            continue


def _to_tensorboard(target: Path, drawn: list[str], step: int) -> None:
    """Shows pictures of the folder in TensorBoard, in place of those of the same evaluation made before."""
    for before in target.glob("events.*"):
        before.unlink()
    with tempfile.TemporaryDirectory() as made:
        board = SummaryWriter(made)
        for name in drawn:
            picture = Image.open(io.BytesIO((target / name).read_bytes())).convert("RGB")
            board.add_image(f"evaluate/{name.removesuffix('.png')}", np.asarray(picture), step, dataformats="HWC")
        board.close()
        upload(LocalPath(made), target)


def _check_features(splits: Mapping[str, Labelled], run: LoadedRun) -> None:
    for split, found in splits.items():
        if not np.isfinite(found.features).all():
            raise UserError(f"features of {split} rows are not finite; step {run.step} of {run.name} has diverged")


def _probes(name: str, splits: Mapping[str, Labelled], config: ProbeConfig, classes: int) -> list[dict[str, Any]]:
    train, validation, test = (splits[split] for split in SPLITS)
    probe = linear_probe(
        train.features,
        train.labels,
        validation.features,
        validation.labels,
        classes=classes,
        config=config.linear,
        seed=config.seed,
    )
    chosen = {name: getattr(probe, name) for name in ("validation_accuracy", "learning_rate", "weight_decay")}
    votes = knn_scores(train.features, train.labels, test.features, classes=classes, config=config.knn)
    found = few_shot(
        train.features,
        train.labels,
        test.features,
        test.labels,
        classes=classes,
        config=config.few_shot,
        seed=config.seed,
    )
    return [
        result(name, "linear", probe.logits(test.features).argmax(-1), test.labels, chosen),
        result(name, "knn", votes.argmax(-1), test.labels, {}),
        *(
            {"features": name, "probe": f"{count} a class", "accuracies": accuracies.tolist(), "chosen": {}}
            for count, accuracies in found.items()
        ),
    ]


def _table(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each kind of features and probe; random encoders are one, with mean and deviation over their seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in results:
        name = "random" if found["features"].startswith("random ") else found["features"]
        groups.setdefault((name, found["probe"]), []).append(found)
    table = []
    for (name, probe), members in groups.items():
        row = {"features": name if len(members) == 1 else f"{name} ({len(members)} seeds)", "probe": probe}
        for metric in ("accuracy", "macro_f1"):
            # Few-shot has an accuracy for each draw of labels and no other score.
            values = [
                value
                for member in members
                for value in (member.get("accuracies", []) if metric not in member else [member[metric]])
                if metric == "accuracy" or metric in member
            ]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            row[metric] = f"{np.mean(values):.3f}{spread}" if values else ""
        chosen = members[0]["chosen"] if len(members) == 1 else {}
        row["chosen on validation"] = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        table.append(row)
    return table


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "Run folder")
    flags.DEFINE_integer("step", None, "Checkpoint")
    entry.run(main, needs_workdir=False)

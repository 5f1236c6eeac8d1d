"""Probes a frozen encoder: ``python -m sslx.evaluate --run=runs/bert_mlm --config=configs/evaluate/text_probe.py``.

Features of labelled texts (`Objective.encode`) go through a linear probe and nearest neighbours, beside those of the
same architecture with random parameters and beside logistic regression on TF-IDF. The table is printed, and written
with a picture to RUN/evaluate/NAME/. An evaluation with another config or of another checkpoint that finds this folder
taken goes to NAME_2, NAME_3 and so on, so that nothing is lost; the same evaluation again replaces its own.

  --run=FOLDER            the run
  --step=N                which checkpoint; default: the best of a task's run, the newest of any other
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from etils.epath import Path
from sklearn.metrics import accuracy_score, f1_score

from sslx import entry
from sslx.config import build
from sslx.data.text import PreparedText, TextConfig, prepare_text
from sslx.errors import UserError
from sslx.inference.loading import LoadedRun, load_run
from sslx.probing.knn import KnnConfig, knn_scores
from sslx.probing.linear import LinearProbeConfig, linear_probe
from sslx.probing.picture import draw_projections
from sslx.probing.text import Encoder, Labelled, bag_of_words, texts_of
from sslx.runtime import configure, display
from sslx.storage import local_copy, write_figure, write_text
from sslx.train.console import Console
from sslx.train.sharding import unbox

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """The config of an evaluation by probes."""

    name: str = "text_probe"  # of the folder that it writes
    seed: int = 0
    batch_size: int = 64  # rows that are encoded at once
    random_encoders: int = 3  # seeds of the baseline with random parameters; 0: none
    bag_of_words: bool = True  # the TF-IDF baseline
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    linear: LinearProbeConfig = dataclasses.field(default_factory=LinearProbeConfig)
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)

    def __post_init__(self):
        for name, least in {"seed": 0, "batch_size": 1, "random_encoders": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"config.{name} is {getattr(self, name)}; expected at least {least}")
        if not self.name or "/" in self.name:
            raise UserError(f"config.name is {self.name!r}; expected the name of a folder")


def main(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Probes, prints the table, writes it, and returns what was written."""
    if not flags.FLAGS.run:
        raise UserError("no --run given; expected --run=FOLDER, for example --run=runs/bert_mlm")
    configure()
    return evaluate(build(ProbeConfig, config.to_dict()), Path(flags.FLAGS.run), flags.FLAGS.step)


def evaluate(config: ProbeConfig, folder: Path, step: int | None = None) -> dict[str, Any]:
    """As `main`.

    Raises:
      UserError: the run, the data or the probes cannot be; before anything is written.
    """
    run = load_run(folder, step)
    data = _data(config, folder, run)
    rows = dict(zip(SPLITS, (data.train, data.eval, data.test), strict=True))
    console = Console()
    sizes = ", ".join(f"{len(of):,} {split}" for split, of in rows.items())
    console.say(f"step {run.step} of {folder} on {config.data.source}: {sizes} rows, {len(data.label_names)} labels")
    encoder, objective = Encoder(run.objective, config.batch_size), run.objective

    def features(variables: Any) -> dict[str, Labelled]:
        return {
            split: encoder(objective.encoder(variables["params"], variables["state"]), of) for split, of in rows.items()
        }

    made = {"pretrained": features(run.variables)}
    _check_features(made["pretrained"], run)
    batch = {name: value for name, value in data.train.fetch(np.arange(1)).items() if name != "label"}
    fresh = jax.jit(lambda key: unbox(objective.init(key, batch | {"row": np.arange(1)})))
    for seed in range(config.random_encoders):
        made[f"random {seed}"] = features(fresh(jax.random.key(config.seed + seed)))
    results = []
    for name, split in made.items():
        results += _probes(name, split, config, len(data.label_names))
    labels = {split: found.labels for split, found in made["pretrained"].items()}
    if config.bag_of_words:
        texts = {split: texts_of(of, run.tokenizer) for split, of in rows.items()}
        guesses, chosen = bag_of_words(texts, labels)
        results.append(_result("TF-IDF", "linear", guesses, labels["test"], chosen))
    commonest = np.full(len(labels["test"]), np.bincount(labels["train"]).argmax())
    results.append(_result("commonest label", "none", commonest, labels["test"], {}))
    console.table(f"{config.name}: test rows", _table(results))
    values = {
        "run": str(folder),
        "step": run.step,
        "config": dataclasses.asdict(config),
        "rows": {split: len(of) for split, of in rows.items()},
        "labels": list(data.label_names),
        "results": results,
    }
    target = _target(folder / "evaluate", config.name, values)
    write_text(target / "probes.json", json.dumps(values, indent=2) + "\n")
    shown = {name: of["test"].features for name, of in made.items() if name in ("pretrained", "random 0")}
    write_figure(target / "projection.png", draw_projections(shown, labels["test"], data.label_names))
    console.say(f"written: {display(target)}/probes.json, {display(target)}/projection.png")
    return values


def _target(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """The folder of this evaluation: the first of its name that is free, or that holds one of the same kind."""
    kind = json.loads(json.dumps({key: values[key] for key in ("step", "config")}))
    for number in itertools.count(1):
        target = folder / (name if number == 1 else f"{name}_{number}")
        file = target / "probes.json"
        if not file.is_file():
            return target
        try:
            found = json.loads(file.read_text(encoding="utf8"))
        except ValueError:  # cut short, or of something else; it stays
            continue
        if isinstance(found, dict) and {key: found.get(key) for key in kind} == kind:
            return target


def _data(config: ProbeConfig, folder: Path, run: LoadedRun) -> PreparedText:
    """Labelled rows with the run's tokenizer, no longer than its own."""
    if run.longest is not None and config.data.seq_len > run.longest:
        raise UserError(
            f"config.data.seq_len is {config.data.seq_len}, and {folder} has learned from rows of {run.longest}; "
            f"expected at most that"
        )
    if not config.data.test_split:
        raise UserError("config.data.test_split is empty; expected a split to test on, such as test or train[90%:]")
    tokenizer = str(local_copy(folder / "tokenizer"))
    data = prepare_text(config.data, layout="documents", tokenizer_override=tokenizer, seed=config.seed)
    if not data.label_names:
        raise UserError(
            f"config.data.source {config.data.source!r} has no labels; "
            f"expected a column {config.data.label_field!r} (config.data.label_field)"
        )
    return data


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
    return [
        _result(name, "linear", probe.logits(test.features).argmax(-1), test.labels, chosen),
        _result(name, "knn", votes.argmax(-1), test.labels, {}),
    ]


def _result(features: str, probe: str, guesses: np.ndarray, labels: np.ndarray, chosen: dict) -> dict[str, Any]:
    present = np.unique(np.concatenate([labels, guesses]))
    macro_f1 = float(f1_score(labels, guesses, labels=present, average="macro", zero_division=0))
    accuracy = float(accuracy_score(labels, guesses))
    return {"features": features, "probe": probe, "accuracy": accuracy, "macro_f1": macro_f1, "chosen": chosen}


def _table(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each kind of features and probe; random encoders are one, with mean and deviation over their seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        name = "random" if result["features"].startswith("random ") else result["features"]
        groups.setdefault((name, result["probe"]), []).append(result)
    table = []
    for (name, probe), members in groups.items():
        row = {"features": name if len(members) == 1 else f"{name} ({len(members)} seeds)", "probe": probe}
        for metric in ("accuracy", "macro_f1"):
            values = np.array([member[metric] for member in members])
            row[metric] = f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
        chosen = members[0]["chosen"] if len(members) == 1 else {}
        row["chosen on validation"] = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        table.append(row)
    return table


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "Run folder")
    flags.DEFINE_integer("step", None, "Checkpoint")
    entry.run(main, needs_workdir=False)

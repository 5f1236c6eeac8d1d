"""GLUE from the command line: a pair task and STS-B end to end in real processes, and the table's arithmetic."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_folders import write_tfds

from sslx.entry import load_config
from sslx.glue import CONFIG, Row, results, row_scores
from sslx.session import train
from sslx.tasks.glue import GLUE, average

TEXT = tfds.features.Text()
MNLI = {"premise": TEXT, "hypothesis": TEXT, "idx": np.int32} | {
    "label": tfds.features.ClassLabel(names=["entailment", "neutral", "contradiction"])
}
STSB = {"sentence1": TEXT, "sentence2": TEXT, "label": np.float32, "idx": np.int32}


def made(split, fields, rows, label):
    """Records with GLUE's features; hidden labels are -1, as TFDS writes them."""
    texts = [f"{split} number {i}. A man plays the guitar {'well' * (i % 3)}" for i in range(rows)]
    first, second = fields
    return [{first: t, second: t[::-1], "label": label(i), "idx": i} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    """A folder with a pretrained run and two of GLUE's data sets."""
    folder = tmp_path_factory.mktemp("glue")
    sizes = {"train": 24, "validation_matched": 11, "validation_mismatched": 9, "test_matched": 5, "test_mismatched": 5}
    splits = {
        name: made(name, ("premise", "hypothesis"), rows, lambda i, name=name: -1 if "test" in name else i % 3)
        for name, rows in sizes.items()
    }
    write_tfds(folder / "tfds", "glue/mnli", MNLI, splits, "2.0.0")
    splits = {
        name: made(name, ("sentence1", "sentence2"), rows, lambda i, name=name: -1.0 if name == "test" else i % 11 / 2)
        for name, rows in {"train": 24, "validation": 13, "test": 5}.items()
    }
    write_tfds(folder / "tfds", "glue/stsb", STSB, splits, "2.0.0")
    written = tiny_config(changes={"eval.batches": 1, "steps": 3}).to_dict()
    train(written, folder / "pretrained", part="pretext", tokenizer=None, title="test")
    return folder


CHANGES = ("--config.data.tfds_dir=tfds", "--config.data.seq_len=32", "--config.steps=3", "--config.batch_size=8")
COMMAND = ("--init=pretrained", "--workdir=out", "--tasks=stsb,mnli", *CHANGES, "--config.optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def first(entries, folder):
    """The command with a file in the way of its first row."""
    (folder / "out").mkdir()
    (folder / "out" / "stsb_0").write_text("in the way")
    return entries.run("glue", *COMMAND, folder=folder)


@pytest.fixture(scope="module")
def again(entries, folder, first):
    """The same command after the file is gone; when the row that was finished last changed."""
    (folder / "out" / "stsb_0").unlink()
    before = (folder / "out" / "mnli_0" / "report.json").stat()
    return entries.run("glue", *COMMAND, folder=folder), before


def test_a_row_that_fails_loses_no_other(first, folder):
    code, said, error = first
    assert code == 2
    assert error.startswith("error: 1 of 2 rows failed: stsb_0; the others are reported")
    assert error.count("\n") == 1
    assert "row 1 mnli_0: matched " in said


def test_the_same_command_runs_what_is_missing_and_tells_published_scores(again, folder):
    (code, said, error), before = again
    assert (code, error) == (0, "")
    after = (folder / "out" / "mnli_0" / "report.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for part in ("STS-B", "pearson", "spearman", "MNLI", "matched", "mismatched", "needs cola, sst2, mrpc"):
        assert part in said
    assert "on the validation sets, since the test labels are not public\n" in said
    found = json.loads((folder / "out" / "results.json").read_text())
    assert (found["init"], found["split"], found["average"]) == ("pretrained", "validation", None)
    scores = found["tasks"]["mnli"]["scores"]
    report = json.loads((folder / "out" / "mnli_0" / "report.json").read_text())
    matrix = np.array(report["confusion_matrix"])
    assert matrix.sum() == 9  # the mismatched rows
    assert scores["mismatched"]["mean"] == pytest.approx(100 * np.trace(matrix) / 9)
    held_out = [json.loads(line) for line in (folder / "out" / "mnli_0" / "metrics.jsonl").read_text().splitlines()]
    assert scores["matched"]["seeds"] == [100 * next(r["eval/accuracy"] for r in held_out if "eval/accuracy" in r)]
    assert -100 <= found["tasks"]["stsb"]["scores"]["spearman"]["mean"] <= 100
    assert (folder / "out" / "stsb_0" / "predictions.png").is_file()


def test_rows_are_runs_of_the_recipe_from_the_pretrained_encoder(again, folder):
    for name, pair in (("mnli", "hypothesis"), ("stsb", "sentence2")):
        config = json.loads((folder / "out" / f"{name}_0" / "config.json").read_text())
        assert config["init"] == "pretrained"
        assert config["model"]["width"] == 32
        assert config["data"]["pair_field"] == pair
        assert config["optimizer"]["learning_rate"] == 2e-5
        tokenizers = (folder / run / "tokenizer" / "tokenizer.json" for run in ("pretrained", f"out/{name}_0"))
        vocabularies = [json.loads(file.read_text())["model"]["vocab"] for file in tokenizers]
        assert vocabularies[0] == vocabularies[1]


def test_the_rows_are_listed_without_a_start(entries, tmp_path):
    code, said, error = entries.run("glue", "--list", "--tasks=rte,cola", "--seeds=2", folder=tmp_path)
    assert (code, error) == (0, "")
    assert [name for name in said.split() if "_" in name] == ["cola_0", "cola_1", "rte_0", "rte_1"]
    assert list(tmp_path.iterdir()) == []
    code, _, error = entries.run("glue", "--tasks=rte", folder=tmp_path)
    assert (code, error[:19]) == (2, "error: no run given")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks=rte,mnli", "--workdir=new"), "rte: TFDS dataset 'glue/rte' is not prepared in tfds"),
        (("--tasks=rte,cola,mnli", "--workdir=new"), "; cola neither"),
        (("--tasks=rte,mnli", "--workdir=new"), "--tasks=mnli runs those that are ready"),
        (("--tasks=mnlii",), "unknown task of GLUE 'mnlii'; did you mean 'mnli'?"),
        (("--init=pretraind",), "no run in 'pretraind'"),
        (("--init=scratch:pretrained",), "holds GLUE of another start or recipe: init was 'pretrained'"),
        (("--config.steps=4",), "steps was 3, now 4; give another --workdir"),
        (("--config.data.source=csv:a.csv",), "config.data.source is 'csv:a.csv'; with sslx.glue, --init"),
        (("--learning_rates=2e-5,fast",), "--learning_rates: 'fast' is no rate"),
        (("--row=2",), "no row 2; GLUE has rows 0 to 1"),
        (("--report", "--workdir=new"), "new holds nothing of GLUE to report"),
        (("--workdir=pretrained",), "pretrained is the folder of a run"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(again, entries, folder, arguments, message):
    code, _, error = entries.run("glue", *COMMAND, *arguments, folder=folder)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (folder / "new").exists()


def test_the_average_is_that_of_berts_table():
    # Table 1 of arXiv 1810.04805: MNLI-(m/mm), QQP, QNLI, SST-2, CoLA, STS-B, MRPC, RTE, and the average it prints.
    for *columns, printed in (
        (84.6, 83.4, 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4, 79.6),
        (86.7, 85.9, 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1, 82.1),
    ):
        m, mm, qqp, qnli, sst2, cola, stsb, mrpc, rte = columns
        scores = {
            "mnli": {"matched": m, "mismatched": mm},
            "qqp": {"f1": qqp, "accuracy": 0.0},
            "qnli": {"accuracy": qnli},
            "sst2": {"accuracy": sst2},
            "cola": {"matthews": cola},
            "stsb": {"spearman": stsb, "pearson": 0.0},
            "mrpc": {"f1": mrpc, "accuracy": 0.0},
            "rte": {"accuracy": rte},
        }
        assert average(scores) == pytest.approx(printed, abs=0.05)
        assert average(scores | {"wnli": {"accuracy": 0.0}}) == average(scores)
        del scores["rte"]
        assert average(scores) is None


def test_the_best_learning_rate_is_reported_with_its_spread(tmp_path):
    accuracies = {"2e-5": (0.5, 0.6), "3e-5": (0.7, 0.9), "4e-5": (0.8, 0.7)}
    rows = [Row("rte", seed, rate) for rate in accuracies for seed in (0, 1)]
    for row in rows:
        (tmp_path / row.name).mkdir()
        report = {"step": 7, "eval/accuracy": accuracies[row.learning_rate][row.seed], "eval/f1": 0.1}
        (tmp_path / row.name / "report.json").write_text(json.dumps(report))
    found = results(rows, tmp_path)["tasks"]["rte"]
    assert found["learning_rate"] == 3e-5
    score = found["scores"]["accuracy"]
    assert score["mean"] == pytest.approx(80.0)
    assert score["sd"] == pytest.approx(np.std([70, 90], ddof=1))
    shutil.rmtree(tmp_path / "rte_3e-5_0")
    assert row_scores(GLUE["rte"], tmp_path / "rte_3e-5_0") is None
    assert results(rows, tmp_path)["tasks"]["rte"]["scores"]["accuracy"]["seeds"] == pytest.approx([90.0])


@pytest.mark.parametrize("name", GLUE)
def test_every_task_has_a_config_of_its_fields(name):
    config = load_config(CONFIG, name)
    assert config.data.source == f"tfds:glue/{name}"
    assert config.steps == pytest.approx(3 * GLUE[name].train_rows / 32, abs=1)
    assert config.task.name == ("text_regression" if name == "stsb" else "text_classification")

"""Text classification: its loss against NumPy, and fine-tuning from a pretrained run through the real entry."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from entries import REPOSITORY
from tfds_folders import write_tfds

from sslx import finetune, main
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.bert import BertConfig
from sslx.session import run_config, train
from sslx.tasks.text_classification import TextClassification, TextClassificationConfig
from sslx.tasks.text_regression import TextRegression
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import from_scratch, load_encoder, open_start
from sslx.train.loop import Trainer
from sslx.train.sharding import unbox

MODEL = BertConfig(layers=1, width=32, heads=4, mlp_width=64, max_length=32, dropout=0.0, attention_dropout=0.0)


def objective_with(vocabulary, **task):
    return TextClassification(TextClassificationConfig(**task), MODEL, vocabulary.size, None, ("a", "b", "c"))


@pytest.fixture
def batch(packed_rows):
    rows = {name: packed_rows(8, 24)[name] for name in ("tokens", "segment_ids", "positions", "row")}
    return rows | {"label": (np.arange(8) % 3).astype(np.int32)}


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_the_loss_is_the_cross_entropy_of_the_logits(vocabulary, batch, pool):
    objective = objective_with(vocabulary, pool=pool, label_smoothing=0.2, dropout=0.0)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0), batch))())["params"]
    params = jax.tree.map(lambda array: array * 5.0, params)
    viewed = objective.views(batch, jax.random.key(0), 0, train=True)
    logits = np.float64(objective.module.apply({"params": params}, viewed, deterministic=True))
    assert logits.shape == (8, 3)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for train_, smoothing in ((True, 0.2), (False, 0.0)):  # evaluation is not smoothed
        target = (1 - smoothing) * np.eye(3)[batch["label"]] + smoothing / 3
        out = objective.loss(params, {}, viewed, jax.random.key(0), jnp.int32(0), train=train_)
        assert out.terms["classification"].sum == pytest.approx(-(target * log_probabilities).sum(), rel=1e-5)
    assert out.metrics["accuracy"].sum == (logits.argmax(-1) == batch["label"]).sum()


def test_scores_are_those_of_all_rows_at_once(vocabulary):
    labels = np.array([0, 0, 0, 1, 1, 2])
    guesses = np.array([0, 0, 1, 1, 2, 2])
    predictions = {"label": labels, "logits": np.eye(3)[guesses], "tokens": np.zeros((6, 4), int)}
    objective = objective_with(vocabulary)
    found = objective.score(predictions)
    # F1 = 2 hits / (true + guessed): 4/5, 2/4, 2/3. Matthews (Gorodkin's R_K): covariances of the indicators.
    true, guessed = np.eye(3)[labels], np.eye(3)[guesses]
    covariance = lambda a, b: np.sum((a - a.mean(0)) * (b - b.mean(0)))  # noqa: E731
    correlation = covariance(true, guessed) / np.sqrt(covariance(true, true) * covariance(guessed, guessed))
    assert found == {
        "macro_f1": pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3),
        "matthews": pytest.approx(correlation),
    }
    report = objective.report(predictions)
    assert report.values["confusion_matrix"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert report.values["labels"] == ["a", "b", "c"]


def test_of_two_classes_f1_is_that_of_the_second_as_glue_has_it(vocabulary):
    objective = TextClassification(TextClassificationConfig(), MODEL, vocabulary.size, None, ("no", "yes"))
    labels, guesses = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    found = objective.score({"label": labels, "logits": np.eye(2)[guesses]})
    tp, fp, fn, tn = 2, 1, 1, 4
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(expected)
    same = {"label": np.ones(4, int), "logits": np.eye(2)[[1, 1, 1, 1]]}
    assert objective.score(same) == {"macro_f1": 1.0, "matthews": 0.0, "f1": 1.0}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny_config):
    """A run of a few steps."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    written = tiny_config(changes={"eval.batches": 1}).to_dict()
    train(written, run, part="pretext", tokenizer=None, title="test")
    return run


def classification(tiny_config, run, **changes):
    settings = {"checkpoint.best_metric": "eval/macro_f1", "optimizer.layer_decay": 0.9, "init": str(run), **changes}
    return tiny_config("finetune/text_classification", settings)


def test_a_single_label_is_refused(tiny_config, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "some words to read,thing\n" * 60)
    config = tiny_config("finetune/text_classification", {"data.source": f"csv:{file}"})
    with pytest.raises(UserError, match="has one label, 'thing'; expected at least 2"):
        TextClassification.prepare(config.to_dict())


@pytest.mark.parametrize(
    ("label", "count", "said"),
    [
        # Grades, and prices of which hardly two are the same.
        (lambda i: f"{i % 9 / 2}", 9, r"are numbers \('0.5' is one of 9\).*_classification.py:data=...,labels=number"),
        (lambda i: str(1000 + i % 40), 40, r"are 40 different ones in 60 records, and no classes; .*labels=number"),
        (lambda i: f"title {i % 40}", 40, r"are 40 different ones in 60 records.*; config.data.label_field names the"),
        # Classes, whatever they are called.
        (lambda i: str(i % 30), 30, ""),
        (lambda i: f"{i % 3}.0", 3, ""),
        (lambda i: ["1.5", "nan", "v1.5"][i % 3], 3, ""),
        (lambda i: ["inf", "0.5", "1"][i % 3], 3, ""),
    ],
)
def test_labels_that_are_no_classes_are_refused(tiny_config, tmp_path, label, count, said):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"some words to read,{label(i)}\n" for i in range(60)))
    changes = {"data.source": f"csv:{file}", "data.tokenizer": "byte"}
    config = tiny_config("finetune/text_classification", changes).to_dict()
    if not said:
        assert len(TextClassification.prepare(config)[0].label_names) == count
        return
    with pytest.raises(UserError, match=said) as refused:
        TextClassification.prepare(config)
    assert "\n" not in str(refused.value)


def test_labels_that_are_numbers_are_predicted_as_the_refusal_says(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"some words to read,{i / 2}\n" for i in range(60)))
    for name in ("text_classification", "text_pairs"):
        path = REPOSITORY / "configs" / "finetune" / f"{name}.py"
        changes = {"tokenizer": "byte"} | ({"pair_field": "text"} if name == "text_pairs" else {})
        written = load_config(path, f"data=csv:{file}").to_dict()
        written["data"] |= changes
        with pytest.raises(UserError, match=rf"--config=configs/finetune/{name}.py:data=...,labels=number$"):
            TextClassification.prepare(written)
        written = load_config(path, f"data=csv:{file},labels=number").to_dict()
        written["data"] |= changes
        _, data = TextRegression.prepare(written)
        found = data.train.fetch(np.arange(len(data.train)))["label"]
        assert set(found.tolist()) < {i / 2 for i in range(60)}
        assert written["checkpoint"]["best_metric"] == "eval/spearman"


def test_fine_tuning_starts_from_the_encoder_of_the_run(pretrained, tiny_config):
    written = json.loads(classification(tiny_config, pretrained).to_json())
    written["model"] = json.loads((pretrained / "config.json").read_text())["model"]
    objective, data = TextClassification.prepare(written, str(pretrained / "tokenizer"))
    trainer = Trainer(run_config(written, "task"), objective, data)
    params, notes = load_encoder(trainer.program.abstract.params, open_start(pretrained))
    assert notes == []
    state = jax.device_get(trainer.program.started_from(params))
    jax.tree.map(
        np.testing.assert_array_equal, state.params["encoder"], read_variables(pretrained)["params"]["encoder"]
    )
    assert int(state.step) == 0
    fresh = jax.device_get(trainer.program.fresh())
    np.testing.assert_array_equal(state.params["head"]["kernel"], fresh.params["head"]["kernel"])
    assert (state.params["encoder"]["embeddings"]["word"] != fresh.params["encoder"]["embeddings"]["word"]).any()


def test_parameters_that_do_not_fit_are_named(pretrained):
    encoder = read_variables(pretrained)["params"]["encoder"]
    wanted = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), encoder)
    wanted["embeddings"]["word"] = jax.ShapeDtypeStruct((640, 32), np.float32)
    wanted["embeddings"]["extra"] = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(UserError) as error:
        load_encoder({"encoder": wanted}, open_start(pretrained))
    assert "missing there: embeddings/extra" in str(error.value)
    assert "embeddings/word (512, 32) there, (640, 32) expected" in str(error.value)
    del wanted["embeddings"]["extra"]
    wanted["embeddings"].pop("word")
    _, notes = load_encoder({"encoder": wanted}, open_start(pretrained))
    assert notes == [f"config.init {pretrained}: unused parameters embeddings/word"]
    with pytest.raises(UserError, match=r"no run in|no checkpoint in"):
        load_encoder({"encoder": wanted}, open_start(pretrained.parent / "nothing"))


def test_pretraining_from_a_run_keeps_its_vocabulary(pretrained, tiny_config, tmp_path):
    # A tokenizer trained anew would give the loaded embeddings to other tokens, and shapes would not tell.
    half = {"data.train_split": "train[:45%]", "steps": 3}
    session = main.main(tiny_config(changes={"eval.batches": 1, "init": str(pretrained), **half}), tmp_path / "run")
    files = (run / "tokenizer" / "tokenizer.json" for run in (pretrained, tmp_path / "run"))
    theirs, ours = (json.loads(file.read_text()) for file in files)
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert session.data.vocabulary.size == len(ours["model"]["vocab"])


def test_a_run_whose_name_begins_with_scratch_is_a_run():
    assert [from_scratch(init) for init in ("", "scratch", "scratch:runs/a")] == [True] * 3
    assert not from_scratch("scratch_bert")


def test_a_test_split_that_is_not_read_is_told(pretrained, tiny_config, tmp_path, made_up_texts, capsys):
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(made_up_texts)]
    write_tfds(tmp_path, "reviews", features, {"train": rows[:40], "test": rows[40:]})
    settings = {"data.source": "tfds:reviews", "data.tfds_dir": str(tmp_path), "steps": 2, "optimizer.warmup_steps": 1}
    settings["checkpoint.best_metric"] = "eval/loss"
    note = "note: the data have a split 'test'; with --config.data.test_split=test the report at the end is on it\n"
    finetune.main(classification(tiny_config, pretrained, **settings), tmp_path / "without")
    assert note in capsys.readouterr().out
    finetune.main(classification(tiny_config, pretrained, **settings, **{"data.test_split": "test"}), tmp_path / "with")
    assert note not in capsys.readouterr().out
    reports = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("without", "with"))
    rows = [(report["split"], np.sum(report["confusion_matrix"])) for report in reports]
    assert rows == [("eval", 4), ("test", 20)]


def test_fine_tuning_reports_on_its_best_checkpoint(pretrained, tiny_config, tmp_path):
    run = tmp_path / "finetuned"
    splits = {"data.test_split": "train[:10%]", "data.train_split": "train[10%:90%]"}
    finetune.main(classification(tiny_config, pretrained, **splits, **{"steps": 12, "eval.every_steps": 4}), run)
    report = json.loads((run / "report.json").read_text())
    assert report["split"] == "test"
    assert report["init"] == str(pretrained)
    assert report["step"] in (4, 8, 12)
    matrix = np.array(report["confusion_matrix"])
    assert matrix.sum() > 30
    assert report["test/accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert set(report["labels"]) <= {"argparse", "decimal", "email.message", "statistics", "tarfile"}
    for picture in ("confusion_matrix.png", "curves.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")

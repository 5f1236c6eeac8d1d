"""Probes of a frozen encoder, end to end on a small run: features, baselines, table and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from entries import REPOSITORY

from sslx.config import build, to_config_dict
from sslx.data.text import TextConfig, prepare_text
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.evaluate import evaluate
from sslx.inference.loading import load_run
from sslx.probing.features import Encoder
from sslx.probing.few_shot import FewShotConfig
from sslx.probing.linear import LinearProbeConfig
from sslx.probing.picture import project
from sslx.probing.text import TextProbeConfig, bag_of_words

SPLITS = dict(train_split="train[:70%]", eval_split="train[70%:85%]", test_split="train[85%:]")


@pytest.fixture(scope="module")
def config(corpus_file):
    return TextProbeConfig(
        data=TextConfig(f"jsonl:{corpus_file}", seq_len=32, **SPLITS),
        linear=LinearProbeConfig((0.01,), (1e-3, 1e-2), 40),
        few_shot=FewShotConfig((2,), draws=3, steps=20),
        projection="pca",
        random_encoders=2,
        batch_size=32,
    )


def test_the_entry_writes_a_table_and_a_picture(trained, config, entries, tmp_path):
    run = trained("bert_mlm")
    values = to_config_dict(config).to_dict()
    (tmp_path / "probe.py").write_text(
        "from sslx.config import build, to_config_dict\n"
        "from sslx.probing.text import TextProbeConfig\n\n\n"
        f"def get_config():\n    return to_config_dict(build(TextProbeConfig, {values!r}))\n"
    )
    ended = entries.run("evaluate", f"--run={run}", "--config=probe.py", folder=tmp_path)
    assert ended.code == 0, ended.stderr
    written = json.loads((run / "evaluate" / "text_probe" / "probes.json").read_text())
    assert (run / "evaluate" / "text_probe" / "projection.png").read_bytes().startswith(b"\x89PNG")
    found = {(result["features"], result["probe"]): result for result in written["results"]}
    probes, names = ("linear", "knn", "2 a class"), ("pretrained", "random 0", "random 1")
    encoders = [(name, probe) for name in names for probe in probes]
    assert list(found) == [*encoders, ("TF-IDF", "linear"), ("commonest label", "none")]
    for result in found.values():
        if "accuracies" in result:
            assert len(result["accuracies"]) == 3
            assert 0 < min(result["accuracies"]) <= max(result["accuracies"]) <= 1
            continue
        assert 0 < result["accuracy"] <= 1
        assert 0 < result["macro_f1"] <= 1
        if (result["features"], result["probe"]) != ("commonest label", "none"):
            assert result["accuracy"] > found["commonest label", "none"]["accuracy"]
    assert found["random 0", "linear"] != found["random 1", "linear"]
    accuracies = [found[f"random {seed}", "linear"]["accuracy"] for seed in (0, 1)]
    mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert f"{mean:.3f} ± {deviation:.3f}" in ended.stdout
    assert "random (2 seeds)" in ended.stdout
    assert f"{found['TF-IDF', 'linear']['macro_f1']:.3f}" in ended.stdout
    assert written["step"] == 8

    folder = run / "evaluate"
    first = (folder / "text_probe" / "probes.json").read_text()
    ended = entries.run("evaluate", f"--run={run}", "--config=probe.py", "--config.knn.neighbours=3", folder=tmp_path)
    assert "evaluate/text_probe_2/probes.json" in ended.stdout, ended.stderr
    second = (folder / "text_probe_2" / "probes.json").read_text()
    ended = entries.run("evaluate", f"--run={run}", "--config=probe.py", folder=tmp_path)
    assert "evaluate/text_probe/probes.json" in ended.stdout, ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["text_probe", "text_probe_2"]
    assert json.loads(second)["config"]["knn"]["neighbours"] == 3
    assert json.loads(second)["rows"] == json.loads(first)["rows"]
    for name, content in {"text_probe": first, "text_probe_2": second}.items():
        assert (folder / name / "probes.json").read_text() == content

    (folder / "text_probe" / "probes.json").unlink()  # as if it had been killed, and so has its folder still
    (folder / "text_probe_3").mkdir()
    (folder / "text_probe_3" / "probes.json").write_text("of someone else")
    ended = entries.run("evaluate", f"--run={run}", "--config=probe.py", "--config.knn.neighbours=4", folder=tmp_path)
    assert "evaluate/text_probe_4/probes.json" in ended.stdout, ended.stderr
    assert (folder / "text_probe_3" / "probes.json").read_text() == "of someone else"

    before = sorted(run.rglob("*"))
    for arguments, expected in {
        ("--config=probe.py",): "no --run given; expected --run=FOLDER",
        (f"--run={run}", "--config=probe.py", "--config.data.seq_len=64"): "has learned from rows of 32",
        (f"--run={run}", f"--config={REPOSITORY}/configs/bert_mlm.py"): "--config is one to pretrain with (it has "
        "config.pretext); expected configs/evaluate/text_probe.py or one like it\n",
        (f"--run={run}", f"--config={REPOSITORY}/configs/finetune/text_classification.py"): "one to fine-tune with",
        (f"--run={run}", f"--config={REPOSITORY}/configs/evaluate/image_probe.py"): f"--config is one for runs on "
        f"images, and {run} is one on text; expected configs/evaluate/text_probe.py or one like it",
    }.items():
        ended = entries.run("evaluate", *arguments, folder=tmp_path)
        assert (ended.code, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert expected in ended.stderr
    assert sorted(run.rglob("*")) == before


def test_what_cannot_be_is_refused_before_anything_is_written(trained, config, tmp_path):
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(40)))
    grades = [{"text": f"word {i}", "label": i % 7 / 2} for i in range(40)]
    (tmp_path / "grades.jsonl").write_text("".join(json.dumps(grade) + "\n" for grade in grades))
    run, data = trained("bert_mlm"), config.data
    refused = {
        "no run in": dict(folder=tmp_path / "nothing"),
        "no checkpoint of step 3; it has 8": dict(step=3),
        "config.data.test_split is empty": dict(data=dataclasses.replace(data, test_split="")),
        "no field 'lable' for labels": dict(data=dataclasses.replace(data, label_field="lable")),
        "share": dict(data=dataclasses.replace(data, test_split="train[:10%]")),
        "has no labels that are classes; expected a column 'label'": dict(
            data=dataclasses.replace(data, source=f"jsonl:{tmp_path / 'plain.jsonl'}")
        ),
        # What fine-tuning refuses, too.
        r"labels of .* are numbers \('0.5' is one of 7\).*sslx.finetune with the argument labels=number": dict(
            data=dataclasses.replace(data, source=f"jsonl:{tmp_path / 'grades.jsonl'}")
        ),
        "labels of .* are 40 different ones in 40 records, and no classes": dict(
            data=dataclasses.replace(data, source=f"jsonl:{tmp_path / 'plain.jsonl'}", label_field="text")
        ),
    }
    before = sorted(run.rglob("*"))
    for expected, change in refused.items():
        changed = dataclasses.replace(config, data=change.get("data", data))
        folder, step = change.get("folder", run), change.get("step")
        with pytest.raises(UserError, match=expected):
            evaluate(changed, folder, load_run(folder, step))
    assert sorted(run.rglob("*")) == before
    with pytest.raises(UserError, match="did you mean 'neighbours'"):
        build(TextProbeConfig, {"knn": {"neighbors": 3}})


def test_features_are_those_of_each_row_alone(trained, config):
    run = load_run(trained("bert_mlm"))
    data = prepare_text(
        config.data, layout="documents", tokenizer_override=str(trained("bert_mlm") / "tokenizer"), seed=0
    )
    objective, rows = run.objective, data.test
    encoder = objective.encoder(run.variables["params"], run.variables["state"])
    found = Encoder(objective.encode, 32)(encoder, rows)
    assert len(found.features) == len(rows)
    one = Encoder(objective.encode, 1)
    for row in (0, len(rows) - 1):
        batch = {name: value for name, value in rows.fetch(np.array([row])).items() if name != "label"}
        np.testing.assert_allclose(found.features[row], jax.device_get(one._encode(encoder, batch))[0], atol=1e-5)
    labels = [rows.fetch(np.array([row]))["label"][0] for row in range(len(rows))]
    np.testing.assert_array_equal(found.labels, labels)


def test_bags_of_words_know_words_and_not_their_places():
    texts = {
        "train": ["red round", "red flat", "blue round", "blue flat"] * 3,
        "validation": ["the red one", "the blue one"],
        "test": ["flat flat red", "blue, blue"],
    }
    labels = {"train": np.array([0, 0, 1, 1] * 3), "validation": np.array([0, 1])}
    guesses, chosen = bag_of_words(texts, labels)
    np.testing.assert_array_equal(guesses, [0, 1])
    assert chosen["validation_accuracy"] == 1


def test_the_projection_keeps_the_most_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5)) * [1, 9, 1, 4, 1] + 3
    points, share = project(x)
    _, singular, directions = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(np.abs(points), np.abs((x - x.mean(0)) @ directions[:2].T), rtol=1e-8)
    np.testing.assert_allclose(share, singular[:2] ** 2 / (singular**2).sum())


@pytest.mark.parametrize("argument", ["", "data=csv:reviews.csv"])
def test_the_published_config_builds(argument):
    file = Path(__file__).parent.parent / "configs" / "evaluate" / "text_probe.py"
    assert build(TextProbeConfig, load_config(file, argument).to_dict()).random_encoders == 3
    for options in ({"random_encoders": -1}, {"name": "a/b"}, {"batch_size": 0}):
        with pytest.raises(UserError, match=f"config.{next(iter(options))} is"):
            TextProbeConfig(**options)

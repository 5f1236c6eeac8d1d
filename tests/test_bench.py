"""The command line of ``sslx.bench``: what it measures of a config, writes, compares and leaves behind."""

from __future__ import annotations

import functools
import json
import signal

import pytest
from entries import until

CONFIG = """
from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from {module} import {cls}

def get_config():
    config = experiment(
        data=TextConfig(source="{source}", seq_len=16, vocab_size=200),
        model=BertConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=32),
        {part}={cls}(),
    )
    config.batch_size = 8
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_up_texts):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made_up_texts))
    rows = (f"{text[:40]},{'ab'[index % 2]}\n" for index, text in enumerate(made_up_texts))
    (folder / "labels.csv").write_text("text,label\n" + "".join(rows))
    mlm = dict(module="sslx.pretext.mlm", cls="MaskedLanguageModelConfig", part="pretext")
    task = dict(module="sslx.tasks.text_classification", cls="TextClassificationConfig", part="task")
    (folder / "pretrain.py").write_text(CONFIG.format(**mlm, source="jsonl:corpus.jsonl"))
    (folder / "classify.py").write_text(CONFIG.format(**task, source="csv:labels.csv"))
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def run(entries, folder):
    """Runs ``python -m sslx.bench`` with these arguments; temporary files go to ``tmp``."""
    return functools.partial(entries.run, "bench", folder=folder, environment={"TMPDIR": str(folder / "tmp")})


@pytest.fixture(scope="module")
def first(run, folder):
    """What a first run printed and wrote."""
    arguments = ("--steps=6", "--warmup=3", "--json=first.json", "--profile=trace")
    ended = run("--config=pretrain.py", *arguments)
    assert ended.code == 0, ended.stderr
    return ended.stdout, json.loads((folder / "first.json").read_text())


def test_a_config_is_measured_and_leaves_what_was_asked_for_alone(first, folder):
    said, values = first
    assert values["batch"]["tokens"] == [8, 16]
    assert (values["step"]["count"], values["step"]["low"] > 0) == (6, True)
    assert all(0 < values[part]["median"] < values["step"]["high"] for part in ("input", "host", "waiting"))
    seconds, rates = values["step"]["median"], values["rates"]
    assert rates["rows_per_second"] == pytest.approx(8 / seconds)
    assert rates["padded_tokens_per_second"] == pytest.approx(8 * 16 / seconds)
    assert 0.5 < rates["tokens_per_second"] / rates["padded_tokens_per_second"] <= 1
    assert values["of_product"] == pytest.approx(values["model_flops"] / seconds / values["product"]["median"])
    assert (values["peak"], values["of_peak"]) == (None, None)
    compiled = values["compilation"]
    assert 0 < compiled["tracing"] < compiled["cold"]
    assert compiled["cached"] is not None
    assert values["memory"] > 2**26
    for line in ("none published", "from the persistent cache", "with padding", "written: first.json"):
        assert line in said
    left = {path.name for path in folder.iterdir()}
    assert left == {"corpus.jsonl", "labels.csv", "pretrain.py", "classify.py", "tmp", "first.json", "trace"}
    assert list((folder / "tmp").iterdir()) == []


def test_the_most_expensive_operations_have_a_module_and_a_line(first, folder):
    said, values = first
    operations = values["operations"]
    assert sum(one["share"] for one in operations) == pytest.approx(1)
    assert [one["seconds"] for one in operations] == sorted((one["seconds"] for one in operations), reverse=True)
    assert any("encoder/transformer" in one["origin"] and ".py:" in one["place"] for one in operations)
    places = [(one["origin"], one["place"]) for one in operations if one["origin"]]
    assert len(places) == len(set(places))
    assert any(
        one["count"] > 1 and "encoder/transformer" in one["origin"] for one in operations
    )  # both layers' are one
    assert " more " in said
    assert said.count("sslx/") > 3
    assert len(list((folder / "trace").rglob("*.xplane.pb"))) == 1


def test_json_has_standard_output_for_itself_and_is_compared(first, run):
    changes = ("--config.model.attention=xla", "--config.log.every_steps=7")
    ended = run("--config=pretrain.py", "--steps=3", "--warmup=3", "--json", "--compare=first.json", *changes)
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["config"]["model"]["attention"] == "xla"
    assert "beside first.json" in ended.stderr
    differing = [line for line in ended.stderr.splitlines() if line.startswith("differs: ")]
    assert differing == ["differs: config.model.attention: 'auto' there, 'xla' here"]
    other = run("--config=pretrain.py", "--compare=first.json", "--config.batch_size=4")
    assert (other.code, other.stdout) == (2, "")
    assert "cannot compare with first.json: its batch is tokens 8x16" in other.stderr


def test_a_downstream_task_is_measured_as_well(run):
    ended = run("--config=classify.py", "--steps=3", "--warmup=3", "--json")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["config"]["task"]["name"] == "text_classification"


@pytest.mark.parametrize("when", ["compiling", "timing"])
def test_a_signal_leaves_nothing_half_written(entries, folder, when):
    before = {path.name for path in folder.iterdir()}
    arguments = ("--steps=1000000", "--json=stopped.json", "--profile=stopped")
    process = entries.start(
        "bench", "--config=pretrain.py", *arguments, folder=folder, environment={"TMPDIR": str(folder / "tmp")}
    )
    # Before that, Python itself may be looking for a place for temporary files, with one that it leaves.
    until(lambda: list((folder / "tmp").glob("sslx-bench-*")), process)
    until(lambda: when in process.stdout, process)
    process.signal(signal.SIGINT)
    assert process.wait() == 1
    assert process.stderr == ""
    assert {path.name for path in folder.iterdir()} == before
    assert list((folder / "tmp").iterdir()) == []

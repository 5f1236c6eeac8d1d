"""Preparing ahead of training: whoever tokenises, in however many shards, training finds the bytes it would write."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sslx import prepare as entry
from sslx.data import token_shards, tokens
from sslx.data.text import TextConfig, open_text, prepare_text
from sslx.data.token_shards import Workers, encode_in_shards, write_shards
from sslx.data.tokens import encode_here
from sslx.errors import Unavailable, UserError
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.tasks.text_classification import TextClassification

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def text_config(corpus_file, tmp_path):
    config = {"train_split": "train[:90%]", "eval_split": "train[90%:]", "vocab_size": 300, "seq_len": 32}
    return TextConfig(f"jsonl:{corpus_file}", cache_dir=str(tmp_path / "cache"), **config)


@pytest.fixture
def opened(text_config):
    """The training slice and the tokenizer's JSON."""
    _, sources, tokenizer = open_text(text_config)
    return sources["train"], tokenizer.backend_tokenizer.to_str()


def test_chunks_by_way_of_shards_are_those_of_one_process(opened, text_config, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_DOCUMENTS", 50)
    source, tokenizer = opened
    assert len(source) > 150
    plain = list(encode_here(source, tokenizer, np.uint16, tmp_path))
    for shards in (1, 4):
        workers = Workers(shards=shards)
        sharded = list(encode_in_shards(source, tokenizer, np.uint16, tmp_path, config=text_config, workers=workers))
        assert len(sharded) >= shards
        assert sharded[0].tokens.dtype == np.uint16
        for name in ("tokens", "sentence_lengths", "sentence_counts", "labels"):
            one, other = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for chunks in (plain, sharded))
            np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "shards").exists()


def test_beam_writes_the_shards_that_this_process_writes(opened, text_config, tmp_path):
    written = {}
    for name, workers in {"here": Workers(shards=3), "beam": Workers(runner="DirectRunner", shards=3)}.items():
        write_shards(*opened, np.uint16, tmp_path / name, config=text_config, workers=workers)
        written[name] = {path: data for path, data in contents(tmp_path / name).items() if "array_record" in path}
    assert len(written["here"]) == 3
    assert all(written["here"].values())
    assert written["here"] == written["beam"]


@pytest.mark.parametrize(
    ("config", "objective", "changes"),
    [
        ("bert_mlm", MaskedLanguageModel, {}),
        ("bert_mlm", MaskedLanguageModel, {"pretext.sentence": "sop"}),
        ("finetune/text_classification", TextClassification, {"init": "scratch"}),
    ],
)
def test_training_finds_everything_that_it_would_have_made(tiny_config, tmp_path, capsys, config, objective, changes):
    written = tiny_config(config, changes).to_dict()
    prepared = entry.prepare(written, str(tmp_path / "ahead"), workers=Workers(shards=2))
    ahead = contents(tmp_path / "ahead")
    capsys.readouterr()

    def train_on(folder):
        return objective.prepare(written | {"data": written["data"] | {"cache_dir": str(tmp_path / folder)}})[1]

    found = train_on("ahead")
    assert capsys.readouterr().out == ""  # nothing was left to prepare
    made = train_on("usual")
    assert contents(tmp_path / "usual") == ahead == contents(tmp_path / "ahead")
    assert found.statistics == made.statistics == prepared.statistics
    for name, values in made.train.fetch(np.arange(8)).items():
        np.testing.assert_array_equal(found.train.fetch(np.arange(8))[name], values)


def test_several_processes_write_what_one_does(opened, text_config, tmp_path):
    written = {}
    for name, workers in {"one": Workers(shards=5), "two": Workers(processes=2, shards=5)}.items():
        write_shards(*opened, np.uint16, tmp_path / name, config=text_config, workers=workers)
        written[name] = {path: data for path, data in contents(tmp_path / name).items() if "array_record" in path}
    assert len(written["one"]) == 5
    assert written["one"] == written["two"]


def test_a_killed_process_is_one_line_and_leaves_nothing(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "_one_thread", functools.partial(os._exit, 1))  # as it starts
    with pytest.raises(UserError, match=r"was killed .*fewer --processes"):
        entry.prepare(tiny_config().to_dict(), str(tmp_path), workers=Workers(processes=2, shards=2))
    assert [path for path in tmp_path.iterdir() if path.name.startswith("tokens-") and path.is_dir()] == []


@pytest.mark.parametrize("runner", ["", "DirectRunner"])
def test_a_worker_that_sees_other_content_is_told(opened, text_config, tmp_path, runner):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"other {i}", "label": "a"}) + "\n" for i in range(300)))
    elsewhere = dataclasses.replace(text_config, source=f"jsonl:{other}")
    with pytest.raises(UserError, match=r"^a worker found other content in \S+ than .* at the same place everywhere$"):
        write_shards(*opened, np.uint16, tmp_path, config=elsewhere, workers=Workers(runner=runner, shards=2))


def test_the_entry_says_what_there_is_and_how_to_train_on_it(entries, corpus_file, tmp_path):
    config = [f"--config={REPOSITORY}/configs/bert_mlm.py:data=jsonl:{corpus_file}", "--config.data.vocab_size=300"]
    ended = entries.run("prepare", *config, f"--out={tmp_path}/cache", f"--rows={tmp_path}/rows", "--processes=1")
    assert (ended.code, ended.stderr) == (0, "")
    assert re.search(r"^train  \d+ documents, [\d,]+ tokens, [\d,]+ rows$", ended.stdout, re.MULTILINE)
    assert f"train on it with --config.data.cache_dir={tmp_path}/cache\n" in ended.stdout
    assert f"--config.data.source=rows:{tmp_path}/rows\n" in ended.stdout
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} == {"tokens", "wordpiece"}
    rows = TextConfig(f"rows:{tmp_path}/rows", vocab_size=300, seq_len=64, cache_dir=str(tmp_path / "elsewhere"))
    assert len(prepare_text(rows, layout="packed").train) > 0


def test_prepared_rows_are_not_prepared_again(tiny_config, tmp_path):
    written = tiny_config("bert_mlm", {"data.source": "rows:somewhere"}).to_dict()
    with pytest.raises(UserError, match=r"config.data.source is 'rows:somewhere', rows that have been prepared"):
        entry.prepare(written, str(tmp_path), workers=Workers())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 0}, "--processes is 0; expected at least 1"),
        ({"shards": 0}, "--shards is 0; expected at least 1"),
        ({"runner": "DirectRuner"}, "unknown Beam runner 'DirectRuner'; did you mean 'DirectRunner'"),
        ({"options": ("region=x",)}, "--beam_option=region=x needs --beam=RUNNER"),
    ],
)
def test_workers_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        Workers(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("=x",), "bad --beam_option '=x'; expected KEY=VALUE"),
        (("direct_num_wrkers=2",), "unknown --beam_option 'direct_num_wrkers'; did you mean 'direct_num_workers'"),
        (("direct_num_workers=x",), "bad --beam_option: argument --direct_num_workers: invalid int value: 'x'"),
    ],
)
def test_beam_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        Workers(runner="DirectRunner", options=options)


def test_a_runner_without_its_cluster_is_one_line_with_its_options_and_beams_reason(opened, text_config, tmp_path):
    workers = Workers(runner="PortableRunner", options=("job_name=here",), shards=2)
    with pytest.raises(UserError) as error:
        write_shards(*opened, np.uint16, tmp_path, config=text_config, workers=workers)
    said = str(error.value)
    assert said.startswith("Beam's PortableRunner failed (--beam_option: job_name=here; ")
    assert "job_endpoint=HOST:PORT): You must specify a --job_endpoint" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("told", "kind", "reason"),
    [
        ("failed to connect to all addresses\nmore of it", UserError, "failed to connect to all addresses"),
        (
            'Traceback (most recent call last):\n  File "x.py", line 1\nOSError: disk full [while running x]',
            Unavailable,
            "OSError: disk full [while running x]",
        ),
        ("network unreachable [while running 'write']", Unavailable, "network unreachable [while running 'write']"),
    ],
)
def test_a_cluster_that_fails_while_it_runs_is_nobodys_mistake_and_keeps_its_traceback(
    opened, text_config, tmp_path, monkeypatch, capsys, told, kind, reason
):
    def fail(self, **options):
        raise RuntimeError(told)

    monkeypatch.setattr(token_shards.TokenShards, "download_and_prepare", fail)
    workers = Workers(runner="PortableRunner", options=("job_endpoint=localhost:1",))
    with pytest.raises(kind) as refusal:
        write_shards(*opened, np.uint16, tmp_path / "shards", config=text_config, workers=workers)
    assert str(refusal.value).endswith(f"): {reason}")
    assert ("Traceback (most recent call last)" in capsys.readouterr().err) == (kind is Unavailable)


def test_beam_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--beam needs Apache Beam .*pip install 'sslx\[beam\]'"):
        Workers(runner="DirectRunner")


def test_a_folder_for_rows_that_holds_something_is_refused_before_any_work(tiny_config, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.tex").touch()
    written = tiny_config("bert_mlm", {"data.cache_dir": str(tmp_path / "cache")}).to_dict()
    with pytest.raises(UserError, match=r"already holds 'thesis.tex'"):
        entry.prepare(written, workers=Workers(), rows=str(tmp_path / "rows"))
    assert not (tmp_path / "cache").exists()

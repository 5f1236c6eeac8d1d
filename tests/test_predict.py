"""The entry that asks a run about a file: its lines against the Python API, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from entries import REPOSITORY, simulated

import sslx
from sslx.inference import VERBS
from sslx.inference.model import verb_class

TEXTS = ["Return the sum of the [MASK].", "The [MASK] is closed when the [MASK] is not open.", "[MASK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    records = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (folder / "in.txt").write_text("\r\n".join(TEXTS) + "\r\n")
    (folder / "long.txt").write_text("short\n" + "Return the value. " * 30 + "\n")
    files = {
        "unknown.jsonl": b'{"text": "[MASK]"}\n\n{"text": "[MASK]", "txt": 1}\n',
        "more.jsonl": b'{"text": "[MASK]", "title": "a"}\n',
        "missing.jsonl": b'{"id": 1}\n',
        "number.jsonl": b'{"text": 3}\n',
        "list.jsonl": b'["text"]\n',
        "halves.jsonl": rb'{"text": "[MASK] \ud800", "id": "\udc00", "more": [{"\ud83d": "\ud83d\ude00"}]}' + b"\n",
        "label.jsonl": b'{"text": "[MASK]", "label": "a"}\n',
        "broken.jsonl": b'{"text": "[MASK]"}\n{"text": \n',
        "latin.jsonl": '{"text": "café"}\n'.encode("latin-1"),
        "nomask.txt": b"[MASK]\nnothing\n",
        "blank.txt": b"one\n\nthree\n",
        "empty.jsonl": b"",
        "blanks.txt": b"\n\n",
        "table.csv": b"text\na\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "there.jsonl").write_text("mine")
    (folder / "link.jsonl").symlink_to("in.jsonl")
    return folder


@pytest.fixture(scope="module")
def predict(entries, folder, trained):
    return functools.partial(entries.run, "predict", folder=folder)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def plain(answer):
    return json.loads(json.dumps(dataclasses.asdict(answer)))


def test_lines_are_the_answers_of_the_api(predict, folder, trained):
    model = sslx.load(trained("bert_mlm"))
    run = f"--run={trained('bert_mlm')}"
    ended = predict(run, "--input=in.jsonl", "--output=out.jsonl", "--top=3", "--batch_size=2")
    assert ended.code == 0, ended.stderr
    assert ended.stdout == ""
    assert f"3 answers by step 8 of {trained('bert_mlm')}" in ended.stderr
    found = lines((folder / "out.jsonl").read_text())
    for number, (text, line) in enumerate(zip(TEXTS, found, strict=True)):
        expected = plain(model.fill(text, top=3))
        assert list(line) == ["id", "text", "filled", "masks"]
        assert (line["id"], line["text"], line["filled"]) == (number, text, expected["filled"])
        for guesses, wanted in zip(line["masks"], expected["masks"], strict=True):
            assert [guess["token"] for guess in guesses] == [guess["token"] for guess in wanted]
            found_, wanted_ = ([guess["probability"] for guess in of] for of in (guesses, wanted))
            np.testing.assert_allclose(found_, wanted_, rtol=1e-4)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    ended = predict(run, "--verb=embed", "--input=in.txt", "--pool=first", "--normalise=False")
    assert ended.code == 0, ended.stderr
    vectors = np.array([line["embedding"] for line in lines(ended.stdout)])
    assert [line["text"] for line in lines(ended.stdout)] == TEXTS
    np.testing.assert_allclose(vectors, model.embed(TEXTS, pool="first", normalise=False), atol=1e-5)

    ended = predict(run, "--verb=embed", "--input=long.txt", "--output=out.jsonl", "--overwrite")
    found = lines((folder / "out.jsonl").read_text())
    left_out = len(model.run.tokens_of("Return the value. " * 30)) - 30
    assert [line.get("tokens_left_out") for line in found] == [None, left_out]
    assert "1 texts are longer than the 32 tokens" in ended.stderr


def test_the_default_is_what_the_run_was_trained_for(predict, folder, trained):
    ended = predict(f"--run={trained('gpt_clm')}", "--input=blank.txt", "--new_tokens=31", "--temperature=0")
    with pytest.warns(UserWarning, match="2 of 3 continuations"):
        expected = sslx.load(trained("gpt_clm")).generate(["one", "", "three"], new_tokens=31, temperature=0.0)
    assert [line["generated"] for line in lines(ended.stdout)] == [one.generated for one in expected]
    assert [line.get("tokens_beyond") for line in lines(ended.stdout)] == [
        one.tokens_beyond or None for one in expected
    ]
    assert "2 continuations go beyond the 32 tokens" in ended.stderr
    ended = predict(f"--run={trained('finetune/text_classification')}", "--input=in.txt")
    expected = sslx.load(trained("finetune/text_classification")).classify(TEXTS)
    assert [line["label"] for line in lines(ended.stdout)] == [one.label for one in expected]


def test_from_stdin_to_stdout(folder, trained):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | simulated(1)
    ended = subprocess.run(
        [sys.executable, "-m", "sslx.predict", f"--run={trained('bert_mlm')}", "--verb=embed", "--input=-", "--keep=a"],
        input=b'{"text": "caf\xc3\xa9", "a": [1]}\n',
        capture_output=True,
        cwd=folder,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = lines(ended.stdout.decode())
    assert (line["text"], line["a"], len(line["embedding"])) == ("café", [1], 32)


def test_halves_of_surrogate_pairs_are_read_as_unknown_characters(predict, trained):
    ended = predict(f"--run={trained('bert_mlm')}", "--input=halves.jsonl", "--keep=more")
    assert ended.code == 0, ended.stderr
    (line,) = lines(ended.stdout)
    assert [line["text"], line["id"], line["more"]] == ["[MASK] \ufffd", "\ufffd", [{"\ufffd": "😀"}]]


def test_every_verb_tells_the_fields_of_its_answers():
    first = {name: verb_class(name).answer_fields()[:2] for name in VERBS}
    assert first == {
        "fill": ("filled", "masks"),
        "generate": ("generated", "ended"),
        "classify": ("label", "probabilities"),
        "score": ("score", "tokens_left_out"),
        "tag": ("words", "tags"),
        "answer": ("answer", "candidates"),
        "embed": ("embedding", "tokens_left_out"),
    }


def test_what_it_refuses(predict, folder, trained):
    run, classify = (f"--run={trained(config)}" for config in ("bert_mlm", "finetune/text_classification"))
    cases = {
        (): "no --run given; expected --run=FOLDER --input=FILE",
        (run,): "no --input given",
        ("--run=nothing", "--input=in.jsonl"): "no run in 'nothing'",
        (run, "--input=in.json"): "--input=in.json is neither .jsonl nor .txt",
        (run, "--input=table.csv"): "--input=table.csv is neither .jsonl nor .txt",
        (run, "--input=inn.jsonl"): "no file --input=inn.jsonl; did you mean 'in.jsonl'?",
        (run, "--input=in.jsonl", "--verb=fil"): "unknown --verb 'fil'; did you mean 'fill'?",
        (run, "--input=in.jsonl", "--verb=generate"): "is a run of mlm and cannot generate; it can fill, embed",
        (run, "--input=in.jsonl", "--temperature=1"): "--temperature is no option of fill; its options: --top",
        (run, "--input=in.jsonl", "--top=0"): "--top is 0; expected at least 1",
        (run, "--input=in.jsonl", "--tpo=3"): "Did you mean: top",
        (run, "--input=in.jsonl", "--top=a"): "error: flag --top=a: expected a whole number\n",
        (run, "--input=in.jsonl", "--top=2.5"): "error: flag --top=2.5: expected a whole number\n",
        (run, "--input=in.jsonl", "--temperature=warm"): "error: flag --temperature=warm: expected a number\n",
        (run, "--input=in.jsonl", "--normalise=maybe"): "error: flag --normalise=maybe: expected true or false\n",
        (run, "--input=in.jsonl", "--batch_size=0"): "batch_size is 0",
        (run, "--input=in.jsonl", "extra"): "unexpected argument 'extra'",
        (run, "--input=unknown.jsonl"): "unknown.jsonl, line 3: unknown field 'txt'; did you mean 'text'?",
        (run, "--input=more.jsonl"): "line 1: unknown field 'title'; valid: id, text; --keep=title copies it",
        (classify, "--input=label.jsonl"): "line 1: field 'label' is one of the answer's; give it another name",
        (classify, "--input=in.jsonl", "--keep=more,label"): "--keep=label: classify writes 'label' itself",
        (run, "--input=missing.jsonl"): "missing.jsonl, line 1: no field 'text'",
        (run, "--input=number.jsonl"): "number.jsonl, line 1: field 'text' is not a string but int",
        (run, "--input=list.jsonl"): "list.jsonl, line 1: expected a JSON object, got list",
        (run, "--input=broken.jsonl"): "broken.jsonl, line 2: not JSON",
        (run, "--input=latin.jsonl"): "latin.jsonl: not UTF-8 at byte 13",
        (run, "--input=nomask.txt"): "nomask.txt, line 2: no [MASK] in the text 'nothing'",
        (run, "--input=blank.txt", "--verb=embed"): "error: blank.txt, line 2 is empty\n",
        (run, "--input=blank.txt"): "blank.txt, line 1: no [MASK] in the text 'one'",
        (run, "--input=unknown.jsonl", "--keep=author"): "--keep=author names no field of the input; valid: txt",
        (run, "--input=unknown.jsonl", "--keep=tx"): "--keep=tx names no field of the input; did you mean 'txt'?",
        (run, "--input=empty.jsonl"): "empty.jsonl is empty; expected a JSON object a line",
        (run, "--input=blanks.txt"): "blanks.txt is empty; expected a text a line",
        (run, "--input=in.jsonl", "--output=there.jsonl"): "--output=there.jsonl exists; give another, or --overwrite",
        (run, "--input=in.jsonl", "--output=in.jsonl", "--overwrite"): "--output=in.jsonl is the input in.jsonl itself",
        (run, "--input=in.jsonl", f"--output={folder}/in.jsonl", "--overwrite"): "is the input in.jsonl itself",
        (run, "--input=link.jsonl", "--output=in.jsonl", "--overwrite"): "is the input link.jsonl itself",
        (run, "--input=in.jsonl", "--output=link.jsonl", "--overwrite"): "is the input in.jsonl itself",
        (run, "--input=in.jsonl", "--output=no/a.jsonl"): "cannot write --output=no/a.jsonl: no folder no",
        (run, "--input=in.jsonl", "--output=."): "--output=. is a folder",
    }
    before = {path: path.read_bytes() for path in folder.iterdir()}
    failures = []
    for arguments, expected in cases.items():
        ended = predict(*arguments)
        if (ended.code, ended.stderr.count("\n"), ended.stdout) != (2, 1, "") or expected not in ended.stderr:
            failures.append(f"{arguments[1:]}\n  said:     {ended.stderr}\n  expected: {expected}")
    assert not failures, "\n".join(failures)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_help(predict):
    ended = predict("--help")
    assert ended.code == 0
    assert "--verb=NAME" in ended.stdout

"""Runs that are asked about pictures: answers against the objective itself on rows that Pillow makes, and mistakes."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

import sslx
from sslx.errors import UserError
from sslx.train.checkpoint import read_variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of all kinds in one folder, and beside it what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    (folder / "in" / "deep").mkdir(parents=True)
    for name, shape in {"a.png": (8, 8), "b.png": (24, 16, 3), "deep/c.png": (9, 30)}.items():
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / "in" / name)
    (folder / "in" / "notes.txt").write_text("no picture")
    (folder / "bad.png").write_text("no picture")
    whole = (folder / "in" / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    records = {
        "in.jsonl": [{"id": 7, "image": "in/b.png"}, {"id": 8, "image": str(folder / "in" / "a.png")}],
        "unknown.jsonl": [{"image": "in/a.png", "imgae": "x"}],
        "missing.jsonl": [{"image": "in/a.png"}, {"image": "in/z.png"}],
        "text.jsonl": [{"text": "a"}],
        "number.jsonl": [{"image": 3}],
        "label.jsonl": [{"image": "in/a.png", "label": "a"}],
    }
    for name, lines in records.items():
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def model(picture_classifier):
    return sslx.load(picture_classifier)


@pytest.fixture(scope="module")
def files(folder):
    return [folder / "in" / name for name in ("a.png", "b.png", "deep/c.png")]


def row_of(file):
    """The square in the middle of a picture, grey, at the size of the run."""
    picture = Image.open(file).convert("L")
    side = min(picture.size)
    left, top = ((extent - side) / 2 for extent in picture.size)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))[..., None]


@pytest.fixture(scope="module")
def expected(model, files, picture_classifier):
    """Features and probabilities of the files by the objective; both from the averages that training has kept."""
    objective, variables = model.run.objective, read_variables(picture_classifier)
    batch, averages = {"image": np.stack([row_of(file) for file in files])}, variables["state"]["ema"]["params"]
    features = jax.jit(objective.encode)({"params": averages["encoder"]}, batch)
    logits = np.float64(features @ averages["head"]["kernel"] + averages["head"]["bias"])
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.asarray(features), shares


def test_vectors_are_the_features_of_held_out_rows(model, files, expected):
    assert model.verbs == ("classify", "embed")
    features = expected[0]
    found = model.embed(files, normalise=False, batch_size=2)
    assert (found.shape, found.dtype) == ((3, 32), np.float32)
    np.testing.assert_allclose(found, features, atol=1e-5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(model.embed(str(files[1])), unit[1], atol=1e-5)
    arrays = [np.asarray(Image.open(file)) for file in files]
    np.testing.assert_allclose(model.embed(arrays), unit, atol=1e-5)
    np.testing.assert_allclose(model.embed(arrays[0]), unit[0], atol=1e-5)
    together = np.stack([arrays[1], arrays[1][::-1]])
    np.testing.assert_allclose(model.embed(together)[0], unit[1], atol=1e-5)
    opened = [Image.open(file) for file in files]
    np.testing.assert_allclose(model.embed(opened), unit, atol=1e-5)
    np.testing.assert_allclose(model.embed(opened[2]), unit[2], atol=1e-5)
    assert model.embed([]).shape == (0, 32)


def test_classes_come_with_probabilities_likeliest_first(model, files, expected, picture_classifier):
    labels = json.loads((picture_classifier / "labels.json").read_text())
    for found, shares in zip(model.classify(files), expected[1], strict=True):
        assert list(found.probabilities) == [labels[label] for label in np.argsort(-shares)]
        np.testing.assert_allclose([found.probabilities[name] for name in labels], shares, atol=1e-5)
        assert found.label == labels[shares.argmax()]
    assert model.classify(files[0]).label == model.classify(files)[0].label


def test_what_is_no_picture_or_no_verb_of_the_run(model, files, folder):
    pixels = np.zeros((8, 8), np.uint8)
    for given, told in {
        folder / "bad.png": f"input 0: {folder}/bad.png: no picture of a known format",
        folder / "none.png": f"input 0: {folder}/none.png: No such file or directory",
        folder / "cut.png": f"{folder}/cut.png cannot be decoded: ",
    }.items():
        with pytest.raises(UserError, match=told):
            model.embed(given)
    with pytest.raises(UserError, match=r"input 1: expected pixels of uint8 or uint16, got float32\[8, 8\]"):
        model.classify([pixels, pixels.astype(np.float32)])
    with pytest.raises(UserError, match=r"input 0: expected the path of a picture, .*, got ndarray of shape"):
        model.classify([np.zeros((2, 8, 8, 1), np.uint8)])
    for shape in ((3, 20, 16), (20, 16, 5)):  # grey ones, or colours that come first?
        with pytest.raises(
            UserError, match=rf"got an array of shape \[{', '.join(map(str, shape))}\]; .* list\(array\)"
        ):
            model.embed(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="expected a picture or a list of them, got bytes"):
        model.embed(b"png")
    with pytest.raises(UserError, match="pool is 'mean', and of pictures it is the run's own"):
        model.embed(files, pool="mean")
    for verb in (model.fill, model.generate, model.tag):
        with pytest.raises(UserError, match=r"is a run of image_classification and cannot .*; it can classify, embed"):
            verb(files)


def test_a_folder_or_lines_become_lines(model, entries, folder, files, picture_classifier):
    run = f"--run={picture_classifier}"
    ended = entries.run("predict", run, "--input=in", "--output=out.jsonl", folder=folder)
    assert ended.code == 0, ended.stderr
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["image"] for line in found] == ["in/a.png", "in/b.png", "in/deep/c.png"]
    for line, answer in zip(found, model.classify(files), strict=True):
        assert list(line) == ["image", "label", "probabilities"]
        assert line["label"] == answer.label
        np.testing.assert_allclose([*line["probabilities"].values()], [*answer.probabilities.values()], rtol=1e-4)
    ended = entries.run("predict", run, "--verb=embed", f"--input={folder}/in.jsonl", "--normalise=False")
    assert ended.code == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["id"] for line in found] == [7, 8]
    vectors = np.array([line["embedding"] for line in found])
    np.testing.assert_allclose(vectors, model.embed([files[1], files[0]], normalise=False), atol=1e-5)


def test_what_the_entry_refuses(entries, folder, picture_classifier):
    before = sorted(folder.rglob("*"))
    for arguments, told in {
        "--input=unknown.jsonl": "unknown.jsonl, line 1: unknown field 'imgae'; did you mean 'image'?",
        "--input=missing.jsonl": "missing.jsonl, line 2: in/z.png: No such file or directory",
        "--input=text.jsonl": "line 1: unknown field 'text'; valid: id, image; --keep=text copies it",
        "--input=number.jsonl": "line 1: field 'image' is not a string but int",
        "--input=label.jsonl": "line 1: field 'label' is one of the answer's; give it another name",
        "--input=in/notes.txt": "notes.txt, but reads only .jpg",
        "--input=inn": "no file matches --input=inn; . exists, did you mean 'in'?",
        "--input=*.png --output=out.jsonl --overwrite": "*.png: bad.png: no picture of a known format",
        "--input=cut.png --output=out.jsonl --overwrite": "cut.png cannot be decoded: ",
        "--input=in --verb=fill": "is a run of image_classification and cannot fill; it can classify, embed",
        "--input=in --verb=embed --pool=mean": "--pool is no option of embed; its options: --normalise",
    }.items():
        ended = entries.run("predict", f"--run={picture_classifier}", *arguments.split(), folder=folder)
        assert (ended.code, ended.stderr.count("\n"), ended.stdout) == (2, 1, ""), ended.stderr
        assert told in ended.stderr
    assert sorted(folder.rglob("*")) == before

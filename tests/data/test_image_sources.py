"""Sources of pictures on real files: folders, MNIST's format, TFDS, embedded sets; mistakes name what is meant."""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import struct

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image
from tfds_folders import write_tfds

from sslx.data import files
from sslx.data.image_sources import open_images
from sslx.data.pictures import open_picture, pixels
from sslx.errors import UserError


@pytest.fixture
def opened(tmp_path):
    """Opens a source whose files are under ``tmp_path``, written {} in the spec."""

    def open_(spec, *, image_field="image", label_field="label", tfds_dir=None):
        fields = dict(image_field=image_field, label_field=label_field)
        return open_images(spec.format(tmp_path), **fields, cache_dir=tmp_path / "cache", tfds_dir=tfds_dir)

    return open_


def paint(path, colour, kind=None, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path, kind)


def colours(source):
    """The red of each picture's first pixel, by which these tests know them."""
    rows = source.__getitems__(range(len(source)))
    return [int(pixels(open_picture(row["image"], 3))[0, 0, 0]) for row in rows]


def labels(source):
    return [row.get("label") for row in source.__getitems__(range(len(source)))]


def test_a_folder_of_pictures_of_any_kind_and_depth(opened, tmp_path):
    for place, name in enumerate(("a.png", "b.bmp", "deep/c.PNG", "deep/er/d.webp", "e.ppm")):
        options = {"lossless": True} if name.endswith("webp") else {}
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (place, 0, 0)).save(tmp_path / "in" / name, **options)
    (tmp_path / "in" / "notes.txt").write_text("not this")
    collection = opened("images:{}/in/**/*")
    assert collection.label_names is None
    source = collection.slice("train")
    assert colours(source) == [0, 1, 2, 3, 4]
    assert labels(source) == [None] * 5
    assert source[2]["name"] == str(tmp_path / "in" / "deep" / "c.PNG")


def test_links_are_followed_and_never_in_a_circle(opened, tmp_path):
    paint(tmp_path / "in" / "cat" / "1.png", 1)
    paint(tmp_path / "in" / ".hidden" / "2.png", 2)
    paint(tmp_path / "in" / "cat" / ".3.png", 3)
    paint(tmp_path / "elsewhere" / "4.png", 4)
    (tmp_path / "in" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "cat" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "cat" / "5.png").symlink_to("nothing")
    collection = opened("images:{}/in")
    source = collection.slice("train")
    assert collection.label_names == ("cat", "dog")
    assert dict(zip(colours(source), labels(source), strict=True)) == {1: 0, 4: 1}
    assert len(source) == 2


def test_folders_are_classes_by_sorted_name_and_in_each_split_the_same(opened, tmp_path):
    for split, add in (("train", 0), ("VAL", 100), ("test", 200)):
        for place, name in enumerate(("zebra", "cat", "deep/dog")):
            if (split, name) != ("VAL", "cat"):
                paint(tmp_path / "in" / split / name / "1.png", add + place)
    collection = opened("images:{}/in")
    assert collection.label_names == ("cat", "deep/dog", "zebra")
    assert set(collection.splits) == {"train", "validation", "test"}
    found = {
        split: dict(zip(colours(s), labels(s), strict=True))
        for split in collection.splits
        for s in [collection.slice(split)]
    }
    assert found == {"train": {0: 2, 1: 0, 2: 1}, "validation": {100: 2, 102: 1}, "test": {200: 2, 201: 0, 202: 1}}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("training", "testing"), ["train", "test"]),
        (("Train", "dev"), ["train", "validation"]),
        (("train", "valid", "test"), ["train", "validation", "test"]),
    ],
)
def test_splits_have_the_names_that_datasets_give_them(opened, tmp_path, folders, splits):
    for folder in folders:
        paint(tmp_path / "in" / folder / "cat" / "1.png", 1)
    collection = opened("images:{}/in")
    assert sorted(collection.splits) == sorted(splits)
    assert collection.label_names == ("cat",)


def test_a_split_may_be_without_classes_as_the_tests_of_contests_are(opened, tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/1.png"):
        paint(tmp_path / "in" / name, 1)
    collection = opened("images:{}/in")
    assert labels(collection.slice("train")) == [0, 1]
    assert labels(collection.slice("test")) == [None]


def test_without_folders_of_splits_all_is_train_and_slices_are_random_samples(opened, tmp_path):
    for place in range(40):
        paint(tmp_path / "in" / ("cat" if place < 20 else "train") / f"{place:02}.png", place)
    collection = opened("images:{}/in")
    assert list(collection.splits) == ["train"]
    assert collection.label_names == ("cat", "train")  # one such name among others is a class
    one, other = collection.slice("train[:75%]"), collection.slice("train[75%:]")
    assert (len(one), len(other)) == (30, 10)
    assert sorted(colours(one) + colours(other)) == list(range(40))
    assert set(labels(other)) == {0, 1}  # of sorted files the last quarter would be of one class


def test_files_that_lie_where_they_should_not(opened, tmp_path):
    for name in ("in/cat/1.png", "in/dog/2.png", "in/stray.png"):
        paint(tmp_path / name, 1)
    with pytest.raises(UserError, match=r"in/stray.png is in no class folder, but others of images:.*all of a split"):
        opened("images:{}/in")
    for name in ("split/train/cat/1.png", "split/test/cat/1.png", "split/spare/cat/1.png"):
        paint(tmp_path / name, 1)
    with pytest.raises(UserError, match=r"split/spare/cat/1.png lies beside test, train of images:"):
        opened("images:{}/split")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none is a folder without .jpg, .jpeg, .png"):
        opened("images:{}/none")
    with pytest.raises(UserError, match=r"no file matches .*/splt; .* did you mean 'split'"):
        opened("images:{}/splt")


def test_names_from_before_utf8_can_be_printed(opened, tmp_path):
    folder = os.fsencode(tmp_path) + b"/in/caf\xe9"
    os.makedirs(folder)
    paint(tmp_path / "1.png", 7)
    os.rename(tmp_path / "1.png", folder + b"/\xff.png")
    collection = opened("images:{}/in")
    assert collection.label_names == (r"caf\xe9",)
    source = collection.slice("train")
    assert colours(source) == [7]
    assert source[0]["name"] == rf"{tmp_path}/in/caf\xe9/\xff.png"


def test_a_picture_that_cannot_be_read_is_named(opened, tmp_path, monkeypatch):
    for name in ("in/cat/1.png", "in/cat/2.png"):
        paint(tmp_path / name, 1)

    def refused(file, mode="r", **options):
        if str(file).endswith("2.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return open(file, mode, **options)

    monkeypatch.setattr(files, "open", refused, raising=False)  # whoever runs this may be allowed everything
    with pytest.raises(UserError, match=r"^cannot read .*/in/cat/2.png: Permission denied$"):
        opened("images:{}/in")


def test_a_fingerprint_follows_pixels_classes_and_slice(opened, tmp_path):
    paint(tmp_path / "one" / "cat" / "1.png", 1)
    paint(tmp_path / "one" / "dog" / "2.png", 2)
    first = opened("images:{}/one").slice("train").fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert opened("images:{}/two").slice("train").fingerprint == first
    assert opened("images:{}/two").slice("train[:1]").fingerprint != first
    (tmp_path / "two" / "dog").rename(tmp_path / "two" / "ant")
    assert opened("images:{}/two").slice("train").fingerprint != first
    (tmp_path / "two" / "ant").rename(tmp_path / "two" / "dog")
    assert opened("images:{}/two").slice("train").fingerprint == first
    paint(tmp_path / "two" / "dog" / "2.png", 3)
    assert opened("images:{}/two").slice("train").fingerprint != first


def idx(array):
    """MNIST's format, as its page describes it."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


DRAWN = np.random.default_rng(0).integers(0, 256, (25, 6, 5), dtype=np.uint8)
CLASSES = np.arange(25, dtype=np.uint8) % 7


def write_idx(folder, train=(DRAWN[:20], CLASSES[:20]), test=(DRAWN[20:], CLASSES[20:]), zipped=False):
    folder.mkdir()
    for prefix, arrays in {"train": train, "t10k": test}.items():
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays or (), strict=False):
            data = array if isinstance(array, bytes) else idx(array)
            name = f"{prefix}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnists_format_plain_and_zipped(opened, tmp_path, zipped):
    write_idx(tmp_path / "in", zipped=zipped)
    collection = opened("idx:{}/in")
    assert collection.label_names == tuple("0123456")
    for split, where in {"train": slice(20), "test": slice(20, None)}.items():
        rows = collection.slice(split).__getitems__(range(len(DRAWN[where])))
        np.testing.assert_array_equal(np.stack([row["image"] for row in rows]), DRAWN[where][..., None])
        assert [row["label"] for row in rows] == CLASSES[where].tolist()
    assert len(collection.slice("train[:50%]")) == 10
    (tmp_path / "in" / ("t10k-labels-idx1-ubyte" + (".gz" if zipped else ""))).unlink()
    near = r"has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz; did you mean 't(10k|rain)-"
    with pytest.raises(UserError, match=near):
        opened("idx:{}/in")


def test_whether_mnists_format_is_zipped_is_seen_from_the_bytes(opened, tmp_path):
    write_idx(tmp_path / "in", zipped=True)
    file = tmp_path / "in" / "train-images-idx3-ubyte.gz"
    (tmp_path / "in" / "train-labels-idx1-ubyte.gz").rename(tmp_path / "in" / "train-labels-idx1-ubyte")
    file.write_bytes(gzip.decompress(file.read_bytes()))
    rows = opened("idx:{}/in").slice("train").__getitems__(range(20))
    np.testing.assert_array_equal(np.stack([row["image"] for row in rows]), DRAWN[:20, ..., None])
    assert [row["label"] for row in rows] == CLASSES[:20].tolist()


def test_mnists_format_may_have_no_test_set(opened, tmp_path):
    write_idx(tmp_path / "in", test=None)
    assert list(opened("idx:{}/in").splits) == ["train"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((b"", CLASSES), "train-images-idx3-ubyte is no idx file of unsigned bytes: it begins with nothing, expected"),
        (
            (b"\x89PNG" + bytes(40), CLASSES),
            "no idx file of unsigned bytes: it begins with 89 50 4e 47, expected 00 00",
        ),
        ((idx(DRAWN).replace(b"\x08", b"\x0d", 1), CLASSES), "is no idx file .* begins with 00 00 0d 03"),  # floats
        ((b"\0\0\x08\x64" + bytes(400), CLASSES), "begins with 00 00 08 64"),  # a hundred axes
        ((idx(DRAWN)[:-1], CLASSES), r"train-images-idx3-ubyte should hold 750 bytes for \[25, 6, 5\] and holds 749"),
        ((idx(DRAWN) + b"1", CLASSES), "should hold 750 bytes"),
        ((idx(DRAWN)[:9], CLASSES), "train-images-idx3-ubyte is no idx file"),
        (
            (DRAWN, CLASSES[:20]),
            r"train-images-idx3-ubyte is \[25, 6, 5\] and train-labels-idx1-ubyte \[20\]; expected",
        ),
        ((CLASSES, CLASSES), r"train-images-idx3-ubyte is \[25\] and"),
        ((DRAWN, DRAWN), r"train-labels-idx1-ubyte \[25, 6, 5\]; expected"),
        ((DRAWN[:0], CLASSES[:0]), r"train-images-idx3-ubyte is \[0, 6, 5\] and"),
    ],
)
def test_damaged_files_of_mnists_format(opened, tmp_path, train, message):
    write_idx(tmp_path / "in", train=train)
    with pytest.raises(UserError, match=message):
        opened("idx:{}/in")


@pytest.mark.parametrize("where", [slice(0, 30), slice(30, 60)])  # cut off, and not what was zipped
def test_damaged_zipped_files(opened, tmp_path, where):
    write_idx(tmp_path / "in", zipped=True)
    file = tmp_path / "in" / "train-images-idx3-ubyte.gz"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[where] if where.start == 0 else data[:30] + bytes(30) + data[60:])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is damaged: ."):
        opened("idx:{}/in")


def test_no_folder_of_mnists_format(opened, tmp_path):
    (tmp_path / "mnist").mkdir()
    with pytest.raises(UserError, match=r"idx:.*: no folder .*mnits; did you mean 'mnist'"):
        opened("idx:{}/mnits")


def test_digits_are_scikit_learns_divided_once_and_for_all(opened):
    collection = opened("digits")
    known = sklearn.datasets.load_digits()
    sources = {split: collection.slice(split) for split in ("train", "validation", "test")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 1258, "validation": 180, "test": 359}
    rows = [row for source in sources.values() for row in source.__getitems__(range(len(source)))]
    found = {(row["image"].tobytes(), row["label"]) for row in rows}
    assert found == {
        ((image * 255 / 16).round().astype(np.uint8).tobytes(), label)
        for image, label in zip(known.images, known.target, strict=True)
    }
    assert collection.label_names == tuple("0123456789")
    assert colours(opened("digits").slice("test")) == colours(sources["test"])


def png(pixels_):
    content = io.BytesIO()
    Image.fromarray(pixels_).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "coarse": tfds.features.ClassLabel(names=["animal", "plant"]),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "oak"]),
        "id": tfds.features.Text(),
    }
    made = {
        split: [
            {"image": png(np.full((4 + i, 5, 3), add + i, np.uint8)), "coarse": i % 2, "label": i % 3, "id": str(i)}
            for i in range(count)
        ]
        for split, add, count in (("train", 0, 20), ("validation", 100, 5))
    }
    write_tfds(root, "small_pictures", features, made)
    return root


def test_tfds_keeps_pictures_of_any_size_as_they_were_encoded(opened, tfds_dir):
    collection = opened("tfds:small_pictures", tfds_dir=tfds_dir)
    source = collection.slice("train[50%:]+validation")
    assert colours(source) == [*range(10, 20), *range(100, 105)]
    assert labels(source) == [i % 3 for i in range(10, 20)] + [i % 3 for i in range(5)]
    assert collection.label_names == ("cat", "dog", "oak")
    row = source[3]
    assert bytes(row["image"])[:4] == b"\x89PNG"
    assert read_shape(row["image"]) == (17, 5)
    assert row["name"] == "tfds:small_pictures, train record 14"
    other = opened("tfds:small_pictures", label_field="coarse", tfds_dir=tfds_dir)
    assert other.label_names == ("animal", "plant")
    assert other.slice("train").fingerprint != collection.slice("train").fingerprint


def read_shape(data):
    return pixels(open_picture(data, 3)).shape[:2]


def test_tfds_mistakes(opened, tfds_dir):
    with pytest.raises(UserError, match=r"no image feature 'img'.*valid: image"):
        opened("tfds:small_pictures", image_field="img", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="no image feature 'id'; valid: image"):
        opened("tfds:small_pictures", image_field="id", tfds_dir=tfds_dir)
    with pytest.raises(
        UserError, match=r"no class feature 'coarser'; did you mean 'coarse'\? \(valid: coarse, label\)"
    ):
        opened("tfds:small_pictures", label_field="coarser", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match=r"'small_picture' is not prepared.*did you mean 'small_pictures'.*tfds build"):
        opened("tfds:small_picture", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="no split 'test'; valid: train, validation"):
        opened("tfds:small_pictures", tfds_dir=tfds_dir).slice("test")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("glyph", "did you mean 'glyphs'"),
        ("digit", "did you mean 'digits'"),
        ("image:photos", "did you mean 'images:FOLDER'"),
        ("images:", "did you mean 'images:FOLDER'"),
        ("tdfs:imagenet2012", "did you mean 'tfds:NAME"),
        ("idx", "did you mean 'idx:FOLDER'"),
        ("parquet:photos", "valid: digits, glyphs, idx:FOLDER, images:FOLDER, tfds:NAME"),
    ],
)
def test_sources_that_are_none(opened, given, meant):
    with pytest.raises(UserError, match=rf"unknown image source '{given}'; {meant}"):
        opened(given)


@pytest.mark.parametrize("given", ["digits", "images:photos", "idx:folder"])
def test_a_field_of_labels_is_refused_where_there_is_no_choice(opened, given):
    with pytest.raises(UserError, match=rf"config.data.label_field is 'face', and {given} has labels of one kind"):
        opened(given, label_field="face")

"""Rows of pictures: what a crop is decided by, what is left out, and that nothing is half written."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from sslx.config import build, to_config_dict
from sslx.data import images
from sslx.data.batches import DrawnRows, EvalBatches, TrainBatches
from sslx.data.images import ImageConfig, abstract_image_row, prepare_images, prepare_labelled_images
from sslx.errors import UserError


def photograph(place, height, width):
    """A picture that differs from place to place: two waves."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + place) + channel) + np.cos(y / (7 + channel)) for channel in range(3)]
    return Image.fromarray((np.stack(waves, axis=-1) * 60 + 128).astype(np.uint8))


def write_photographs(folder, count=12, kind="png"):
    for place in range(count):
        path = folder / ("cat" if place % 2 else "dog") / f"{place:02}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(place, 40 + place, 60 - place).save(path)
    return sorted(folder.rglob("*.*"))


@pytest.fixture
def photographs(tmp_path):
    return write_photographs(tmp_path / "in")


@pytest.fixture
def prepare(tmp_path):
    def prepared(seed=0, **changes):
        given = dict(
            train_split="train[:-4]", eval_split="train[-4:]", image_size=16, cache_dir=str(tmp_path / "cache")
        )
        return prepare_images(ImageConfig(**({"source": f"images:{tmp_path / 'in'}"} | given | changes)), seed)

    return prepared


def everything(rows):
    return rows.fetch(np.arange(len(rows)))


def test_rows_cut_in_the_step_are_pillows_own(photographs, prepare):
    data = prepare()
    expected = {}
    for path in photographs:
        picture = ImageOps.fit(Image.open(path), (16, 16), Image.Resampling.BICUBIC)
        expected[np.asarray(picture).tobytes()] = ("cat", "dog").index(path.parent.name)
    found = {}
    for rows in (data.train, data.eval):
        batch = everything(rows)
        assert batch["image"].shape == (len(rows), 16, 16, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        found |= {image.tobytes(): int(label) for image, label in zip(batch["image"], batch["label"], strict=True)}
    assert found == expected
    assert data.label_names == ("cat", "dog")
    assert (data.statistics["train_rows"], data.statistics["eval_rows"]) == (8, 4)
    assert data.statistics["train_undecodable"] == 0
    held_out = everything(data.eval)["label"]
    shares = [share for share in (np.mean(held_out == label) for label in (0, 1)) if share]
    assert data.statistics["eval_label_entropy"] == pytest.approx(-sum(share * np.log(share) for share in shares))


def test_rows_in_any_order_and_twice(photographs, prepare):
    for crop in ("step", "host"):
        rows = prepare(crop=crop).train
        whole = everything(rows)
        some = rows.fetch(np.array([5, 0, 5]))
        for name in ("image", "label"):
            np.testing.assert_array_equal(some[name], whole[name][[5, 0, 5]])


def test_grey_rows_and_what_a_row_looks_like_before_there_are_any(photographs, prepare, tmp_path):
    data = prepare(channels=1)
    row = everything(data.train)
    planned = abstract_image_row(ImageConfig(image_size=16, channels=1), labelled=True)
    assert {name: (value.shape, value.dtype) for name, value in planned.items()} == {
        name: (value.shape[1:], value.dtype) for name, value in row.items()
    }
    data.save(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["cat", "dog"]


def test_colours_that_are_made_grey_are_told_and_grey_pictures_are_not(photographs, prepare, tmp_path, capsys):
    prepare(channels=1)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert note == (
        f"note: pictures of images:{tmp_path / 'in'} have colours and are made grey; --config.data.channels=3 "
        "--config.model.channels=3 keeps the colours, from pretraining on"
    )
    for path in photographs:  # grey ones that are stored in three channels
        Image.open(path).convert("L").convert("RGB").save(path)
    prepare(channels=1)
    prepare(channels=3)
    assert "note: " not in capsys.readouterr().out


def test_a_host_crop_is_a_function_of_seed_epoch_and_row(photographs, prepare):
    rows = prepare(crop="host").train
    assert isinstance(rows, DrawnRows)
    ids, first = np.array([0, 3, 3, 7]), np.array([0, 0, 1, 5])
    drawn = rows.draw(ids, first, 1)["image"]
    np.testing.assert_array_equal(drawn, rows.draw(ids, first, 1)["image"])
    for place in range(4):  # alone, and in another order, the same
        np.testing.assert_array_equal(drawn[place], rows.draw(ids[[place]], first[[place]], 1)["image"][0])
    np.testing.assert_array_equal(drawn[::-1], rows.draw(ids[::-1], first[::-1], 1)["image"])
    assert (drawn[1] != drawn[2]).mean() > 0.5  # another epoch
    other = rows.draw(ids, first, 2)["image"]
    assert all((drawn[place] != other[place]).mean() > 0.5 for place in range(4))
    np.testing.assert_array_equal(rows.draw(ids, first, 1)["label"], rows.fetch(ids)["label"])


def test_a_host_crop_is_cut_from_the_whole_picture_before_it_is_made_small(tmp_path, prepare):
    # Black on the left, white on the right, and one column of grey between them: a crop of a picture that had been
    # made small first would have a soft edge.
    array = np.zeros((400, 400, 3), np.uint8)
    array[:, 200:] = 255
    for place in range(6):
        path = tmp_path / "in" / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(array + 0).save(path)
    rows = prepare(crop="host", crop_area=(0.01, 0.01), train_split="train[:-1]", eval_split="train[-1:]").train
    drawn = np.concatenate([rows.draw(np.arange(5), np.full(5, epoch), 0)["image"] for epoch in range(40)])
    sides = [set(np.unique(image[8, :, 0])) for image in drawn]
    assert {0} in sides
    assert {255} in sides
    edges = [image[8, :, 0] for image in drawn if {0, 255} <= set(np.unique(image[8, :, 0]))]
    assert edges
    # 40 columns become 16; had 400 become 16 first, a crop of 40 would be 1.6 columns drawn out over all.
    assert all(((edge > 25) & (edge < 230)).sum() <= 3 for edge in edges)


def test_host_crops_of_evaluation_are_the_middle(photographs, prepare):
    data = prepare(crop="host")
    expected = set()
    for path in photographs:
        picture = Image.open(path)
        side = 0.875 * min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        cut = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        expected.add(np.asarray(cut).tobytes())
    found = [image.tobytes() for rows in (data.train, data.eval) for image in everything(rows)["image"]]
    assert set(found) == expected


def sharding(devices):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def test_batches_of_host_crops_resume_exactly_and_are_the_same_on_any_number_of_devices(photographs, prepare):
    def batches(devices, seed=3):
        rows = prepare(crop="host").train
        return TrainBatches(rows, rows.order(seed), 8, sharding(devices), seed)

    unbroken = [jax.device_get(batch) for batch in batches(1).stream(0, 4)]
    for devices in (1, 8):
        resumed = [jax.device_get(batch) for batch in batches(devices).stream(2, 4)]
        for batch, expected in zip(resumed, unbroken[2:], strict=True):
            assert set(batch) == {"image", "label", "row"}
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert sorted(unbroken[0]["row"].tolist()) == list(range(8))  # an epoch is one batch here
    by_row = [batch["image"][np.argsort(batch["row"])] for batch in unbroken]
    assert (by_row[0] != by_row[1]).mean() > 0.5  # the next epoch cuts other parts


def test_fewer_pictures_than_a_batch_takes(photographs, prepare):
    rows = prepare().train
    with pytest.raises(UserError) as caught:
        TrainBatches(rows, rows.order(0), 16, sharding(1))
    assert str(caught.value) == (
        "the training data has 8 rows, fewer than one batch of config.batch_size=16; "
        "expected more data or a smaller batch"
    )


def test_evaluation_batches_of_host_crops_are_filled_up(photographs, prepare):
    rows = prepare(crop="host").eval
    batches = [jax.device_get(batch) for batch in EvalBatches(rows, 8, sharding(8))]
    assert batches[0]["valid"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(batches[0]["image"][:4], everything(rows)["image"])


def spoil(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("crop", ["step", "host"])
def test_broken_pictures_are_named_counted_and_left_out(photographs, prepare, capsys, crop):
    spoil(photographs[2])
    photographs[7].write_bytes(b"")
    data = prepare(train_split="train[:6]", eval_split="train[6:]", broken_share=0.5, crop=crop)
    counts = {
        role: (data.statistics[f"{role}_rows"], data.statistics[f"{role}_undecodable"]) for role in ("train", "eval")
    }
    assert sum(rows for rows, _ in counts.values()) == 10
    assert sum(broken for _, broken in counts.values()) == 2
    said = capsys.readouterr().out
    assert f"{photographs[2]}: " in said
    assert f"{photographs[7]}: an empty file" in said
    assert "of 6 pictures in train[:6] are left out" in said or "of 6 pictures in train[6:] are left out" in said
    labels = [everything(rows)["label"] for rows in (data.train, data.eval)]
    names = np.concatenate(labels).tolist()
    assert (names.count(0), names.count(1)) == (5, 5)  # one of each is broken
    assert len(data.train.draw(np.arange(len(data.train)), np.zeros(len(data.train), int), 0)["image"]) == len(
        data.train
    )
    # They are named again by a run that finds everything prepared.
    prepare(train_split="train[:6]", eval_split="train[6:]", broken_share=0.5, crop=crop)
    said = capsys.readouterr().out
    assert "preparing" not in said
    assert f"{photographs[2]}: " in said


def test_too_many_broken_pictures_are_an_error_and_leave_nothing_behind(photographs, prepare, tmp_path):
    for path in photographs[:9]:
        spoil(path)
    match = r"of 8 pictures in train\[:-4\] of images:.* cannot be used, more than config.data.broken_share=0.25: ."
    for crop in ("step", "host"):
        with pytest.raises(UserError, match=match):
            prepare(broken_share=0.25, crop=crop)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert len(prepare(broken_share=0.99).train) + len(prepare(broken_share=0.99).eval) == 3
    with pytest.raises(UserError, match=r"broken_share=0\.25"):  # prepared by then, and still too many
        prepare(broken_share=0.25)
    for path in photographs[9:]:
        spoil(path)
    with pytest.raises(UserError, match=r"8 of 8 pictures in train\[:-4\] .* more than config.data.broken_share=0.99"):
        prepare(broken_share=0.99)


def test_a_picture_that_breaks_later_is_named(photographs, prepare):
    rows = prepare(crop="host").train
    for path in photographs:
        spoil(path)
    with pytest.raises(UserError, match=r"in/(cat|dog)/\d\d.png has become undecodable: "):
        rows.fetch(np.arange(2))
    for path in photographs:
        path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*in/(cat|dog)/\d\d.png: No such file"):
        rows.fetch(np.arange(2))


def test_prepared_pixels_are_not_made_again_and_other_sizes_are(photographs, prepare, monkeypatch, capsys):
    first = everything(prepare().train)["image"]
    capsys.readouterr()
    looks = []
    look = images._look
    monkeypatch.setattr(images, "_look", lambda *given: looks.append(given) or look(*given))
    np.testing.assert_array_equal(everything(prepare().train)["image"], first)
    assert not looks
    assert prepare(image_size=8).train.fetch(np.array([0]))["image"].shape == (1, 8, 8, 3)
    assert len(looks) == 2
    known = [prepare(broken_share=0.5, **changes).statistics["fingerprint"] for changes in ({}, {"channels": 1})]
    spoil(photographs[0])  # other content has another fingerprint
    known.append(prepare(broken_share=0.5).statistics["fingerprint"])
    assert len(set(known)) == 3


@pytest.mark.parametrize("crop", ["step", "host"])
def test_so_many_rows_of_each_class_are_drawn_by_the_seed(photographs, prepare, crop):
    whole, some, again, other = (
        prepare(crop=crop), prepare(crop=crop, labels_per_class=2), prepare(crop=crop, labels_per_class=2),
        prepare(crop=crop, labels_per_class=2, seed=1),
    )  # fmt: skip
    assert np.bincount(everything(some.train)["label"]).tolist() == [2, 2]
    of_class = {image.tobytes(): label for image, label in zip(*everything(whole.train).values(), strict=True)}
    for image, label in zip(*everything(some.train).values(), strict=True):
        assert of_class[image.tobytes()] == label  # a row of the class, with its own label
    np.testing.assert_array_equal(everything(some.train)["image"], everything(again.train)["image"])
    assert set(map(bytes, everything(some.train)["image"])) != set(map(bytes, everything(other.train)["image"]))
    assert some.statistics["fingerprint"] not in (whole.statistics["fingerprint"], other.statistics["fingerprint"])
    np.testing.assert_array_equal(everything(some.eval)["image"], everything(whole.eval)["image"])  # all of them
    with pytest.raises(UserError, match=r"labels_per_class is 9, and class 'dog' .* has 3 pictures; expected at most"):
        prepare(crop=crop, labels_per_class=9)


def test_one_class_is_none(tmp_path):
    for place in range(8):
        (tmp_path / "in" / "cat").mkdir(parents=True, exist_ok=True)
        photograph(place, 20, 20).save(tmp_path / "in" / "cat" / f"{place}.png")
    config = ImageConfig(f"images:{tmp_path / 'in'}", image_size=8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"has one label, 'cat'; expected at least 2"):
        prepare_labelled_images(config)


def test_a_folder_without_classes_has_no_labels(tmp_path, prepare):
    for place in range(8):
        path = tmp_path / "in" / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        photograph(place, 20, 20).save(path)
    data = prepare()
    assert data.label_names is None
    assert data.train.labels is None
    assert "eval_label_entropy" not in data.statistics
    assert set(everything(data.train)) == {"image"}


def test_what_is_not_divided_is_divided_at_random(tmp_path):
    write_photographs(tmp_path / "in")
    config = ImageConfig(f"images:{tmp_path / 'in'}", image_size=8, cache_dir=str(tmp_path / "cache"))
    data = prepare_images(config)
    assert (len(data.train), len(data.eval), data.test) == (11, 1, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "config.data.image_size is 0; expected at least 1"),
        ({"channels": 4}, r"config.data.channels is 4; expected 3 \(RGB\) or 1"),
        ({"crop": "hots"}, "unknown config.data.crop 'hots'; did you mean 'host'"),
        (
            {"crop_area": (0.5, 0.2)},
            r"config.data.crop_area is \(0.5, 0.2\); expected two rising numbers above 0, at most",
        ),
        ({"crop_area": (0.5, 1.5)}, "config.data.crop_area is"),
        ({"crop_area": (0.5,)}, "config.data.crop_area is"),
        ({"crop_area": ("a", "b")}, "config.data.crop_area is"),
        ({"crop_aspect": (0, 1)}, r"config.data.crop_aspect is \(0, 1\); expected two rising numbers above 0$"),
        ({"broken_share": 1.0}, "config.data.broken_share is 1.0"),
        ({"sorce": "glyphs"}, "unknown key config.data.sorce; did you mean 'source'"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    written = to_config_dict(ImageConfig()).to_dict() | changes
    with pytest.raises(UserError, match=message):
        build(ImageConfig, written, "config.data")

"""Pictures with boxes: COCO's files and their errors, clipping by hand, the embedded set's exact boxes and masks."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from sslx.data import pasted as pasted_set
from sslx.data.boxes import CROWD, NOTHING, OBJECT, BoxConfig, abstract_box_row, in_row, prepare_boxes
from sslx.data.masks import MaskConfig, prepare_masks
from sslx.data.pasted import pasted
from sslx.errors import UserError


def coco_file(folder, changes=None, *, name="instances.json", pictures=4):
    """A COCO file of pictures of 40 x 20 pixels, with two boxes in the first and one in the second."""
    images = folder / "pictures"
    images.mkdir(exist_ok=True)
    for number in range(pictures):
        Image.new("RGB", (40, 20), (number * 20, 100, 50)).save(images / f"{number}.png")
    written = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(pictures)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [4, 2, 10, 8], "area": 60, "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 40, 20], "iscrowd": 1},
            {"id": 3, "image_id": 11, "category_id": 3, "bbox": [30.5, 10, 5, 5]},
        ],
    }
    file = folder / name
    file.write_text(json.dumps(written | (changes or {})))
    return BoxConfig(
        f"coco:{file}",
        images=str(images),
        train_split="train[:50%]",
        eval_split="train[50%:]",
        image_size=20,
        max_boxes=3,
        cache_dir=str(folder / "cache"),
    )


def all_rows(config):
    """Every row by its boxes; slices are in an order of their own."""
    data = prepare_boxes(config)
    parts = [rows.fetch(np.arange(len(rows))) for rows in (data.train, data.eval)]
    return data, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture
def boxes_everywhere(tmp_path):
    """A box in each of the four pictures, so that no slice is without."""
    extra = [{"id": 10 + i, "image_id": 12 + i, "category_id": 7, "bbox": [1, 1, 2, 2]} for i in range(2)]
    return coco_file(tmp_path, {"annotations": annotations_of(tmp_path) + extra})


def annotations_of(folder):
    coco_file(folder)
    return json.loads((folder / "instances.json").read_text())["annotations"]


def test_a_coco_file_becomes_rows_of_the_shapes_that_were_promised(boxes_everywhere):
    data, rows = all_rows(boxes_everywhere)
    assert data.label_names == ("dog", "cat")  # in the order of their ids, 3 and 7
    for name, leaf in abstract_box_row(boxes_everywhere).items():
        assert rows[name].shape == (4, *leaf.shape)
        assert rows[name].dtype == leaf.dtype
    (first,) = np.flatnonzero((rows["kind"] == CROWD).any(1))
    # 40 x 20 pixels become 20 x 10 at the top; the rest is grey.
    np.testing.assert_array_equal(rows["boxes"][first], [[2, 1, 7, 5], [0, 0, 20, 10], [0, 0, 0, 0]])
    assert rows["classes"][first].tolist() == [1, 0, 0]
    assert rows["kind"][first].tolist() == [OBJECT, CROWD, NOTHING]
    assert rows["area"][first].tolist() == [60, 800, 0]  # as written, or that of the box
    assert rows["scale"][first] == 0.5
    assert rows["extent"][first].tolist() == [20, 10]
    picture = rows["image"][first]
    assert (picture[:10] == [0, 100, 50]).all()
    assert (picture[10:] == 127).all()
    found = rows["boxes"][(rows["boxes"][:, 0, 0] == 15.25)][0, 0]
    np.testing.assert_array_equal(found, [15.25, 5, 17.75, 7.5])


def test_boxes_beyond_the_picture_are_clipped_dropped_and_counted():
    config = BoxConfig(image_size=20, max_boxes=2)
    record = {
        "boxes": np.array([[-4, 2, 8, 30], [50, 0, 60, 5], [1, 1, 3, 3], [5, 5, 5, 9], [2, 2, 6, 6.05]], float),
        "classes": np.arange(5, dtype=np.int32),
        "crowd": np.zeros(5, bool),
        "area": np.arange(5.0),
    }
    row, counts = in_row(record, (40, 6), config)
    # The first is cut at the left and below, the last by less than annotators' rounding; the second lies outside, the
    # fourth is empty, the third is the smallest of three.
    assert counts == {"boxes": 2, "clipped": 1, "outside": 2, "surplus": 1}
    np.testing.assert_allclose(row["boxes"], np.array([[0, 2, 8, 6], [2, 2, 6, 6]]) / 2)
    assert row["classes"].tolist() == [0, 4]
    assert row["area"].tolist() == [0, 4]


def test_what_was_clipped_is_told(tmp_path, capsys):
    annotations = [
        {"id": i, "image_id": 10 + i, "category_id": 7, "bbox": [30, 1, 20 if i < 2 else 5, 5]} for i in range(4)
    ]
    data, _ = all_rows(coco_file(tmp_path, {"annotations": annotations}))
    assert data.statistics["train_clipped"] + data.statistics["eval_clipped"] == 2
    assert "reach beyond their pictures and are clipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": "none"}, "has no list 'categories'; expected COCO's images, annotations and categories"),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
            r"annotation 5 has category_id 4, which is not in 'categories': 3 \(dog\), 7 \(cat\)",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            "annotation 5 is of image_id 99, which is not in 'images'",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [0, 0, 1]}]},
            r"annotation 5 has bbox \[0, 0, 1\]; expected \[left, top, width, height\]",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [9, 9, -4, 2]}]},
            r"annotation 5 has bbox \[9, 9, -4, 2\], of negative size; expected .*, not corners",
        ),
        (
            {"images": [{"id": 10, "file_name": "0.png"}, {"id": 11, "file_name": "01.png"}]},
            r"1 of 2 pictures of .* are not in .*pictures, such as '01.png'; did you mean '1.png'",
        ),
        ({"images": [{"id": "a", "file_name": "0.png"}]}, "'id' is 'a' in .*; expected int"),
        ({"annotations": []}, "has no box in any picture"),
    ],
)
def test_a_coco_file_that_is_wrong_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        prepare_boxes(coco_file(tmp_path, changes))
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    config = coco_file(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    for changes, message in (
        ({"source": f"coco:{tmp_path / 'instance.json'}"}, "did you mean 'instances.json'"),
        ({"source": f"coco:{tmp_path / 'broken.json'}"}, "broken.json is no JSON"),
        ({"source": "past"}, "unknown source of boxes 'past'; did you mean 'pasted'"),
        ({"images": ""}, "config.data.images is empty; expected the folder of the pictures"),
        ({"images": str(tmp_path / "nowhere")}, "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_boxes(BoxConfig(**{**config.__dict__, **changes}))


def test_files_named_like_splits_are_the_splits_and_have_folders_of_their_own(tmp_path):
    for year in ("train2017", "val2017"):
        coco_file(tmp_path, name=f"instances_{year}.json")
        (tmp_path / "pictures" / year).mkdir()
    for file in (tmp_path / "pictures").glob("*.png"):
        for year in ("train2017", "val2017"):
            (tmp_path / "pictures" / year / file.name).write_bytes(file.read_bytes())
        file.unlink()
    data = prepare_boxes(
        BoxConfig(
            f"coco:{tmp_path}/instances_*.json",
            images=str(tmp_path / "pictures"),
            image_size=20,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    assert (data.statistics["train_split"], data.statistics["eval_split"]) == ("train", "validation")
    assert len(data.train) == len(data.eval) == 4


def test_an_undecodable_picture_is_named_and_left_out(boxes_everywhere, tmp_path, capsys):
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 2 pictures in .* cannot be used, more than config.data.broken_share"):
        prepare_boxes(boxes_everywhere)
    data, _ = all_rows(BoxConfig(**{**boxes_everywhere.__dict__, "broken_share": 0.5}))
    assert len(data.train) + len(data.eval) == 3
    assert "3.png" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 2 pictures in .* more than config.data.broken_share=0.1"):
        prepare_boxes(BoxConfig(**{**boxes_everywhere.__dict__, "broken_share": 0.1}))  # prepared by then


def test_a_picture_of_another_size_than_annotated_is_left_out(boxes_everywhere, tmp_path, capsys):
    Image.new("RGB", (20, 40)).save(tmp_path / "pictures" / "2.png")
    _, rows = all_rows(BoxConfig(**{**boxes_everywhere.__dict__, "broken_share": 0.5}))
    assert len(rows["image"]) == 3
    assert "2.png: has 20 x 40 pixels, and 40 x 20 in its annotations" in capsys.readouterr().out


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The embedded set with few pictures."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pasted_set, "PICTURES", {"train": 60, "validation": 8, "test": 8})
    yield
    patch.undo()


def test_pasted_boxes_are_exactly_around_their_masks(few):
    made = pasted(os.environ["SSLX_CACHE"], 32)
    seen = set()
    for row in range(60):
        here = made.classes[row] >= 0
        covered = np.zeros((32, 32), bool)
        for box, kind in zip(made.boxes[row][here].astype(int), made.classes[row][here], strict=True):
            left, top, right, bottom = box
            inside = made.masks[row, top:bottom, left:right]
            assert set(np.unique(inside)) <= {0, kind + 1}
            shape = inside > 0
            # No row or column at the edges is empty, and boxes share no pixel.
            assert shape[0].any()
            assert shape[-1].any()
            assert shape[:, 0].any()
            assert shape[:, -1].any()
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
            seen.add(int(kind))
        assert not made.masks[row][~covered].any()
    assert seen == set(range(5))
    counts = (made.classes >= 0).sum(1)
    assert counts.min() >= 1
    assert counts.max() == 4


def test_the_embedded_set_serves_both_tasks_alike(few):
    boxes = prepare_boxes(BoxConfig(image_size=32, channels=1, max_boxes=4, test_split="test"))
    masks = prepare_masks(MaskConfig(image_size=32, channels=1, test_split="test"))
    assert (len(boxes.train), len(boxes.test)) == (60, 8)
    assert masks.label_names == ("background", *boxes.label_names)
    ids = np.arange(8)
    with_boxes, with_masks = boxes.test.fetch(ids), masks.test.fetch(ids)
    np.testing.assert_array_equal(with_boxes["image"], with_masks["image"])
    left, top, right, bottom = with_boxes["boxes"][0, 0].astype(int)
    assert set(np.unique(with_masks["mask"][0, top:bottom, left:right])) >= {with_boxes["classes"][0, 0] + 1}
    assert (with_boxes["scale"] == 1).all()
    pixels = np.bincount(masks.eval.fetch(ids)["mask"].ravel(), minlength=6) / (8 * 32 * 32)
    entropy = -sum(share * np.log(share) for share in pixels if share)
    assert masks.statistics["eval_pixel_entropy"] == pytest.approx(entropy)

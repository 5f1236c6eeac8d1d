"""Object detection: COCO's scores of boxes whose scores are known, the loss against NumPy, a small real run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import REPOSITORY
from PIL import Image
from small_pictures import MAE, memorised, squares

from sslx import finetune
from sslx.data.boxes import CROWD, NOTHING, OBJECT
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.vit import VitConfig
from sslx.tasks.object_detection import ObjectDetection, ObjectDetectionConfig
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import inherited
from sslx.train.sharding import unbox

MODEL = VitConfig(
    layers=1, width=16, heads=2, mlp_width=32, image_size=16, patch_size=4, channels=1, positions="sincos", pool="mean"
)
TASK = ObjectDetectionConfig(scales=(1.0, 0.5), head_layers=1, head_width=8, candidates=12)
OBJECTIVE = ObjectDetection(TASK, MODEL, ("round", "square", "flat"))


def predictions_of(guesses, truth, scale=1.0):
    """Predictions of one row; ``guesses`` and ``truth`` are of (box, class, score or kind)."""

    def columns(of):
        boxes, classes, last = zip(*of, strict=True)
        return np.array([boxes], float), np.array([classes]), np.array([last])

    boxes, classes, kind = columns(truth)
    guess_boxes, guess_classes, scores = columns(guesses)
    return {
        "boxes": boxes,
        "classes": classes,
        "kind": kind,
        "area": (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / scale**2,
        "scale": np.array([scale]),
        "guess_boxes": guess_boxes,
        "guess_classes": guess_classes,
        "guess_scores": scores,
        "image": np.zeros((1, 16, 16, 1), np.uint8),
    }


A, B = ([0, 0, 9, 9], 0), ([20, 20, 32, 26], 2)


def test_right_boxes_have_a_map_of_one():
    for scale in (1.0, 0.25):  # small objects, and objects of pictures four times as large
        found = predictions_of([(*A, 0.9), (*B, 0.6)], [(*A, OBJECT), (*B, OBJECT)], scale)
        scores = OBJECTIVE.score(found)
        assert scores == pytest.approx({"map": 1.0, "map50": 1.0, "map75": 1.0, "recall_100": 1.0})
        report = OBJECTIVE.report(found)
        assert report.values["map_of_class"] == pytest.approx({"round": 1.0, "flat": 1.0})
        # 81 and 72 pixels, or 1,296 and 1,152: COCO's small ones have less than 32 x 32.
        assert ("map_small" in report.values["coco"]) == (scale == 1.0)
        assert ("map_medium" in report.values["coco"]) == (scale != 1.0)
        assert "detections" in report.figures


def test_boxes_that_are_shifted_are_right_up_to_their_iou():
    # Shifted by 2 of 9 columns: 63 of 99 pixels, IoU 0.636, so right at 0.50, 0.55 and 0.60 of ten thresholds.
    found = predictions_of([([2, 0, 11, 9], 0, 0.9)], [(*A, OBJECT)])
    assert OBJECTIVE.score(found) == pytest.approx({"map": 0.3, "map50": 1.0, "map75": 0.0, "recall_100": 0.3})
    wrong_class = predictions_of([(A[0], 1, 0.9)], [(*A, OBJECT)])
    assert OBJECTIVE.score(wrong_class)["map"] == 0.0


def test_without_a_guess_classes_and_sizes_that_are_there_have_zero_and_others_none():
    unsure = predictions_of([(*A, 0.01)], [(*A, OBJECT)])  # below config.task.least_score
    report = OBJECTIVE.report(unsure)
    assert report.values["map_of_class"] == {"round": 0.0}
    assert {"map_small", "recall_small"} == {
        name for name in report.values["coco"] if name.endswith(("small", "large"))
    }
    assert OBJECTIVE.score(predictions_of([(*A, 0.9)], [(*A, NOTHING)]))["map"] == 0.0


def test_a_guess_in_a_crowd_is_not_held_against_it_and_a_double_one_is_suppressed():
    inside = ([22, 22, 26, 25], 0, 0.95)
    found = predictions_of([(*A, 0.9), inside], [(*A, OBJECT), ([18, 18, 40, 40], 0, CROWD)])
    assert OBJECTIVE.score(found)["map"] == pytest.approx(1.0)
    without = predictions_of([(*A, 0.9), inside], [(*A, OBJECT)])
    assert OBJECTIVE.score(without)["map"] == pytest.approx(0.5)  # a surer wrong guess before the right one
    double = predictions_of([([0, 0, 9, 8], 0, 0.95), (*A, 0.9)], [(*A, OBJECT)])
    (left,) = OBJECTIVE.guesses(double)
    assert left["scores"].tolist() == [0.95]


def test_it_is_refused_without_pycocotools(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else real(name))
    with pytest.raises(UserError, match="scored by pycocotools, which is not installed; pip install pycocotools"):
        ObjectDetection.prepare(load_config(REPOSITORY / "configs/finetune/object_detection.py").to_dict())


def test_scales_that_cannot_be():
    for scales in ((), (1.0, 2.0), (3.0,)):
        with pytest.raises(UserError, match=r"expected some of 4, 2, 1 and 0\.5, falling"):
            ObjectDetectionConfig(scales=scales)
    written = load_config(REPOSITORY / "configs/finetune/object_detection.py").to_dict()
    written["task"]["scales"], written["model"]["patch_size"] = (1.0, 0.5), 64
    with pytest.raises(UserError, match="1 patches a side do not divide by 2"):
        ObjectDetection.abstract(written)


@pytest.fixture(scope="module")
def batch():
    """Eight rows of random pixels with two boxes each, but the last, which has none."""
    draw = np.random.default_rng(0)
    corner = draw.uniform(0, 9, (8, 3, 2))
    kind = np.tile(np.array([1, 1, 0], np.int32), (8, 1))
    kind[-1] = 0
    return {
        "image": draw.integers(0, 256, (8, 16, 16, 1)).astype(np.uint8),
        "boxes": np.concatenate([corner, corner + draw.uniform(5, 7, (8, 3, 2))], -1).astype(np.float32),
        "classes": draw.integers(0, 3, (8, 3)).astype(np.int32),
        "kind": kind,
        "area": np.ones((8, 3), np.float32),
        "scale": np.ones(8, np.float32),
        "extent": np.tile(np.float32([16, 10]), (8, 1)),  # wider than high
        "row": np.arange(100, 108, dtype=np.int32),
    }


def test_the_loss_is_that_of_numpy_and_rows_that_fill_up_count_nothing(batch):
    @jax.jit
    def run(valid):
        params = unbox(OBJECTIVE.init(jax.random.key(0), batch))["params"]
        params = jax.tree.map(lambda array: 2.0 * array, params)
        viewed = OBJECTIVE.views(batch, jax.random.key(1), jnp.int32(0), train=False) | {"valid": valid}
        weights = viewed["weights"]
        masked = {name: (weight.T * valid).T for name, weight in weights.items()}
        out = OBJECTIVE.loss(params, {}, viewed | {"weights": masked}, jax.random.key(2), jnp.int32(0), train=False)
        found = OBJECTIVE.module.apply({"params": params}, viewed, deterministic=True)
        return {name: term.sum for name, term in out.terms.items()}, found, viewed["targets"], weights

    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))  # noqa: E731
    for rows in (8, 5):
        sums, found, targets, weights = jax.device_get(run(jnp.float32(np.arange(8) < rows)))
        classes, focal = targets.classes[:rows], 0.0
        assert (classes >= 0).sum() > 10
        assert weights["class"].tolist() == [max((of >= 0).sum(), 1) for of in targets.classes]
        p = sigmoid(found.logits[:rows])
        for kind in range(3):
            here = classes == kind
            focal -= (0.25 * (1 - p[..., kind]) ** 2 * np.log(p[..., kind]))[here].sum()
            focal -= (0.75 * p[..., kind] ** 2 * np.log(1 - p[..., kind]))[~here].sum()
        assert sums["class"] == pytest.approx(focal, rel=1e-4)
        boxes = middles = 0.0
        for row, place in np.argwhere(classes >= 0):
            one, other = np.float64(found.boxes[row, place]), np.float64(targets.boxes[row, place])
            wide, high = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
            shared = max(wide, 0) * max(high, 0)
            union = np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared
            around = np.prod(np.maximum(one[2:], other[2:]) - np.minimum(one[:2], other[:2]))
            middle = np.float64(targets.centerness[row, place])
            boxes += middle * (1 - shared / union + (around - union) / around)
            guess = sigmoid(found.centerness[row, place])
            middles -= middle * math.log(guess) + (1 - middle) * math.log(1 - guess)
        assert sums["box"] == pytest.approx(boxes, rel=1e-4)
        assert sums["centerness"] == pytest.approx(middles, rel=1e-4)


def test_a_guess_ends_where_the_picture_does_and_is_as_sure_as_class_and_centre(batch):
    def run():
        params = unbox(OBJECTIVE.init(jax.random.key(0), batch))["params"]
        viewed = OBJECTIVE.views(batch, jax.random.key(1), jnp.int32(0), train=False)
        found = OBJECTIVE.module.apply({"params": params}, viewed, deterministic=True)
        return OBJECTIVE.predict(params, {}, viewed), found

    said, found = jax.device_get(jax.jit(run)())
    assert found.boxes[..., 3].max() > 10  # the head knows nothing of the rest being grey
    p = [1 / (1 + np.exp(-np.float64(of))) for of in (found.logits, found.centerness[..., None])]
    for row in range(8):
        sure = np.sqrt(p[0] * p[1])[row]
        places, classes = np.unravel_index(np.argsort(-sure, axis=None)[:12], sure.shape)
        np.testing.assert_allclose(said["guess_scores"][row], sure[places, classes], rtol=1e-5)
        whole = said["guess_boxes"][row]
        assert whole.min() == 0
        assert (whole.max(axis=0) <= [16, 10, 16, 10]).all()
        # Of nearly equal scores the order is open; as sets the guesses are the same.
        expected = np.clip(found.boxes[row][places], 0, [16, 10, 16, 10])
        np.testing.assert_allclose(np.sort(whole, axis=0), np.sort(expected, axis=0), atol=1e-4)


def test_a_mirrored_picture_has_mirrored_boxes(batch):
    view = jax.jit(lambda: OBJECTIVE.views(batch, jax.random.key(3), jnp.int32(0), train=True))
    viewed = jax.device_get(view())
    turned = 0
    for row in range(8):
        image, left, right = viewed["image"][row], *batch["boxes"][row, :, [0, 2]]
        if np.allclose(image, batch["image"][row] / 255.0):
            np.testing.assert_allclose(viewed["boxes"][row], batch["boxes"][row])
        else:
            turned += 1
            np.testing.assert_allclose(image, batch["image"][row, :, ::-1] / 255.0, rtol=1e-6)
            np.testing.assert_allclose(viewed["boxes"][row, :, 0], 16 - right, rtol=1e-6)
            np.testing.assert_allclose(viewed["boxes"][row, :, 2], 16 - left, rtol=1e-6)
            np.testing.assert_array_equal(viewed["boxes"][row, :, 1::2], batch["boxes"][row, :, 1::2])
    assert 0 < turned < 8


def test_gradients_are_the_same_on_one_and_eight_devices(batch, gradients_on, assert_close):
    metrics, gradients = gradients_on(OBJECTIVE, batch, 1)
    assert {"class", "box", "centerness", "giou"} <= set(metrics)
    assert_close((metrics, gradients), gradients_on(OBJECTIVE, batch, 8))


def test_squares_that_were_trained_on_are_found_where_they_are():
    pictures, places = squares(16, 16)
    corner = np.array([place[:2] for place in places], np.float32)
    boxes = np.concatenate([corner, corner + np.array([place[2:] for place in places])], axis=1)
    batch = {
        "image": np.stack(pictures)[..., None],
        "boxes": boxes[:, None].astype(np.float32),
        "classes": np.arange(16, dtype=np.int32)[:, None] % 2,
        "kind": np.full((16, 1), OBJECT, np.int32),
        "area": np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)[:, None].astype(np.float32),
        "scale": np.ones(16, np.float32),
        "extent": np.full((16, 2), 16, np.float32),
        "row": np.arange(16, dtype=np.int32),
    }
    task = dataclasses.replace(TASK, scales=(2.0, 1.0), candidates=40)  # flipped half of the time
    objective = ObjectDetection(task, MODEL, ("dark", "bright"))
    scores = objective.score(memorised(objective, batch, 300))
    assert scores["map50"] > 0.9
    assert scores["map"] > 0.6


def test_a_run_on_small_pictures_starts_a_detector_of_larger_ones(pretrained_on_pictures, tmp_path):
    pictures, boxes = squares(24, 32)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    written = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(24)],
        "categories": [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [x, y, side, side]}
            for i, (x, y, side) in enumerate(boxes)
        ],
    }
    (tmp_path / "squares.json").write_text(json.dumps(written))
    config = load_config(REPOSITORY / "configs/finetune/object_detection.py")
    changes = {
        "data.source": f"coco:{tmp_path / 'squares.json'}",
        "data.images": str(tmp_path / "pictures"),
        "data.train_split": "train[:16]",
        "data.eval_split": "train[16:]",
        "data.test_split": "",
        "data.image_size": 32,
        "task.head_layers": 1,
        "task.head_width": 8,
        "steps": 2,
        "batch_size": 8,
        "optimizer.warmup_steps": 1,
        "eval.every_steps": 2,
        "eval.examples": 4,
        "init": str(pretrained_on_pictures),
    }
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    session = finetune.main(config, tmp_path / "run")
    assert session.objective.model.image_size == 32  # the run's pictures have 16
    assert session.objective.model.width == MAE["model.width"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 <= report["eval/map"] <= report["eval/map50"] <= 1
    assert set(report["map_of_class"]) <= {"dark", "bright"}
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == ["dark", "bright"]
    assert (tmp_path / "run" / "detections.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "pictures").glob("detections_*.png"))
    theirs, ours = (read_variables(run)["params"]["encoder"] for run in (pretrained_on_pictures, tmp_path / "run"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.shape(a), np.shape(b)), theirs, ours)
    # Two steps move them a little; random ones would be far away.
    old, new = (tree["patches"]["kernel"] for tree in (theirs, ours))
    assert 0 < np.abs(old - new).max() < 0.1 * np.abs(old).max()


def test_learned_positions_are_for_one_size_of_pictures(tmp_path):
    def started(**model):
        config = load_config(REPOSITORY / "configs/vit_mae.py").to_dict()
        config["model"] |= model
        (tmp_path / "config.json").write_text(json.dumps(config))
        task = load_config(REPOSITORY / "configs/finetune/object_detection.py").to_dict()
        return inherited(task | {"init": f"scratch:{tmp_path}"})[0]["model"]

    assert started(positions="sincos", image_size=32)["image_size"] == 64
    assert started(positions="rope", image_size=32, width=64)["width"] == 64
    assert started(positions="learned", image_size=64)["image_size"] == 64
    with pytest.raises(UserError, match=r"image_size is 64, and the model of .* has learned positions for .* 32"):
        started(positions="learned", image_size=32)

"""Segmentation: mIoU by hand, the loss against NumPy, devices, a small real run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entries import REPOSITORY
from PIL import Image
from small_pictures import memorised, squares

from sslx import finetune
from sslx.data.masks import IGNORED
from sslx.data.sources import SLICE_SEED
from sslx.entry import load_config
from sslx.models.vit import VitConfig
from sslx.tasks.segmentation import Segmentation, SegmentationConfig, coloured, confusion, intersection_over_union
from sslx.train.sharding import unbox

MODEL = VitConfig(
    layers=1, width=16, heads=2, mlp_width=32, image_size=16, patch_size=4, channels=1, positions="sincos", pool="mean"
)
OBJECTIVE = Segmentation(SegmentationConfig(), MODEL, ("ground", "tree", "house", "car"))


def test_miou_is_the_mean_over_classes_of_all_pixels_together():
    # Class 0: 5 shared of 5 + 1 + 1; class 1: 2 of 2 + 1 + 2; class 2: 0 of 2; class 3 is nowhere.
    wanted = jnp.array([[[0, 0, 0, 0, 0, 1]], [[0, 1, 1, 2, 1, 0]]])
    guess = jnp.array([[[0, 0, 0, 0, 0, 1]], [[1, 1, 0, 1, 2, 2]]])
    asked = jnp.ones((2, 1, 6), bool).at[1, 0, 5].set(False)
    found = np.asarray(confusion(wanted, guess, asked, 4))
    assert found[0].tolist() == [[5, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found[1].tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    of_class = intersection_over_union(found.sum(axis=0))
    np.testing.assert_allclose(of_class, [5 / 7, 2 / 6, 0 / 2, np.nan])
    assert OBJECTIVE.score({"confusion": found})["miou"] == pytest.approx((5 / 7 + 2 / 6) / 3)
    images = np.zeros((2, 16, 16, 1), np.uint8)
    masks = np.zeros((2, 16, 16), np.uint8)
    report = OBJECTIVE.report({"confusion": found, "image": images, "mask": masks, "guess": masks})
    assert report.values["iou_of_class"] == pytest.approx({"ground": 5 / 7, "tree": 2 / 6, "house": 0.0})
    assert OBJECTIVE.show({"confusion": found})[1] == {
        "classes": "ground, tree, house",
        "guesses": "ground, tree, house",
    }


def test_what_is_not_asked_for_is_grey():
    drawn = coloured(np.array([[0, 1, IGNORED]], np.uint8))
    assert drawn[0, 0].tolist() == [0, 0, 0]
    assert drawn[0, 2].tolist() == [200, 200, 200]
    assert drawn[0, 1].tolist() not in ([0, 0, 0], [200, 200, 200])


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    mask = draw.integers(0, 4, (8, 16, 16)).astype(np.uint8)
    mask[:, :3] = IGNORED
    return {
        "image": draw.integers(0, 256, (8, 16, 16, 1)).astype(np.uint8),
        "mask": mask,
        "row": np.arange(100, 108, dtype=np.int32),
    }


def test_the_loss_is_the_cross_entropy_of_enlarged_logits(batch):
    @jax.jit
    def run():
        params = unbox(OBJECTIVE.init(jax.random.key(0), batch))["params"]
        viewed = OBJECTIVE.views(batch, jax.random.key(1), jnp.int32(0), train=False)
        out = OBJECTIVE.loss(params, {}, viewed, jax.random.key(2), jnp.int32(0), train=False)
        hidden = MODEL.encoder().apply({"params": params["encoder"]}, viewed, deterministic=True)
        return out, hidden, params["head"], OBJECTIVE.predict(params, {}, viewed)

    out, hidden, head, predicted = jax.device_get(run())
    assert hidden.shape == (8, 17, 16)
    patches = np.float64(hidden[:, 1:]) @ head["kernel"] + head["bias"]
    grid = patches.reshape(8, 4, 4, 4)
    # Bilinear: pixel i of 16 looks at (i + 0.5) / 4 - 0.5 of 4, and at the edges at the nearest.
    at = np.clip((np.arange(16) + 0.5) / 4 - 0.5, 0, 3)
    low = np.minimum(at.astype(int), 2)
    share = (at - low)[:, None]
    weights = np.zeros((16, 4))
    weights[np.arange(16), low], weights[np.arange(16), low + 1] = 1 - share[:, 0], share[:, 0]
    logits = np.einsum("ip,jq,bpqc->bijc", weights, weights, grid)
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    asked = batch["mask"] != IGNORED
    wanted = np.where(asked, batch["mask"], 0)
    picked = np.take_along_axis(normalised, wanted[..., None].astype(int), -1)[..., 0]
    assert out.terms["segmentation"].sum == pytest.approx(-picked[asked].sum(), rel=1e-5)
    assert out.metrics["pixel_accuracy"].weight == asked.sum() == 8 * 13 * 16
    assert out.metrics["pixel_accuracy"].sum == (logits.argmax(-1) == wanted)[asked].sum()
    assert predicted["confusion"].sum() == asked.sum()
    assert np.trace(predicted["confusion"].sum(0)) == out.metrics["pixel_accuracy"].sum


def test_gradients_are_the_same_on_one_and_eight_devices(batch, gradients_on, assert_close):
    assert_close(gradients_on(OBJECTIVE, batch, 1), gradients_on(OBJECTIVE, batch, 8))


def test_squares_that_were_trained_on_are_segmented_where_they_are():
    pictures, places = squares(16, 16)
    masks = np.zeros((16, 16, 16), np.uint8)
    for number, (x, y, side) in enumerate(places):
        masks[number, y : y + side, x : x + side] = 1 + number % 2
    batch = {"image": np.stack(pictures)[..., None], "mask": masks, "row": np.arange(16, dtype=np.int32)}
    objective = Segmentation(SegmentationConfig(), MODEL, ("ground", "dark", "bright"))
    # Edges are within patches, of which the head knows four corners.
    assert objective.score(memorised(objective, batch, 300))["miou"] > 0.7


def test_a_run_reports_on_the_pictures_that_were_held_out(pretrained_on_pictures, tmp_path):
    pictures, boxes = squares(24, 32)
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "masks" / "classes.txt").write_text("ground\ndark\nbright\n")
    for number, (picture, (x, y, side)) in enumerate(zip(pictures, boxes, strict=True)):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[y : y + side, x : x + side] = 1 + number % 2
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    config = load_config(REPOSITORY / "configs/finetune/segmentation.py", f"data=masks:{tmp_path}/pictures")
    changes = {
        "data.masks": str(tmp_path / "masks"),
        "data.train_split": "train[:16]",
        "data.eval_split": "train[16:]",
        "data.image_size": 32,
        "steps": 12,
        "batch_size": 8,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 1,
        "eval.every_steps": 12,
        "eval.examples": 4,
        "log.every_steps": 1,
        "init": str(pretrained_on_pictures),
    }
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    finetune.main(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert report["eval/loss"] < losses[0]
    counts = np.array(report["confusion_matrix"])
    held_out = np.random.default_rng(SLICE_SEED).permutation(24)[16:]  # a split by places is a sample of the files
    names = sorted(path.name for path in (tmp_path / "masks").glob("*.png"))
    shown = [np.asarray(Image.open(tmp_path / "masks" / names[i])) for i in held_out]
    assert counts.sum(axis=1).tolist() == np.bincount(np.ravel(shown), minlength=3).tolist()
    assert report["eval/miou"] == pytest.approx(np.nanmean(intersection_over_union(counts)))
    assert set(report["iou_of_class"]) == {"ground", "dark", "bright"}
    assert (tmp_path / "run" / "segments.png").read_bytes().startswith(b"\x89PNG")

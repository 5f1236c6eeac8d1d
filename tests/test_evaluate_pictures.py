"""Probes of a run on pictures: rows of the run's own size, raw pixels and a supervised baseline beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from tiny_images import tiny_images

from sslx.config import build
from sslx.data.images import ImageConfig, PictureSet, prepare_images
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.evaluate import evaluate
from sslx.inference.loading import load_run
from sslx.probing.few_shot import FewShotConfig
from sslx.probing.images import ImageProbeConfig
from sslx.probing.linear import LinearProbeConfig

CONFIG = Path(__file__).parent.parent / "configs" / "evaluate" / "image_probe.py"


def test_rows_have_the_size_that_the_run_has_learned_from(picture_classifier):
    supervised = tiny_images("finetune/image_classification", model__image_size=32).to_dict()
    for name in ("data", "init", "steps"):
        supervised.pop(name, None)
    config = ImageProbeConfig(
        data=PictureSet("digits", test_split="test"),
        linear=LinearProbeConfig((0.01,), (1e-3,), 40),
        few_shot=FewShotConfig((2,), draws=2, steps=20),
        projection="pca",
        random_encoders=1,
        supervised=supervised,
    )
    written = evaluate(config, picture_classifier, load_run(picture_classifier))
    found = {(result["features"], result["probe"]): result for result in written["results"]}
    assert {name for name, _ in found} == {"pretrained", "random 0", "raw", "supervised", "commonest label"}
    assert found["raw", "linear"]["accuracy"] > 0.8  # which 64 grey pixels of a digit reach
    assert written["rows"] == {"train": 1258, "validation": 180, "test": 359}
    assert not {"image_size", "channels"} & set(written["config"]["data"])
    trained = json.loads((picture_classifier / "evaluate/image_probe/supervised/config.json").read_text())
    assert (trained["data"]["image_size"], trained["data"]["channels"]) == (8, 1)
    assert (trained["model"]["image_size"], trained["steps"]) == (8, 3)


@pytest.mark.parametrize(
    ("argument", "splits"),
    {
        "": ("train", "validation", "test"),
        "data=idx:here": ("train[:90%]", "train[90%:]", "test"),
        "data=images:here": ("train[:80%]", "train[80%:90%]", "train[90%:]"),
    }.items(),
)
def test_the_published_config_builds(argument, splits):
    written = load_config(CONFIG, argument).to_dict()
    data = build(ImageProbeConfig, written).data
    assert (data.train_split, data.eval_split, data.test_split) == splits
    written["data"]["image_size"] = 28
    with pytest.raises(UserError, match=r"unknown key config\.data\.image_size"):
        build(ImageProbeConfig, written)


def mnist_files(folder):
    """Forty pictures of 12 by 12 pixels and ten to test, in MNIST's format."""
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(count).integers(0, 256, (count, 12, 12), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 2
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())


@pytest.mark.parametrize(
    ("name", "argument", "splits"),
    [
        ("vit_mae", "", ("train[:-1]", "train[-1:]", None)),
        ("finetune/image_classification", "", ("train[:-1]", "train[-1:]", "test")),
        ("finetune/image_classification", "images", ("train[:-1]", "train[-1:]", None)),
    ],
)
def test_of_pictures_without_held_out_ones_some_of_train_are_held_out(name, argument, splits, tmp_path):
    mnist_files(tmp_path)
    source = f"idx:{tmp_path}"
    if argument:
        from PIL import Image

        source = f"images:{tmp_path}"
        for number in range(40):
            folder = tmp_path / "ab"[number % 2]
            folder.mkdir(exist_ok=True)
            Image.fromarray(np.full((9, 9), number, np.uint8)).save(folder / f"{number}.png")
    written = load_config(CONFIG.parent.parent / f"{name}.py", f"data={source}").to_dict()["data"]
    config = dataclasses.replace(build(ImageConfig, written), image_size=12, cache_dir=str(tmp_path / "cache"))
    data = prepare_images(config)
    assert tuple(data.statistics.get(f"{role}_split") for role in ("train", "eval", "test")) == splits
    assert (len(data.train), len(data.eval)) == (39, 1)


def test_sizes_that_differ_are_one_line_with_both_flags():
    from sslx.pretext.mae import Mae

    config: ml_collections.ConfigDict = load_config(CONFIG.parent.parent / "vit_mae.py", "data=idx:here")
    config.data.image_size = 28
    with pytest.raises(UserError) as error:
        Mae.abstract(config.to_dict())
    assert str(error.value) == (
        "config.data.image_size is 28 and config.model.image_size is 32; expected the same: "
        "--config.data.image_size=32, or for a new model --config.model.image_size=28"
    )

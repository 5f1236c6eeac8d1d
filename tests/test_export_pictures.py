"""Exporting runs on pictures: what is written is the averaged run, and starts another one again."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file
from small_pictures import pretrained
from tiny_images import tiny_images
from transformers import AutoConfig

import sslx
from sslx import finetune
from sslx.export import export
from sslx.train.checkpoint import read_variables


@pytest.fixture(scope="module")
def exported(picture_classifier, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "digits"
    export(str(picture_classifier), str(out), "hf")
    return out


def test_a_classifier_goes_out_with_averages_labels_and_preprocessing(picture_classifier, exported):
    variables, tensors = read_variables(picture_classifier), load_file(exported / "model.safetensors")
    averages, raw = variables["state"]["ema"]["params"], variables["params"]
    np.testing.assert_array_equal(tensors["classifier.weight"], averages["head"]["kernel"].T)
    assert np.abs(averages["head"]["kernel"] - raw["head"]["kernel"]).max() > 0
    kernel = averages["encoder"]["patches"]["kernel"]
    patches = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(patches[:, 0, 1, 0], kernel[2])  # the lower left of four grey pixels
    config = AutoConfig.from_pretrained(exported)
    assert config.architectures == ["ViTForImageClassification"]
    assert [config.id2label[label] for label in range(10)] == [str(label) for label in range(10)]
    given = json.loads((exported / "preprocessor_config.json").read_text())
    assert (given["image_mean"], given["image_std"], given["do_convert_rgb"]) == ([0.3], [0.4], False)
    assert (given["size"], given["crop_size"]) == ({"shortest_edge": 8}, {"height": 8, "width": 8})
    card = (exported / "README.md").read_text()
    assert 'AutoImageProcessor.from_pretrained("FOLDER")' in card
    assert 'processor(Image.open("a.png").convert("L"), return_tensors="pt")' in card
    assert "| a picture's features | the class token, of last_hidden_state |" in card
    assert "okenizer" not in card
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_an_exported_encoder_starts_another_run_with_the_same_features(picture_classifier, exported, tmp_path):
    config = tiny_images("finetune/image_classification", "linear", steps=3, init=str(exported))
    finetune.main(config, tmp_path / "run")
    digits = [np.full((8, 8), 40, np.uint8), np.arange(64, dtype=np.uint8).reshape(8, 8) * 4]
    expected = sslx.load(picture_classifier).embed(digits, normalise=False)
    np.testing.assert_allclose(sslx.load(tmp_path / "run").embed(digits, normalise=False), expected, atol=1e-5)


def test_of_a_masked_autoencoder_the_encoder_goes_out(tmp_path):
    run = pretrained(tmp_path)
    said = export(str(run), str(tmp_path / "out"), "hf")
    assert "transformers.ViTModel.from_pretrained" in said[-1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the mean of the patches, of last_hidden_state" in card
    assert str(tmp_path) not in card


def test_stablehlo_takes_pictures_as_the_card_says(picture_classifier, tmp_path):
    export(str(picture_classifier), str(tmp_path / "out"), "stablehlo")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "image uint8[batch, 8, 8, 1]" in card
    recipe = card.partition("```python\n")[2].partition("```")[0].replace("\nfeatures(", "\nfound = features(")
    scope: dict = {}
    exec(recipe.replace("FOLDER", str(tmp_path / "out")).replace("a.png", str(tmp_path / "a.png")), scope)
    expected = sslx.load(picture_classifier).embed(tmp_path / "a.png", normalise=False)
    np.testing.assert_allclose(scope["found"][0], expected, atol=1e-3)  # the way to 8 by 8 differs in a rounding
    loaded = jax_export.deserialize((tmp_path / "out" / "logits.stablehlo").read_bytes())
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    labels = json.loads((picture_classifier / "labels.json").read_text())
    for logits, found in zip(
        loaded.call({"image": images}), sslx.load(picture_classifier).classify(images), strict=True
    ):
        np.testing.assert_allclose(jax.nn.softmax(logits), [found.probabilities[name] for name in labels], atol=1e-5)

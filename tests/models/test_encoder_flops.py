"""FLOPs of image encoders: those that papers and libraries state, and those that XLA counts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sslx.models.convnext import ConvnextConfig
from sslx.models.igpt import IgptConfig
from sslx.models.resnet import ResnetConfig
from sslx.models.vit import SIZES, VitConfig
from sslx.train.sharding import unbox

VIT = VitConfig(layers=2, width=128, heads=2, mlp_width=512, image_size=64, patch_size=16)
IGPT = IgptConfig(layers=4, width=128, heads=4, mlp_width=512, image_size=16, max_length=256)


def counted(config):
    """What XLA counts of one image's features: multiplications and additions, and the little that is no product."""
    encoder = config.encoder()
    batch = {"image": jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), np.float32)}
    options = dict(deterministic=True, method="features")
    variables = jax.eval_shape(lambda b: unbox(encoder.init(jax.random.key(0), b, **options)), batch)
    return jax.jit(lambda v, b: encoder.apply(v, b, **options)).lower(variables, batch).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # torchvision's tables (billions of multiply-adds), less the classifier of 1,000 classes.
        (ResnetConfig(depth=18), 1.814 - 0.0005),
        (ResnetConfig(depth=50), 4.089 - 0.002),
        (ConvnextConfig(), 4.456 - 0.0008),
        (VitConfig(**SIZES["base"]), 17.564 - 0.0008),
    ],
    ids=["resnet18", "resnet50", "convnext", "vit"],
)
def test_flops_are_twice_the_published_multiply_adds(config, published):
    assert config.features_flops() / 2e9 == pytest.approx(published, abs=2e-3)


@pytest.mark.parametrize(
    "config",
    [
        VIT,
        dataclasses.replace(VIT, pool="attention", layers=1),
        dataclasses.replace(VIT, pool="attention", layers=1, glu=True),
        IGPT,  # the middle layer's states
        dataclasses.replace(IGPT, features_layer=3),
    ],
    ids=["vit", "attention", "gated", "igpt", "igpt3"],
)
def test_flops_of_features_are_those_that_xla_counts(config):
    assert config.features_flops() == pytest.approx(counted(config), rel=0.06)

"""ViT: its patches, its published sizes. What it computes is compared in ``tests/interop/test_parity.py``."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.models.vit import SIZES, VitConfig, patchify
from sslx.train.sharding import PARAMETER_AXES, is_box

# timm's vit_*_patch16_224 (huge: patch14) without the classifier.
PUBLISHED = {
    "tiny": 5_524_416,
    "small": 21_665_664,
    "base": 85_798_656,
    "large": 303_301_632,
    "huge": 630_764_800,
}


def test_patches_are_in_reading_order():
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    patches = np.asarray(patchify(image, 2))
    assert patches.shape == (2, 6, 12)
    for place, (top, left) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        np.testing.assert_array_equal(patches[:, place], image[:, top : top + 2, left : left + 2].reshape(2, -1))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(size):
    encoder = VitConfig(**SIZES[size]).encoder()
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)}
    boxed = jax.eval_shape(lambda batch: encoder.init(jax.random.key(0), batch, deterministic=True), batch)
    leaves = jax.tree.leaves(boxed["params"], is_leaf=is_box)
    assert sum(leaf.value.size for leaf in leaves) == PUBLISHED[size]
    assert {name for leaf in leaves for name in leaf.names} - {None} <= set(PARAMETER_AXES)


def test_images_that_do_not_divide_into_patches():
    with pytest.raises(UserError, match="image_size 225 does not divide into patches of 16"):
        VitConfig(image_size=225)

"""FLOPs of a step of each objective on pictures, against those that XLA counts of its loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.augment.policy import NONE
from sslx.models.igpt import IgptConfig
from sslx.models.vit import VitConfig
from sslx.pretext.igpt import Igpt, IgptPretextConfig
from sslx.pretext.jigsaw import Jigsaw, JigsawConfig
from sslx.pretext.mae import Mae, MaeConfig
from sslx.pretext.relative_patch import RelativePatch, RelativePatchConfig
from sslx.pretext.rotation import Rotation, RotationConfig
from sslx.pretext.simmim import SimMim, SimMimConfig
from sslx.tasks.image_classification import ImageClassification, ImageClassificationConfig
from sslx.train.sharding import unbox

# Of a narrow encoder on large patches, the embedding of patches is much.
VIT = VitConfig(layers=2, width=64, heads=2, mlp_width=256, image_size=64, patch_size=16, positions="sincos")
IGPT = IgptConfig(layers=4, width=128, heads=2, mlp_width=512, image_size=8, max_length=64, colours=200)
SHALLOW = dataclasses.replace(VIT, layers=1, pool="attention")
OBJECTIVES = {
    "mae": Mae(MaeConfig(decoder_layers=2, decoder_width=64, decoder_heads=2), VIT, False),
    "mae, learned positions": Mae(
        MaeConfig(decoder_layers=2, decoder_width=64, decoder_heads=2),
        dataclasses.replace(VIT, positions="learned"),
        False,
    ),
    "simmim": SimMim(SimMimConfig(), VIT, False),
    "igpt": Igpt(IgptPretextConfig(), IGPT, False),
    "rotation": Rotation(RotationConfig(), VIT, False),
    "relative_patch": RelativePatch(RelativePatchConfig(head_width=512), SHALLOW, False),
    "jigsaw": Jigsaw(JigsawConfig(permutations=500, head_width=512), SHALLOW, False),
    "classification": ImageClassification(ImageClassificationConfig(augment=NONE), VIT, ("a", "b"), False),
    "igpt's features": ImageClassification(ImageClassificationConfig(augment=NONE), IGPT, ("a", "b"), False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_costs_three_times_the_forward_pass(name):
    objective, rows = OBJECTIVES[name], 2
    size, channels = objective.model.image_size, objective.model.channels
    batch = {
        "image": jax.ShapeDtypeStruct((rows, size, size, channels), np.uint8),
        "row": jax.ShapeDtypeStruct((rows,), np.int32),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    key, step = jax.random.key(0), jnp.int32(0)
    variables = jax.eval_shape(lambda b: unbox(objective.init(key, b)), batch)
    viewed = jax.eval_shape(lambda b: objective.views(b, key, step, train=False), batch)

    def loss(params, state, viewed):
        return objective.loss(params, state, viewed, key, step, train=False).terms

    forward = jax.jit(loss).lower(variables["params"], variables["state"], viewed).cost_analysis()["flops"]
    shapes = {name: leaf.shape for name, leaf in batch.items()}
    assert objective.flops(shapes) == pytest.approx(3.0 * forward, rel=0.06)

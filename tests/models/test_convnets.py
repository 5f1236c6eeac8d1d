"""ResNet and ConvNeXt: what PyTorch's functions compute, published sizes, and batch statistics of the whole batch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.drawn_weights import drawn, drawn_images

from sslx.errors import UserError
from sslx.models.convnext import SIZES, ConvnextConfig
from sslx.models.resnet import ResnetConfig, relu
from sslx.settings import MeshConfig
from sslx.train import sharding
from sslx.train.sharding import PARAMETER_AXES, is_box, parameter_name, unbox

RESNETS = {
    "resnet18": ResnetConfig(depth=18, width=4, stem="cifar", image_size=16),
    "resnet50": ResnetConfig(depth=50, width=4, image_size=32),
}
CONVNEXT = ConvnextConfig(depths=(1, 2, 1), widths=(8, 16, 24), stem=2, image_size=16)

# torchvision's and ConvNeXt's own models, without the classifier.
RESNET_PARAMETERS = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160, 152: 58_143_808}
CONVNEXT_PARAMETERS = {"tiny": 27_820_128, "small": 49_454_688, "base": 87_566_464}


@pytest.fixture(scope="module")
def golden(request):
    with np.load(request.path.parent.parent / "goldens" / "convnets_tiny.npz") as arrays:
        return dict(arrays)


def theirs_of_resnet(name: str, bottleneck: bool) -> str:
    """``params/stage_0_block_1/conv_0/kernel`` as torchvision calls it."""
    last = "3" if bottleneck else "2"
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    *above, of, part = name.split("/")[1:]
    numbers = {"0": "1", "1": "2", "out": last}
    if match := re.fullmatch(r"conv_(\w+?)(_norm)?", of):
        of = ("bn" if match[2] else "conv") + numbers[match[1]]
    else:
        of = {"stem": "conv1", "stem_norm": "bn1", "shortcut": "downsample.0", "shortcut_norm": "downsample.1"}[of]
    if above:
        stage, block = re.fullmatch(r"stage_(\d)_block_(\d+)", above[0]).groups()
        of = f"layer{int(stage) + 1}.{block}.{of}"
    return f"{of}.{leaf.get(part, part)}"


def theirs_of_convnext(name: str) -> str:
    """The same of ConvNeXt, whose blocks are numbered by stage."""
    of, part = name.split("/", 1)[1].rsplit("/", 1) if name.count("/") > 1 else ("", name)
    part = {"kernel": "weight", "scale": "weight", "layer_scale": "gamma"}.get(part, part)
    blocks = [f"stages.{stage}.{block}" for stage, depth in enumerate(CONVNEXT.depths) for block in range(depth)]
    of = re.sub(r"^blocks_(\d)", lambda match: blocks[int(match[1])], of)
    of = re.sub(r"^halvings_(\d)", lambda match: f"downsample_layers.{int(match[1]) + 1}", of)
    if of.startswith("downsample"):
        of = of.replace("/norm", ".0").replace("/conv", ".1")
    names = {"stem": "downsample_layers.0.0", "stem_norm": "downsample_layers.0.1", "final_norm": "norm"}
    of = names.get(of, of).replace("/", ".")
    of = of.replace("depthwise", "dwconv").replace(".up", ".pwconv1").replace(".down", ".pwconv2")
    return f"{of}.{part}"


def filled(encoder, images, theirs):
    """Variables of an encoder with the weights that the golden was computed with."""

    def leaf(path, shape):
        name = theirs(parameter_name(path))
        if len(shape.shape) == 4:
            height, width, inputs, outputs = shape.shape
            return drawn(name, (outputs, inputs, height, width)).transpose(2, 3, 1, 0)
        return drawn(name, shape.shape[::-1]).T

    batch = {"image": images}
    shapes = jax.eval_shape(
        lambda: unbox(encoder.init(jax.random.key(0), batch, deterministic=True, method="features"))
    )
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def features(encoder, variables, images, **options):
    return jax.jit(lambda v, i: encoder.apply(v, {"image": i}, method="features", **options))(variables, images)


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_computes_what_pytorch_computes(name, golden):
    config = RESNETS[name]
    images = drawn_images(8, config.image_size, 3)
    encoder = config.encoder()
    variables = filled(encoder, images, lambda ours: theirs_of_resnet(ours, config.depth >= 50))
    found = features(encoder, variables, images, deterministic=True)
    expected = golden[f"{name}/evaluated"]
    assert found.shape == (8, config.features_width)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_batch_statistics_are_those_of_the_whole_batch_on_any_mesh(devices, golden):
    # One picture a device: statistics of a device's own rows would be far from these.
    name, config = "resnet18", RESNETS["resnet18"]
    images = drawn_images(8, config.image_size, 3)
    encoder = config.encoder()
    variables = filled(encoder, images, lambda ours: theirs_of_resnet(ours, config.depth >= 50))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with sharding.on_mesh(mesh):
        placed = jax.device_put(images, sharding.batch_sharding(mesh))
        found, moved = features(encoder, variables, placed, deterministic=False, mutable=["batch_stats"])
    expected = golden[f"{name}/trained"]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    for path, value in jax.tree_util.tree_leaves_with_path(moved["batch_stats"]):
        theirs = theirs_of_resnet("batch_stats/" + parameter_name(path), config.depth >= 50)
        norm, _, part = theirs.rpartition(".")
        there = golden[f"{name}/{theirs}"]
        if part == "running_var":
            # Theirs moves to the variance over one number less than the batch has.
            old, count = drawn(theirs, there.shape), int(golden[f"{name}/{norm}.count"])
            there = 0.9 * old + (there - 0.9 * old) * (count - 1) / count
        np.testing.assert_allclose(value, there, rtol=2e-3, atol=2e-3 * np.abs(there).max(), err_msg=theirs)


def test_convnext_computes_what_pytorch_computes(golden):
    images = drawn_images(8, 16, 3)
    encoder = CONVNEXT.encoder()
    variables = filled(encoder, images, theirs_of_convnext)
    found = features(encoder, variables, images, deterministic=True)
    np.testing.assert_allclose(found, golden["convnext/evaluated"], atol=1e-4)


def parameters(config):
    batch = {"image": jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), np.float32)}
    boxed = jax.eval_shape(
        lambda b: config.encoder().init(jax.random.key(0), b, deterministic=True, method="features"), batch
    )["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    assert {name for _, leaf in leaves for name in leaf.names} - {None} <= set(PARAMETER_AXES)
    # What has one axis is a bias, a norm's scale or a layer scale, and none of these is decayed.
    kept = [re.compile(pattern) for pattern in (r"(^|/)bias$", r"norm/scale$", r"layer_scale$")]
    for path, leaf in leaves:
        assert (leaf.value.ndim == 1) == any(pattern.search(parameter_name(path)) for pattern in kept)
    return sum(leaf.value.size for _, leaf in leaves)


@pytest.mark.parametrize("depth", RESNET_PARAMETERS)
def test_resnets_have_the_published_number_of_parameters(depth):
    assert parameters(ResnetConfig(depth=depth)) == RESNET_PARAMETERS[depth]


@pytest.mark.parametrize("size", CONVNEXT_PARAMETERS)
def test_convnexts_have_the_published_number_of_parameters(size):
    assert parameters(ConvnextConfig(**SIZES[size])) == CONVNEXT_PARAMETERS[size]


def test_a_block_of_a_new_resnet_is_its_shortcut():
    config = ResnetConfig(depth=10, width=4, stem="cifar", image_size=8)
    batch = {"image": jnp.zeros((1, 8, 8, 3))}
    fresh = unbox(jax.jit(lambda: config.encoder().init(jax.random.key(0), batch, deterministic=True))())
    for name, block in fresh["params"].items():
        if name.startswith("stage"):
            assert not block["conv_out_norm"]["scale"].any()


def test_convnext_drops_the_branches_of_whole_rows_by_depth():
    config = ConvnextConfig(depths=(1, 1), widths=(4, 4), stem=1, image_size=4, channels=1, drop_path=0.5)
    encoder, images = config.encoder(), np.zeros((1000, 4, 4, 1), np.float32)
    batch = {"image": images[:1]}
    init = lambda: encoder.init(jax.random.key(0), batch, deterministic=True, method="features")  # noqa: E731
    variables = unbox(jax.jit(init)())
    for block in ("blocks_0", "blocks_1"):
        variables["params"][block]["down"]["bias"] += 1.0  # what a branch adds where it is not skipped
        variables["params"][block]["layer_scale"] = jnp.ones(4)

    def sown(key):
        _, inside = encoder.apply(
            variables,
            {"image": images},
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: module.name in ("blocks_0", "blocks_1", "halvings_0"),
        )
        return {name: of["__call__"][0] for name, of in inside["intermediates"].items()}

    blocks = jax.jit(sown)(jax.random.key(1))
    branch = np.asarray(blocks["blocks_1"] - blocks["halvings_0"])
    kept = np.abs(branch).max(axis=(1, 2, 3)) > 1e-6
    assert np.mean(kept) == pytest.approx(0.5, abs=0.064)  # four standard deviations
    # Kept ones are enlarged: in the mean it is the branch, which for pictures of one colour is 1 at every place.
    np.testing.assert_allclose(branch[kept], 2.0, atol=1e-2)
    first = np.asarray(blocks["blocks_0"])
    assert np.ptp(first, axis=0).max() < 1e-6  # the first block skips no row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(depth=19), "depth is 19; expected one of 10, 18, 34, 50, 101, 152"),
        (dict(stem="cifr"), "did you mean 'cifar'"),
        (dict(momentum=1.0), "momentum is 1.0"),
        (dict(pixel_mean=(0.5, 0.5)), "pixel_mean has 2 values for 3 channels"),
        (dict(pixel_std=(0.0,)), r"pixel_std is \(0\.0,\); expected more than 0"),
    ],
)
def test_a_resnet_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        ResnetConfig(**settings)


def test_a_convnext_that_cannot_be():
    with pytest.raises(UserError, match="image_size 28 does not divide by 32"):
        ConvnextConfig(image_size=28)
    with pytest.raises(UserError, match="expected as many numbers in both"):
        ConvnextConfig(depths=(1, 2), widths=(4,))
    with pytest.raises(UserError, match="pixel_std has 2 values for 3 channels"):
        ConvnextConfig(pixel_std=(0.5, 0.5))
    with pytest.raises(UserError, match="layer_scale is -1"):
        ConvnextConfig(layer_scale=-1.0)


def test_relu_is_the_maximum_with_its_gradient_and_lets_nan_through():
    x = jnp.array([-1.5, -0.0, 0.0, 2.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(relu(x), jax.nn.relu(x))
    assert relu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    gradient = jax.vmap(jax.grad(relu))(x[:4])
    np.testing.assert_array_equal(gradient, [0, 0, 0, 1])

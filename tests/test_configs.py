"""Every config in ``configs/`` builds at its full size, without data and without arrays."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.bert import SIZES
from sslx.models.gpt import SIZES as GPT_SIZES
from sslx.session import run_config
from sslx.train.initialise import inherited, objective_class, part_of
from sslx.train.optimizer import make_optimizer, make_schedule
from sslx.train.sharding import PARAMETER_AXES, is_box, unbox

CONFIGS = Path(__file__).parent.parent / "configs"
# Evaluations train nothing; test_evaluate.py builds theirs.
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py") if path.parent != CONFIGS / "evaluate")
MILLIONS = {"tiny": 4.4, "mini": 11.2, "small": 29.0, "base": 109.5, "large": 335.2}  # without pooler and sentence head


def shapes(file, argument="", *, features=False):
    """Boxed parameters of a config at full size; its optimizer is built over them too, and its features if asked."""
    written = load_config(CONFIGS / file, argument).to_dict()
    config = run_config(written, part_of(written))
    objective, row = objective_class(written).abstract(written)
    batch = {name: np.zeros((1, *leaf.shape), leaf.dtype) for name, leaf in row.items()} | {"row": np.zeros(1, int)}
    variables = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
    boxed = variables["params"]
    if features:
        whole, varied = (jax.eval_shape(of, unbox(variables), batch) for of in _features(objective))
        assert (whole.dtype, varied) in ((np.float32, whole), (np.float32, None))
        assert whole.shape[0] == 1
    make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps), boxed)
    assert objective.flops({name: array.shape for name, array in batch.items()}) > 0
    return boxed


def _features(objective):
    """What diagnostics ask: features of rows as they are, and of random views of them, if it draws any."""

    def whole(variables, batch):
        return objective.encode(objective.encoder(variables["params"], variables["state"]), batch)

    def varied(variables, batch):
        seen = objective.variant(batch, jax.random.key(0))
        return None if seen is None else whole(variables, seen)

    return whole, varied


@pytest.mark.parametrize("file", FILES)
def test_every_config_builds_and_names_the_axes_of_its_parameters(file):
    for leaf in jax.tree.leaves(shapes(file, features=True), is_leaf=is_box):
        assert is_box(leaf)
        assert set(leaf.names) - {None} <= set(PARAMETER_AXES)


@pytest.mark.parametrize("size", SIZES)
def test_bert_of_every_size_has_its_published_parameters(size):
    leaves = jax.tree.leaves(shapes("bert_mlm.py", size))
    assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(MILLIONS[size], rel=0.01)


def test_berts_two_phases_are_its_steps_and_its_schedule():
    whole, one, two = (load_config(CONFIGS / "bert_mlm.py", f"base{phase}") for phase in ("", ",phase=1", ",phase=2"))
    assert (one.steps, two.steps, one.steps + two.steps) == (900_000, 100_000, whole.steps)
    assert (one.data.seq_len, two.data.seq_len) == (128, 512)
    assert one.batch_size == two.batch_size == 256
    rates = [make_schedule(run_config(c.to_dict(), "pretext").optimizer, c.steps) for c in (whole, one, two)]
    for step in (0, 9_999, 500_000, 899_999):
        assert rates[1](step) == rates[0](step)
    for step in (0, 1, 50_000, 99_999):
        np.testing.assert_allclose(rates[2](step), rates[0](900_000 + step), rtol=1e-4, atol=1e-12)
    # The second has the parameters of the first, row for row, and starts from no run unless one is given.
    boxed = [shapes("bert_mlm.py", f"base,phase={phase}") for phase in (1, 2)]
    assert jax.tree.map(np.shape, boxed[0]) == jax.tree.map(np.shape, boxed[1])
    with pytest.raises(UserError, match=r"config.init is not given; expected --config.init=FOLDER, the run of phase=1"):
        inherited(two.to_dict())


def test_a_phase_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"phase=2 needs one of the published sizes: tiny, mini"):
        load_config(CONFIGS / "bert_mlm.py", "phase=2")
    with pytest.raises(UserError, match=r"unknown phase of configs/bert_mlm\.py '3'"):
        load_config(CONFIGS / "bert_mlm.py", "base,phase=3")


@pytest.mark.parametrize(("size", "discriminator"), {"small": 13.6, "base": 109.5, "large": 335.2}.items())
def test_electra_of_every_size_has_its_published_parameters(size, discriminator):
    boxed = shapes("electra.py", size)
    kept = [boxed["encoder"], boxed["discriminator_head"]]
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) / 1e6 == pytest.approx(discriminator, rel=0.01)


def test_data2vec_of_its_published_size_builds():
    shapes("span_context.py", "base")


@pytest.mark.parametrize(("size", "parameters"), {"base": 111_907_840, "large": 329_541_888}.items())
def test_mae_of_every_size_has_its_published_parameters(size, parameters):
    boxed = shapes("vit_mae.py", size)
    # Theirs has both tables of fixed positions among them.
    fixed = 197 * ({"base": 768, "large": 1024}[size] + 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed)) == parameters - fixed


@pytest.mark.parametrize(
    ("file", "rate", "warmup", "epochs", "clip", "beta2"),
    [
        # facebookresearch/mae: PRETRAIN.md and main_pretrain.py.
        ("vit_mae.py", 1.5e-4 * 4096 / 256, 40, 800, None, 0.95),
        # microsoft/SimMIM: configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml and config.py.
        ("vit_simmim.py", 1e-4 * 2048 / 512, 10, 800, 5.0, 0.999),
    ],
)
def test_published_recipes_are_those_of_their_authors(file, rate, warmup, epochs, clip, beta2):
    config = run_config(load_config(CONFIGS / file, "base").to_dict(), "pretext")
    optimizer, per_epoch = config.optimizer, 1_281_167 / config.batch_size
    assert optimizer.learning_rate == pytest.approx(rate)
    assert (optimizer.clip_norm, optimizer.beta1, optimizer.beta2) == (clip, 0.9, beta2)
    assert (optimizer.schedule, optimizer.final_scale, optimizer.weight_decay) == ("cosine", 0.0, 0.05)
    assert (optimizer.warmup_steps / per_epoch, config.steps / per_epoch) == pytest.approx((warmup, epochs), rel=1e-2)


@pytest.mark.parametrize(("size", "millions"), {"small": 76, "medium": 455, "large": 1362}.items())
def test_igpt_of_every_size_has_its_published_parameters(size, millions):
    leaves = jax.tree.leaves(shapes("vit_igpt.py", size))
    assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("file", ["vit_simmim.py", "rotation.py", "relative_patch.py", "jigsaw.py"])
def test_the_other_tasks_on_images_build_at_imagenets_size(file):
    boxed = shapes(file, "base")
    encoder = sum(leaf.size for leaf in jax.tree.leaves(boxed["encoder"]))
    assert encoder == 85_798_656  # timm's vit_base_patch16_224 without the classifier


JOINT = ("simclr", "byol", "simsiam", "barlow_twins", "vicreg", "moco_v3", "swav", "dino")


@pytest.mark.parametrize("name", JOINT)
def test_joint_embedding_builds_at_cifars_and_at_imagenets_size(name):
    encoders = [shapes(f"{name}.py", size)["encoder"] for size in ("cifar10", "base")]
    # torchvision's, without their classifiers: ResNet-18 with a 3 x 3 stem, and ResNet-50; DINO's is timm's ViT-S/16.
    counts = [sum(leaf.size for leaf in jax.tree.leaves(encoder)) for encoder in encoders]
    assert counts == [11_168_832, 21_665_664 if name == "dino" else 23_508_032]


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "byol", "simsiam", "barlow_twins", "vicreg"])
def test_joint_embedding_of_texts_may_start_from_a_run_of_bert_mlm(name):
    encoders = (shapes(f"{name}.py", "sentences", features=True)["encoder"], shapes("bert_mlm.py")["encoder"])
    assert jax.tree.map(np.shape, encoders[0]) == jax.tree.map(np.shape, encoders[1])


def test_a_recipe_in_smaller_batches_sees_as_many_pictures_and_its_averages_remember_as_many():
    whole, small = (load_config(CONFIGS / "dino.py", f"cifar10{batch}") for batch in ("", ",batch=64"))
    assert (small.batch_size, small.steps) == (64, 4 * whole.steps)
    assert small.optimizer.warmup_steps == 4 * whole.optimizer.warmup_steps
    assert small.pretext.teacher_temperature_steps == 4 * whole.pretext.teacher_temperature_steps
    assert small.optimizer.learning_rate == pytest.approx(whole.optimizer.learning_rate / 2)
    for momentum in ("start", "end"):
        assert small.pretext.momentum[momentum] ** 4 == pytest.approx(whole.pretext.momentum[momentum])
    assert small.pretext.centre_momentum**4 == pytest.approx(whole.pretext.centre_momentum)
    with pytest.raises(UserError, match="argument batch is 'few'; expected a number of rows"):
        load_config(CONFIGS / "dino.py", "batch=few")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # timm's ViT-S/16; ViT-B/16 with fixed positions, without and with class token; ResNet-18 with a 3 x 3 stem.
    {
        "ibot": 21_665_664,
        "ijepa": 85_798_656 - 768 - 197 * 768,
        "data2vec": 85_798_656 - 197 * 768,
        "infomax": 11_168_832,
    }.items(),
)
def test_ibot_ijepa_data2vec_and_infomax_build_at_their_full_size(name, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(f"{name}.py", "base")["encoder"])) == parameters


def test_a_linear_probe_trains_its_head_alone():
    boxed = shapes("finetune/image_classification.py", "linear")
    written = load_config(CONFIGS / "finetune/image_classification.py", "linear").to_dict()
    optimizer = make_optimizer(run_config(written, "task").optimizer, lambda step: 0.1, boxed)
    trained = [leaf for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, unbox(boxed))) if leaf.ndim]
    # Two moments of the head, and nothing of the encoder.
    assert sorted(leaf.shape for leaf in trained) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(boxed["head"])])


def test_pairs_may_have_numbers():
    shapes("finetune/text_pairs.py", "data=csv:pairs.csv,labels=number")


@pytest.mark.parametrize("size", GPT_SIZES)
def test_gpt_of_every_size_builds(size):
    shapes("gpt_clm.py", size)


def test_an_unknown_size_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="'bas'; did you mean 'base'"):
        load_config(CONFIGS / "bert_mlm.py", "bas")
    with pytest.raises(UserError, match=r"unknown config argument 'dta'.* did you mean 'data'"):
        load_config(CONFIGS / "bert_mlm.py", "base,dta=text:*.txt")

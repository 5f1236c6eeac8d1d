"""All architectures against Hugging Face's PyTorch: their weights compute here what they computed there, and go back.

``tests/goldens/record_hf.py`` recorded ``*_tiny.npz``.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from safetensors.numpy import load_file
from transformers import AutoConfig

from sslx.config import build, load_class
from sslx.errors import UserError
from sslx.interop import preprocessor
from sslx.interop.folder import PublishedFolder
from sslx.interop.writing import published as published_form
from sslx.interop.writing import write
from sslx.models import MODELS
from sslx.models.bert import DiscriminatorHead, MaskedTokenHead
from sslx.models.igpt import IgptConfig
from sslx.models.layers import tied_logits
from sslx.models.resnet import ResnetConfig
from sslx.models.vit import VitConfig, sincos_table
from sslx.train.sharding import unbox

NAMES = ("bert", "roberta", "gpt2", "electra", "electra_generator", "vit", "vit_classifier")
CLASSES = dict(
    bert="BertForPreTraining",
    roberta="RobertaForMaskedLM",
    gpt2="GPT2LMHeadModel",
    electra="ElectraForPreTraining",
    electra_generator="ElectraForMaskedLM",
    vit="ViTModel",
    vit_classifier="ViTForImageClassification",
)


def opened(folder):
    start = PublishedFolder(Path(folder))
    start.check()
    model = build(load_class(start.model["name"], MODELS, ""), start.model)
    return start, model, start.params()


def batch_of(arrays):
    if "pixel_values" in arrays:
        return {"image": arrays["pixel_values"].transpose(0, 2, 3, 1) * 0.5 + 0.5}  # ours normalises by itself
    mask = arrays["attention_mask"]
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    batch = {"tokens": arrays["input_ids"], "segment_ids": mask, "positions": positions}
    return batch | ({"token_types": arrays["token_type_ids"]} if "token_type_ids" in arrays else {})


@pytest.mark.parametrize("name", NAMES)
def test_their_weights_compute_here_what_they_computed_there(name, golden, published):
    arrays = golden(name).arrays
    start, model, params = opened(published(name))
    batch = batch_of(arrays)
    size = start.vocab_size
    encoder = model.encoder(size) if size else model.encoder()
    real = arrays["attention_mask"] > 0 if size else np.ones(4, bool)
    x = jax.jit(lambda batch: encoder.apply({"params": params["encoder"]}, batch, deterministic=True))(batch)
    if name == "vit_classifier":
        logits = x[:, 0] @ params["head"]["kernel"] + params["head"]["bias"]
        assert logits.shape == arrays["logits"].shape == (4, 3)
        assert np.abs(logits - arrays["logits"]).max() < 1e-4
        return  # their last hidden states are those before the last norm
    expected = arrays.get("last", arrays["hidden/2"])
    assert np.abs(expected).max() > 1
    assert np.abs(np.asarray(x) - expected)[real].max() < 1e-4

    table = None if not size else params["encoder"]["embeddings"]["word"]
    logits = {}
    if "mlm_head" in params:
        head = MaskedTokenHead(model, size).apply({"params": params["mlm_head"]}, jnp.asarray(x), jnp.asarray(table))
        logits["mlm_logits" if name == "bert" else "logits"] = head[..., :size]
    if name == "gpt2":
        logits["logits"] = tied_logits(x, jnp.asarray(table), size)[..., :size]
    if name == "electra":
        logits["logits"] = DiscriminatorHead(model).apply({"params": params["discriminator_head"]}, x)
    assert bool(logits) == (name != "vit")
    for key, found in logits.items():
        assert np.abs(arrays[key]).max() > 0.5
        assert np.abs(np.asarray(found) - arrays[key])[real].max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_came_in_goes_out_as_it_was(name, golden, published, make_tokenizer, tmp_path):
    recorded, folder = golden(name), published(name)
    start, model, params = opened(folder)
    pad_id = recorded.config.get("pad_token_id", 0)
    form = published_form(model, params, vocab_size=start.vocab_size, pad_id=pad_id)
    assert form.class_name == CLASSES[name]
    out = tmp_path / "out"
    out.mkdir()
    write(form, out, make_tokenizer(recorded.config) if start.vocab_size else None)
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == set(recorded.weights)
    for key, array in recorded.weights.items():
        assert tensors[key].dtype == np.float32
        np.testing.assert_array_equal(tensors[key], array, err_msg=key)
    assert set(json.loads((out / "config.json").read_text())) == set(recorded.config)
    before, after = (AutoConfig.from_pretrained(where).to_dict() | {"_name_or_path": ""} for where in (folder, out))
    assert before == after


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_folder_without_a_head_has_the_same_encoder(name, golden, published, tmp_path):
    _, model, whole = opened(published(name))
    form = published_form(model, whole, vocab_size=120, pad_id=0, encoder_only=True)
    assert form.class_name == {"bert": "BertModel", "gpt2": "GPT2Model"}[name]
    assert not any(key.startswith(("bert.", "transformer.", "cls.")) for key in form.tensors)
    (tmp_path / "bare").mkdir()
    # Names of old files: layer norms as in TensorFlow, and buffers that are no parameters.
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): array for key, array in form.tensors.items()}
    old = {key.replace("LayerNorm.bias", "LayerNorm.beta"): array for key, array in old.items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 40, 40), np.float32)
    (tmp_path / name).rename(tmp_path / "whole")
    _, _, bare = opened(published(name, weights=old))
    jax.tree.map(np.testing.assert_array_equal, bare["encoder"], whole["encoder"])
    assert set(bare) == {"encoder"}


def test_heads_that_transformers_has_no_class_for(published):
    _, model, params = opened(published("bert"))
    parts = {"encoder": params["encoder"], "head": {"kernel": np.zeros((32, 2)), "bias": np.zeros(2)}}
    with pytest.raises(UserError) as error:  # fine-tuned on the mean over tokens, without a pooler
        published_form(model, parts, vocab_size=120, pad_id=0)
    assert "no class with the head that this run has (head)" in str(error.value)
    assert "BertForSequenceClassification pooler and head" in str(error.value)
    parts |= {"pooler": params["pooler"]}
    form = published_form(model, parts, vocab_size=120, pad_id=0)
    assert form.class_name == "BertForSequenceClassification"
    assert form.tensors["classifier.weight"].shape == (2, 32)
    parts = {"encoder": params["encoder"], "mlm_head": params["mlm_head"]}
    relu = dataclasses.replace(model, token_types=1, activation="relu")
    with pytest.raises(UserError, match=r"no RobertaForMaskedLM with config.model.activation=relu \(expected gelu\)"):
        published_form(relu, parts, vocab_size=120, pad_id=0)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_of_one_output_is_a_regression(name, published, tmp_path):
    _, model, params = opened(published(name))
    pooler = {"dense": {"kernel": np.zeros((32, 32)), "bias": np.zeros(32)}}
    parts = {"encoder": params["encoder"], "pooler": pooler, "head": {"kernel": np.zeros((32, 1)), "bias": np.zeros(1)}}
    form = published_form(model, parts, vocab_size=120, pad_id=1)
    (tmp_path / "out").mkdir()
    write(form, tmp_path / "out", None)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    rows = {"bert": "classifier.weight", "roberta": "classifier.out_proj.weight"}[name]
    assert form.tensors[rows].shape == (config.num_labels, 32) == (1, 32)
    assert config.problem_type == "regression"


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "gpt2"])
def test_what_a_head_reads_tells_classes_of_the_same_parts_apart(name, published, tmp_path):
    _, model, params = opened(published(name))
    kind = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "gpt2": "GPT2"}[name]
    draw = np.random.default_rng(0).normal(size=(32, 5))
    cases = {"tokens": (5, ("a", "b", "c", "d", "e"), "ForTokenClassification", "classifier")}
    if name != "gpt2":  # a causal model's [CLS] cannot tell that there is no answer
        cases["spans"] = (2, None, "ForQuestionAnswering", "qa_outputs")
    for reads, (outputs, labels, suffix, theirs) in cases.items():
        head = {"kernel": draw[:, :outputs], "bias": draw[0, :outputs]}
        parts = {"encoder": params["encoder"], "head": head}
        form = published_form(model, parts, vocab_size=120, pad_id=1, head_reads=reads)
        assert form.class_name == kind + suffix
        np.testing.assert_array_equal(form.tensors[f"{theirs}.weight"], np.float32(head["kernel"]).T)
        np.testing.assert_array_equal(form.tensors[f"{theirs}.bias"], np.float32(head["bias"]))
        (tmp_path / reads).mkdir()
        write(form, tmp_path / reads, None, labels)
        config = AutoConfig.from_pretrained(tmp_path / reads)
        assert config.num_labels == outputs
        if labels:
            assert config.id2label == dict(enumerate(labels))
            assert config.label2id == {label: i for i, label in enumerate(labels)}
    with pytest.raises(UserError, match=f"{kind}ForTokenClassification head of tokens"):
        published_form(model, parts, vocab_size=120, pad_id=1)


def test_an_electra_run_goes_out_as_its_discriminator(golden, published):
    _, model, params = opened(published("electra"))
    run = params | {"generator": {"transformer": {"kernel": np.zeros(3)}}}
    form = published_form(model, run, vocab_size=120, pad_id=0)
    assert form.class_name == "ElectraForPreTraining"
    assert set(form.tensors) == set(golden("electra").weights)


def test_fixed_positions_go_out_as_values_and_come_back_as_learned_ones(tmp_path):
    fixed = dict(positions="sincos", pool="mean", pixel_mean=(0.2,), pixel_std=(0.3,))
    model = VitConfig(layers=1, width=16, heads=2, mlp_width=32, image_size=8, patch_size=2, channels=3, **fixed)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)}
    compute = lambda model: jax.jit(lambda params: model.encoder().apply(params, batch, deterministic=True))  # noqa: E731
    params = unbox(jax.jit(lambda: model.encoder().init(jax.random.key(0), batch, deterministic=True))())["params"]
    form = published_form(model, {"encoder": params}, vocab_size=0, pad_id=0)
    write(form, tmp_path, None)
    preprocessor.write(model, {"crop": "step"}, tmp_path)
    _, back, found = opened(tmp_path)
    assert (back.positions, back.pixel_mean, back.pixel_std) == ("learned", 3 * (0.2,), 3 * (0.3,))
    np.testing.assert_allclose(found["encoder"]["position"][1:], sincos_table(4, 16))
    assert not found["encoder"]["position"][0].any()
    there, here = compute(back)({"params": found["encoder"]}), compute(model)({"params": params})
    np.testing.assert_allclose(there, here, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ({}, dict(positions="rope"), "positions=rope (expected learned)"),
        ({}, dict(registers=2), "registers=2 (expected 0)"),
        ({}, dict(layer_scale=1e-5), "layer_scale=1e-05 (expected 0.0)"),
        ({}, dict(pool="attention"), "pool=attention (expected class)"),
        ({}, dict(pool="mean", class_token=False), "class_token=False (expected True)"),
        ({}, dict(norm="rmsnorm"), "norm=rmsnorm (expected layernorm)"),
        ({"head": {}}, dict(pool="mean"), "pool=mean (expected class)"),
    ],
)
def test_a_vit_that_transformers_has_not_is_refused_with_what_differs(part, changes, told):
    model = VitConfig(layers=1, width=16, heads=2, mlp_width=32, image_size=8, patch_size=2, **changes)
    with pytest.raises(UserError) as error:
        published_form(model, {"encoder": {}, **part}, vocab_size=0, pad_id=0)
    name = "ViTForImageClassification" if part else "ViTModel"
    assert f"transformers has no {name} with config.model.{told}" in str(error.value).replace(", config", "; config")
    assert "such as configs/vit_mae.py:base), and --format=stablehlo exports any model" in str(error.value)


@pytest.mark.parametrize(
    "model", [ResnetConfig(), IgptConfig(image_size=8, max_length=64)], ids=lambda model: model.name
)
def test_models_of_pictures_without_a_counterpart(model):
    with pytest.raises(UserError, match=f"no counterpart of {type(model).__name__}; --format=stablehlo exports it"):
        published_form(model, {"encoder": {}}, vocab_size=0, pad_id=0)

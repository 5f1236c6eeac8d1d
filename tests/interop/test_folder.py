"""What is wrong with a folder of published weights is one line that names it, before anything is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils.epath import Path
from safetensors.numpy import save_file

from sslx.errors import UserError
from sslx.interop.folder import PublishedFolder
from sslx.train.initialise import inherited, load_encoder, open_start

WRITTEN = {"model": {"name": "bert", "dtype": "bfloat16", "remat": "full", "unroll": None, "layers": 9}}


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        inherited(WRITTEN | {"pretext": {"name": "mlm"}, "init": str(folder)})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("part", ["pretext", "task"])
def test_architecture_and_tokenizer_come_from_the_folder(published, part):
    folder = published("electra")
    for init in (str(folder), f"scratch:{folder}"):
        written, tokenizer = inherited(WRITTEN | {part: {"name": "a"}, "init": init})
        assert tokenizer == Path(folder)
        model = written["model"]
        assert (model["layers"], model["width"], model["embed_width"], model["max_length"]) == (2, 32, 16, 40)
        assert (model["dtype"], model["remat"], model["unroll"]) == ("bfloat16", "full", None)
        assert (model["norm_position"], model["positions"], model["norm_eps"]) == ("post", "learned", 1e-12)


def test_robertas_positions_are_those_that_tokens_have(golden, published):
    written, _ = inherited(WRITTEN | {"task": {}, "init": str(published("roberta"))})
    assert (written["model"]["max_length"], written["model"]["token_types"]) == (38, 1)


def test_missing_and_reshaped_tensors_are_named(golden, published):
    weights = golden("gpt2").weights
    del weights["transformer.h.1.ln_2.bias"]
    weights["transformer.h.0.attn.c_attn.weight"] = np.zeros((32, 95), np.float32)
    said = refused(published("gpt2", weights=weights))
    assert "missing: transformer.h.1.ln_2.bias; of another shape: " in said
    assert said.endswith("transformer.h.0.attn.c_attn.weight [32, 95] there, [32, 96] expected")


@pytest.mark.parametrize("bare", [False, True])
def test_tensors_that_find_no_use_are_one_note(golden, published, bare):
    weights = dict(golden("bert").weights)
    if bare:  # as the class without a head is saved
        prefix = "bert."
        weights = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    start = "" if bare else "bert."
    one = np.zeros(1, np.float32)
    # A table of numbers that can be counted is no news; layers beyond the config's, others and half a head are.
    more = [f"{start}embeddings.position_ids", f"{start}encoder.layer.9.output.dense.bias", "adapter.down"]
    folder = Path(published("bert", weights=weights | dict.fromkeys(more, one)))
    encoder = PublishedFolder(folder).params()["encoder"]
    _, notes = load_encoder({"encoder": encoder}, open_start(folder))
    assert notes == [f"config.init {folder}: tensors that find no use: {', '.join(sorted(more[1:]))}"]


def test_half_a_head_finds_no_use(golden, published):
    weights = dict(golden("bert").weights)
    del weights["cls.predictions.bias"]
    folder = PublishedFolder(Path(published("bert", weights=weights)))
    assert "mlm_head" not in folder.params()
    assert folder.unused() == sorted(name for name in weights if name.startswith("cls.predictions.transform"))


@pytest.mark.parametrize("name", ["bert", "electra", "gpt2", "roberta", "vit", "vit_classifier"])
def test_all_that_transformers_writes_is_known(published, name):
    assert PublishedFolder(Path(published(name))).unused() == []


def test_a_tokenizer_that_is_larger_than_the_embedding(published):
    said = refused(published("bert", tokens=123))
    assert "has 123 tokens and the embedding 120 rows" in said
    assert said.endswith("without a row: w120, w121, w122")


def test_a_folder_without_a_tokenizer(published):
    folder = published("bert")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    assert "has no tokenizer; expected one of tokenizer.json, vocab.txt" in refused(folder)


def test_values_that_are_not_finite_are_named(golden, published):
    weights = golden("bert").weights
    weights["bert.embeddings.LayerNorm.bias"][3] = np.nan
    folder = Path(published("bert", weights=weights))
    encoder = PublishedFolder(folder).params()["encoder"]
    with pytest.raises(UserError, match=r"values that are not finite: encoder/embeddings/norm/bias$"):
        load_encoder({"encoder": encoder}, open_start(folder))


def test_what_sslx_does_not_compute(published):
    assert "unknown model_type in " in (said := refused(published("bert", model_type="bart")))
    assert "'bart'; did you mean 'bert'? (valid: bert, electra, gpt2, roberta, vit)" in said
    for name, key, value in (
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("electra", "position_embedding_type", "relative_key"),
        ("roberta", "hidden_act", "tanh"),
    ):
        assert f"{key}={value!r} (expected " in refused(published(name, **{key: value}))


def test_files_that_are_not_there(published):
    folder = published("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "expected model.safetensors, or shards with" in (said := refused(folder))
    assert said.endswith("there is pytorch_model.bin")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "model.safetensors cannot be read" in refused(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in refused(folder)


def test_shards_are_the_one_file(golden, published):
    folder, weights = published("bert"), golden("bert").weights
    whole = PublishedFolder(Path(folder)).params()
    names = sorted(weights)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    sharded = PublishedFolder(Path(folder)).params()
    np.testing.assert_equal(sharded, whole)
    (folder / file).unlink()
    assert f"lacks shards that its index names: {file}" in refused(folder)


def test_heads_come_with_the_encoder_where_the_new_run_has_them(published):
    folder = published("bert")
    given = PublishedFolder(Path(folder)).params()
    assert set(given) == {"encoder", "mlm_head", "pooler", "sentence_head"}

    def like(tree):
        return {name: like(leaf) if isinstance(leaf, dict) else np.empty_like(leaf) for name, leaf in tree.items()}

    wanted = {part: like(given[part]) for part in ("encoder", "mlm_head", "pooler")} | {"head": {"bias": np.zeros(3)}}
    wanted["pooler"]["dense"]["bias"] = np.zeros(33, np.float32)
    taken, notes = load_encoder(wanted, open_start(folder))
    assert set(taken) == {"encoder", "mlm_head"}
    assert notes == [f"config.init {folder}: pooler is of another shape there and starts anew"]
    np.testing.assert_equal(taken["mlm_head"], given["mlm_head"])


def test_how_pixels_are_normalised_comes_from_the_preprocessor(published):
    folder = published("vit")
    file = folder / "preprocessor_config.json"

    def found() -> tuple:
        model = PublishedFolder(Path(folder)).model
        return model["pixel_mean"], model["pixel_std"]

    assert found() == ((0.5,), (0.5,))  # which is what the published ViTs have
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    file.write_text(json.dumps({"image_mean": mean, "image_std": std}))
    assert found() == (tuple(mean), tuple(std))
    file.write_text(json.dumps({"image_mean": mean, "image_std": std, "do_normalize": False}))
    assert found() == ((0.0,), (1.0,))
    file.write_text(json.dumps({"image_mean": mean, "rescale_factor": 1 / 127.5}))
    assert "rescale_factor (expected 1/255)" in refused(folder)
    file.write_text(json.dumps({"image_mean": [0.5, 0.5]}))
    assert "pixel_mean has 2 values for 3 channels" in refused(folder)
    for content in ("{", "[]", '{"image_mean": 3}'):
        file.write_text(content)
        assert "preprocessor_config.json is damaged" in refused(folder)

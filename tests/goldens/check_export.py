"""Loads exported models in PyTorch and compares what they compute with what they compute here.

    python tests/goldens/check_export.py write FOLDER     (where sslx is)
    python tests/goldens/check_export.py check FOLDER     (where torch and transformers are)

The first writes, for every class that sslx exports, a folder of a tiny random model as ``sslx.export`` does, with
inputs and what sslx computes of them in ``expected.npz``; the second loads each with ``AutoModel*`` and prints the
largest difference. The golden weights are among them, in by ``config.init`` and out again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE, VOCABULARY, TOLERANCE = Path(__file__).parent, 120, 1e-4
GOLDENS = ("bert", "roberta", "gpt2", "electra", "electra_generator", "vit", "vit_classifier")
AUTO = {
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",  # GPT-2's head is a Model too
}


def inputs() -> dict[str, np.ndarray]:
    """Rows of unequal lengths, without a padding token inside."""
    mask = (np.arange(24) < np.array([24, 17, 9, 2])[:, None]).astype(np.int64)
    tokens = np.random.default_rng(1).integers(5, VOCABULARY, mask.shape)
    return {"input_ids": tokens * mask + (1 - mask), "attention_mask": mask}  # 1 is RoBERTa's padding


def write(target: Path) -> None:
    """Writes every folder."""
    from etils import epath
    from safetensors.numpy import save_file

    from sslx.config import build, load_class
    from sslx.interop import preprocessor, writing
    from sslx.interop.folder import PublishedFolder
    from sslx.models import MODELS

    sys.path.insert(0, str(HERE.parent / "interop"))
    from conftest import Golden, word_tokenizer

    for name in GOLDENS:
        golden = Golden(name)
        with tempfile.TemporaryDirectory() as made:
            (Path(made) / "config.json").write_text(json.dumps(golden.config))
            save_file(golden.weights, Path(made) / "model.safetensors")
            if "vocab_size" in golden.config:
                word_tokenizer(golden.config).save_pretrained(made)
            start = PublishedFolder(epath.Path(made))
            model = build(load_class(start.model["name"], MODELS, "model"), start.model)
            params = start.params()
        given = {key: golden.arrays[key] for key in ("pixel_values",) if key in golden.arrays} or inputs()
        pad_id = golden.config.get("pad_token_id", 0)
        variants = {"": params} | ({"_encoder": params} if name != "vit" else {"_fixed_positions": params})
        if name in ("bert", "roberta"):
            variants |= {"_classifier": with_head(params, 3, pooler=True), "_number": with_head(params, 1, pooler=True)}
        if name in ("bert", "roberta", "electra", "gpt2"):
            variants["_tagger"] = with_head(params, 3)
        if name in ("bert", "roberta", "electra"):
            variants["_questions"] = with_head(params, 2)
        for suffix, parts in variants.items():
            bare, reads = suffix == "_encoder", {"_tagger": "tokens", "_questions": "spans"}.get(suffix, "rows")
            if suffix == "_fixed_positions":
                model = dataclasses.replace(model, positions="sincos", pool="mean")
                parts = {"encoder": {part: tree for part, tree in parts["encoder"].items() if part != "position"}}
            form = writing.published(
                model, parts, vocab_size=start.vocab_size, pad_id=pad_id, head_reads=reads, encoder_only=bare
            )
            folder = target / (name + suffix)
            folder.mkdir(parents=True)
            labels = ("a", "b", "c") if suffix in ("_classifier", "_tagger") else None
            writing.write(form, folder, word_tokenizer(golden.config) if start.vocab_size else None, labels)
            found = {"encoder": parts["encoder"]} if bare else parts
            if name.startswith("vit"):
                preprocessor.write(model, {"crop": "host"}, folder)
            out = compute(model, found, given, start.vocab_size)
            if bare:
                out.pop("logits", None)  # GPT-2's head is in its encoder
            np.savez(folder / "expected.npz", **{f"in/{key}": value for key, value in given.items()}, **out)
        print(f"wrote {name}")


def with_head(params: dict[str, Any], outputs: int, *, pooler: bool = False) -> dict[str, Any]:
    """The encoder with a head as fine-tuning makes it, and with the layer that ``pool=first`` has in front."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    first = {"pooler": {"dense": {"kernel": draw(32, 32), "bias": draw(32)}}} if pooler else {}
    return {"encoder": params["encoder"], **first, "head": {"kernel": draw(32, outputs), "bias": draw(outputs)}}


def compute(model: Any, params: dict[str, Any], given: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """What sslx computes: hidden states, and the logits of the head that is there."""
    import jax
    import jax.numpy as jnp

    from sslx.models.bert import DiscriminatorHead, MaskedTokenHead, Pooler
    from sslx.models.layers import tied_logits

    params = jax.tree.map(jnp.asarray, params)
    if not size:
        # Which the model itself normalises.
        batch = {"image": given["pixel_values"].transpose(0, 2, 3, 1) * model.pixel_std + model.pixel_mean}
        x = model.encoder().apply({"params": params["encoder"]}, batch, deterministic=True)
        if head := params.get("head"):  # whose class gives no hidden states behind the last norm
            return {"logits": x[:, 0] @ head["kernel"] + head["bias"]}
        return {"hidden": x}
    mask = given["attention_mask"].astype(np.int32)
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    batch = {"tokens": given["input_ids"].astype(np.int32), "segment_ids": mask, "positions": positions}
    x = model.encoder(size).apply({"params": params["encoder"]}, batch, deterministic=True)
    table, out = params["encoder"]["embeddings"]["word"], {"hidden": x}
    if "head" in params:
        read = Pooler(model).apply({"params": params["pooler"]}, x[:, 0]) if "pooler" in params else x
        out["logits"] = read @ params["head"]["kernel"] + params["head"]["bias"]
    elif "mlm_head" in params:
        out["logits"] = MaskedTokenHead(model, size).apply({"params": params["mlm_head"]}, x, table)[..., :size]
    elif "discriminator_head" in params:
        out["logits"] = DiscriminatorHead(model).apply({"params": params["discriminator_head"]}, x)
    elif model.name == "gpt":
        out["logits"] = tied_logits(x, table, size)[..., :size]
    return out


def check(target: Path) -> None:
    """Loads every folder and prints how far its outputs are from the expected ones."""
    import torch
    import transformers

    worst = 0.0
    for folder in sorted(path.parent for path in target.glob("*/expected.npz")):
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        auto = next(auto for suffix, auto in AUTO.items() if name.endswith(suffix))
        more = {"add_pooling_layer": False} if name in ("BertModel", "RobertaModel", "ViTModel") else {}
        model, loading = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **more)
        assert type(model).__name__ == name, (type(model).__name__, name)
        left = {key: sorted(loading[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        assert not any(left.values()), (folder.name, left)
        with np.load(folder / "expected.npz") as arrays:
            given = {key[3:]: torch.tensor(arrays[key]) for key in arrays if key.startswith("in/")}
            expected = {key: arrays[key] for key in arrays if not key.startswith("in/")}
        real = given["attention_mask"].numpy() > 0 if "attention_mask" in given else np.ones(())
        with torch.no_grad():
            out = model.eval()(**given, output_hidden_states=True)
        last = out["last_hidden_state"] if "last_hidden_state" in out else out.hidden_states[-1]
        found = {"hidden": last.numpy()}
        if "start_logits" in out:
            found["logits"] = np.stack([out["start_logits"], out["end_logits"]], axis=-1)
        elif "logits" in expected:
            found["logits"] = out["prediction_logits" if "prediction_logits" in out else "logits"].numpy()
        errors = {}
        for key, array in expected.items():
            assert found[key].shape == array.shape, (folder.name, key, found[key].shape, array.shape)
            apart = np.abs(found[key] - array)
            errors[key] = float((apart[real] if array.shape[:2] == real.shape else apart).max())
        worst = max(worst, *errors.values())
        told = "  ".join(f"{key} {error:.1e}" for key, error in errors.items())
        print(f"{folder.name:<26} {auto:<36} {name:<34} {told}")
    print(f"largest difference {worst:.1e}")
    assert 0 < worst < TOLERANCE


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))

"""Records what Hugging Face's PyTorch models compute, for ``tests/models`` and ``tests/interop``.

    python tests/goldens/record_hf.py [NAME ...]

It needs torch and transformers (written with torch 2.13, transformers 5.24); without a name it records all.

Tiny models with random weights, biases and norms, in float32 without dropout. ``NAME_tiny.npz`` holds the text of
``config.json``, the weights (``weights/<their name>``), inputs with padding, hidden states by layer, and logits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

VOCABULARY, LENGTH, ROWS = 120, 24, 4
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TEXT = SIZE | NO_DROPOUT | dict(vocab_size=VOCABULARY, max_position_embeddings=40, attn_implementation="eager")
ENDS = dict(bos_token_id=2, eos_token_id=2, pad_token_id=2)


def models() -> dict[str, Callable[[], torch.nn.Module]]:
    """What is recorded."""
    t = transformers
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=40, vocab_size=VOCABULARY)
    gpt2 |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    image = SIZE | NO_DROPOUT | dict(image_size=16, patch_size=4, attn_implementation="eager")
    grey = dict(image_size=12, num_channels=1, hidden_act="gelu_new", layer_norm_eps=1e-6)
    electra = TEXT | dict(embedding_size=16)
    return {
        "bert": lambda: t.BertForPreTraining(t.BertConfig(**TEXT)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**TEXT, type_vocab_size=1, layer_norm_eps=1e-5)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **ENDS)),
        "electra": lambda: t.ElectraForPreTraining(t.ElectraConfig(**electra)),
        "electra_generator": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**electra)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**image), add_pooling_layer=False),
        "vit_classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**image | grey, num_labels=3)),
    }


def randomise(model: torch.nn.Module) -> None:
    """Draws every parameter anew, so that none is 0 or 1 and a mistake shows."""
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else 0.15
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_((1.0 if is_scale else 0.0) + spread * torch.randn(parameter.shape))
    if model.config.model_type == "roberta":  # no token looks these rows up, and sslx does not keep them
        model.roberta.embeddings.position_embeddings.weight[: model.config.pad_token_id + 1] = 0.0
    model.tie_weights()


def inputs(config: transformers.PretrainedConfig) -> dict[str, np.ndarray]:
    """Rows of unequal lengths, or images."""
    rng, model_type = np.random.default_rng(0), config.model_type
    if model_type == "vit":
        shape = (ROWS, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": rng.normal(size=shape).astype(np.float32)}
    lengths = np.array([LENGTH, 17, 9, 2])[:, None]
    mask = (np.arange(LENGTH) < lengths).astype(np.int64)
    ids = rng.integers(5, VOCABULARY, (ROWS, LENGTH)) * mask
    if model_type == "roberta":
        ids += 1 - mask  # its padding is 1
    given = {"input_ids": ids, "attention_mask": mask}
    if model_type in ("bert", "electra"):
        given["token_type_ids"] = (np.arange(LENGTH) >= lengths // 2).astype(np.int64) * mask
    return given


def saved(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors of ``model.safetensors``, whose names are not always those of the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def outputs(out: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Hidden states by layer, and logits by the name of their loss."""
    arrays = {f"hidden/{layer}": state.numpy() for layer, state in enumerate(out.hidden_states)}
    names = {"logits": "logits", "prediction_logits": "mlm_logits", "seq_relationship_logits": "nsp_logits"}
    arrays |= {ours: out[theirs].numpy() for theirs, ours in names.items() if theirs in out}
    return arrays | ({"last": out.last_hidden_state.numpy()} if "last_hidden_state" in out else {})


def main() -> None:
    for name, make in models().items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        model = make().eval()
        model.config.architectures, model.config.dtype = [type(model).__name__], "float32"  # as saving does
        with torch.no_grad():
            randomise(model)
            given = inputs(model.config)
            out = model(**{key: torch.tensor(array) for key, array in given.items()}, output_hidden_states=True)
        weights = {f"weights/{key}": array for key, array in saved(model).items()}
        arrays = weights | given | outputs(out)
        small = {key: a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for key, a in arrays.items()}
        text = np.array(model.config.to_json_string())
        np.savez_compressed(Path(__file__).with_name(f"{name}_tiny.npz"), config=text, **small)


if __name__ == "__main__":
    main()

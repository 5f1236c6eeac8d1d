"""Records what Hugging Face's PyTorch BERT computes, for ``tests/models/test_bert.py``.

    python tests/goldens/record_bert.py        (with torch and transformers; written with torch 2.13, transformers 5.23)

A tiny ``BertForPreTraining`` with random weights, biases and norms, in float32 without dropout. ``bert_tiny.npz`` holds
its weights (``weights/<HF name>``), inputs, hidden states of every layer, and logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForPreTraining

VOCABULARY, LENGTH, ROWS = 120, 24, 4


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = BertForPreTraining(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape))
        model.tie_weights()

        rng = np.random.default_rng(0)
        lengths = [LENGTH, 17, 9, 2]
        mask = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int64)
        ids = rng.integers(5, VOCABULARY, (ROWS, LENGTH)) * mask
        types = (np.arange(LENGTH) >= np.array(lengths)[:, None] // 2).astype(np.int64) * mask
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(types),
            output_hidden_states=True,
        )
    arrays = {f"weights/{name}": value.detach().numpy() for name, value in model.named_parameters()}
    arrays |= {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    arrays |= {f"hidden/{layer}": state.numpy() for layer, state in enumerate(out.hidden_states)}
    arrays |= {"mlm_logits": out.prediction_logits.numpy(), "nsp_logits": out.seq_relationship_logits.numpy()}
    small = {name: array.astype(np.int32 if array.dtype.kind == "i" else np.float32) for name, array in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("bert_tiny.npz"), **small)


if __name__ == "__main__":
    main()

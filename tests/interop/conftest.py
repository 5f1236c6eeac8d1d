"""Folders of published weights made from the goldens, and their tokenizers; ``tests/goldens/record_hf.py``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDENS = Path(__file__).parent.parent / "goldens"


class Golden:
    """What was recorded of one model."""

    def __init__(self, name: str):
        with np.load(GOLDENS / f"{name}_tiny.npz") as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads(str(self.arrays["config"]))
        self.weights = {
            name.removeprefix("weights/"): array for name, array in self.arrays.items() if name.startswith("weights/")
        }


@pytest.fixture(scope="session")
def golden():
    """Reads a golden by its name."""
    return Golden


def word_tokenizer(config: dict, size: int = 120) -> PreTrainedTokenizerFast:
    """A tokenizer of made-up words whose special tokens have the ids that a model's config gives them."""
    special = {"unk_token": 4, "mask_token": 3}
    for role in ("pad", "bos", "eos"):
        if config.get(f"{role}_token_id") is not None:
            special[f"{role}_token"] = config[f"{role}_token_id"]
    if config["model_type"] in ("bert", "electra"):
        special |= {"cls_token": 1, "sep_token": 2}
    words = {f"[{token}]" if token in special.values() else f"w{token}": token for token in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[4]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{role: f"[{token}]" for role, token in special.items()}
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes a `word_tokenizer`."""
    return word_tokenizer


@pytest.fixture
def published(golden, tmp_path):
    """Writes a golden as transformers would: ``published("bert")``; some of it may be changed."""

    def write(name: str, *, weights: dict | None = None, tokens: int = 120, **config) -> Path:
        recorded = golden(name)
        folder = tmp_path / name
        folder.mkdir()
        written = recorded.config | config
        (folder / "config.json").write_text(json.dumps(written))
        arrays = recorded.weights if weights is None else weights
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
        if "vocab_size" in written:
            word_tokenizer(recorded.config, tokens).save_pretrained(folder)
        return folder

    return write

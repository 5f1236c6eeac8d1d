"""The tokenizer of an export: read back by transformers, it makes the rows that the model was trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sslx.data.sources import open_source
from sslx.data.tokenizer import load_tokenizer, vocabulary
from sslx.inference.loading import LoadedRun
from sslx.inference.verb import pair_of_texts, whole_document
from sslx.interop.tokenizer import complete

TEXT, PAIR = "Return the path of the file.", "a name"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte", "char"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", None])
def test_texts_become_the_rows_of_training(kind, model_type, tmp_path_factory, tmp_path):
    cache = tmp_path_factory.getbasetemp() / "tokenizers"
    cache.mkdir(exist_ok=True)
    (cache / "a.txt").write_text("\n".join(Path(os.__file__).read_text().splitlines()[:200]))
    source = open_source(f"text:{cache}/a.txt", "train", cache_dir=cache)

    def load():
        return load_tokenizer(kind, source, vocab_size=400, lowercase=True, cache_dir=cache)

    def run(longest):
        return LoadedRun("", {}, 0, None, load(), vocabulary(load()), {}, longest)

    tokens = len(run(None).tokens_of(TEXT))
    for longest in (tokens - 2, 100):
        for continued in (False, True):
            made = complete(
                load(), vocabulary(load()), longest=longest, continued=continued, token_types=model_type == "bert"
            )
            folder = tmp_path / f"{longest} {continued}"
            made.save_pretrained(folder)
            if model_type:  # beside the model, whose kind may have a tokenizer of its own
                (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            again = AutoTokenizer.from_pretrained(folder)
            found = again(TEXT, truncation=True).input_ids
            if continued:  # a prompt, as generation has it: no end
                assert found == [run(None).words.cls_id, *run(None).tokens_of(TEXT)][:longest]
            else:
                assert found == list(whole_document(run(longest), TEXT).tokens)
                assert (len(found) == longest) == (longest < 100)
                both, expected = again(TEXT, PAIR, truncation=True), pair_of_texts(run(longest), TEXT, PAIR)
                assert both.input_ids == list(expected.tokens)
                if model_type == "bert":
                    assert both.token_type_ids == list(expected.token_types)
            assert ("token_type_ids" in again(TEXT)) == (model_type == "bert")
            # Read as a start, it is the tokenizer that it was, with one separator between texts.
            assert vocabulary(again).pair_separators == 1
            assert again(TEXT, add_special_tokens=False).input_ids == run(None).tokens_of(TEXT)

"""The tokenizer: trained the same every time, read back as a real BERT one, described truly, refused clearly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sslx.data.sources import open_source
from sslx.data.tokenizer import load_tokenizer, vocabulary
from sslx.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    lines = [*Path(os.__file__).read_text().splitlines(), "Ünïcode — 中文 words", "ünïcode words"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    return open_source(f"text:{tmp_path}/a.txt", "train", cache_dir=tmp_path)


def wordpiece(corpus, tmp_path, **options):
    settings = {"vocab_size": 500, "lowercase": True, "cache_dir": tmp_path / "cache"} | options
    return load_tokenizer("wordpiece", corpus, **settings)


def test_wordpiece_is_a_bert_tokenizer_that_round_trips(corpus, tmp_path):
    tokenizer = wordpiece(corpus, tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokenizer) == 500
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("Return the path", "of it").data == tokenizer("Return the path", "of it").data
    assert vocabulary(again) == vocabulary(tokenizer)
    assert tokenizer.decode(tokenizer("return the path").input_ids) == "[CLS] return the path [SEP]"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_vocabulary_smaller_than_asked_for_is_told_once(corpus, tmp_path, capsys, kind):
    options = {"lowercase": True, "cache_dir": tmp_path / "cache"}
    load_tokenizer(kind, corpus, vocab_size=500, **options)
    assert "note" not in capsys.readouterr().out
    tokenizer = load_tokenizer(kind, corpus, vocab_size=50_000, **options)
    assert len(tokenizer) < 50_000
    note = f"note: the {kind} tokenizer has {len(tokenizer)} entries, not config.data.vocab_size=50000; {corpus.spec} "
    assert capsys.readouterr().out.count(note) == 1
    load_tokenizer(kind, corpus, vocab_size=50_000, **options)
    assert "note" not in capsys.readouterr().out


def test_lowercase_is_an_option(corpus, tmp_path):
    assert "r" in wordpiece(corpus, tmp_path).tokenize("Raise")[0]
    cased = wordpiece(corpus, tmp_path, lowercase=False)
    assert cased.tokenize("Raise")[0].startswith("R")


def test_training_is_the_same_in_every_process(corpus, tmp_path):
    code = (
        "import sys; from sslx.data.sources import open_source; from sslx.data.tokenizer import *;"
        "s = open_source(sys.argv[1], 'train', cache_dir=sys.argv[2]);"
        "t = load_tokenizer('wordpiece', s, vocab_size=500, lowercase=True, cache_dir=sys.argv[2]);"
        "print(vocabulary(t).fingerprint)"
    )
    command = [sys.executable, "-c", code, corpus.spec]
    found = subprocess.run(
        [*command, str(tmp_path / "other")], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    assert found == vocabulary(wordpiece(corpus, tmp_path)).fingerprint


def test_vocabulary_describes_wordpiece(corpus, tmp_path):
    tokenizer = wordpiece(corpus, tmp_path)
    words = vocabulary(tokenizer)
    assert (words.size, words.pad_id, words.unk_id, words.cls_id, words.sep_id, words.mask_id) == (500, 0, 1, 2, 3, 4)
    assert words.special_ids == (0, 1, 2, 3, 4)
    for token, continues in enumerate(words.continuation):
        assert continues == tokenizer.convert_ids_to_tokens(token).startswith("##")
    assert hash(words) == hash(vocabulary(tokenizer))
    tokenizer("x", truncation=True, max_length=4, padding="max_length")
    assert vocabulary(tokenizer) == words  # how it was called is not what it is


def test_vocabulary_describes_byte_level_bpe_and_bos_eos(tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    specials = ["<s>", "</s>", "<pad>", "<mask>"]
    backend.train_from_iterator(
        ["the cat sat on the mat with another cat"] * 5, trainers.BpeTrainer(special_tokens=specials)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(tmp_path / "bpe")
    tokenizer = load_tokenizer(str(tmp_path / "bpe"), None, vocab_size=0, lowercase=True, cache_dir=tmp_path)
    words = vocabulary(tokenizer)
    assert (words.cls_id, words.sep_id, words.pad_id, words.mask_id) == (0, 1, 2, 3)
    assert words.unk_id == words.pad_id
    pieces = tokenizer.get_vocab()
    assert words.continuation[pieces["Ġcat"]] == 0
    assert words.continuation[pieces["c"]] == 1
    assert words.continuation[0] == 0


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_the_other_kinds_know_every_text_of_their_corpus(corpus, tmp_path, kind):
    tokenizer = load_tokenizer(kind, corpus, vocab_size=400, lowercase=True, cache_dir=tmp_path / "cache")
    text = corpus[0]["text"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    words = vocabulary(tokenizer)
    assert words.size == {"bpe": 400, "byte": 259, "char": 4 + len(set(text))}[kind]
    assert (words.cls_id, words.sep_id, words.pad_id, words.mask_id) == (0, 0, 1, 2)
    assert len(ids) == {"bpe": len(ids), "byte": len(text.encode()), "char": len(text)}[kind]
    if kind == "bpe":
        assert len(ids) < len(text) / 1.5
    # Tokens of a special token's letters are not that token: a document may speak of it.
    again = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    assert vocabulary(again) == words


def test_unseen_characters_are_unknown_and_bytes_are_not(corpus, tmp_path):
    settings = dict(vocab_size=400, lowercase=True, cache_dir=tmp_path / "cache")
    char, byte = (load_tokenizer(kind, corpus, **settings) for kind in ("char", "byte"))
    assert char("a€", add_special_tokens=False)["input_ids"][1] == vocabulary(char).unk_id == 3
    assert byte.decode(byte("a€", add_special_tokens=False)["input_ids"]) == "a€"


def test_bpe_training_does_not_depend_on_the_process(corpus, tmp_path):
    code = (
        "import sys; from sslx.data.sources import open_source; from sslx.data.tokenizer import *\n"
        "source = open_source(sys.argv[1], 'train', cache_dir=sys.argv[2])\n"
        "tokenizer = load_tokenizer('bpe', source, vocab_size=420, lowercase=True, cache_dir=sys.argv[2])\n"
        "print(vocabulary(tokenizer).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, corpus.spec, str(tmp_path / f"cache{i}")],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[-1]
        for i in range(3)
    }  # fmt: skip
    assert len(found) == 1


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    backend = Tokenizer(models.BPE({"<end>": 0, "a": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>").save_pretrained(tmp_path)
    words = vocabulary(load_tokenizer(str(tmp_path), None, vocab_size=0, lowercase=True, cache_dir=tmp_path))
    assert (words.pad_id, words.sep_id, words.mask_id) == (0, 0, None)


def test_mistakes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def load(spec, **options):
        return load_tokenizer(spec, corpus, **{"vocab_size": 500, "lowercase": True, "cache_dir": tmp_path} | options)

    with pytest.raises(UserError, match=r"folder './nowhere' does not exist"):
        load("./nowhere")
    with pytest.raises(UserError, match="unknown tokenizer 'wordpeice'; did you mean 'wordpiece'"):
        load("wordpeice")
    with pytest.raises(UserError, match="cannot load tokenizer 'nobody/nothing'") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="vocab_size=10 is too small"):
        load("wordpiece", vocab_size=10)
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no cls/bos, sep/eos token"):
        load(str(tmp_path / "bare"))

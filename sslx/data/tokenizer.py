"""The tokenizer of a run, and the few facts about its vocabulary that masking and packing need.

In: a kind of tokenizer that is trained here on the training documents, or a folder or hub name that ``AutoTokenizer``
knows. Out: a Hugging Face fast tokenizer, and its `Vocabulary`. The kinds are

- wordpiece: as BERT's was, lower-casing, `##` continuations;
- bpe: byte-level pair encoding, as GPT-2's was;
- byte: a token a byte of UTF-8, which knows every text;
- char: a token a character that occurs in the training documents.

Training is deterministic. The library's own of WordPiece is not: it numbers characters by the order of a hash map and
breaks ties between merges by those numbers, so the characters are counted and numbered here first.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from sslx.data.cache import hash_of, prepare_once
from sslx.data.sources import Source
from sslx.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Of the other kinds: the first begins and ends documents, as GPT-2's does; the mask is for masked language modelling.
END, PAD, MASK, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>"
MIN_VOCAB_SIZE = {"wordpiece": 128, "bpe": 384}  # above the bytes and characters that any of them starts from
TRAINING_DOCUMENTS = 1_000_000  # evenly spaced over the corpus; more changes a vocabulary little
FORMAT = 1


@dataclass(frozen=True)
class Vocabulary:
    """What objectives know of a tokenizer.

    ``size`` is the true size (largest id + 1; models pad it). Where a tokenizer has no padding token, ``pad_id`` is
    ``sep_id`` and only segment ids tell padding; where it has no unknown token, ``unk_id`` is ``pad_id``; where it has
    no mask token, ``mask_id`` is None. ``continuation[id]`` is 1 where the token continues a word (`##` pieces; without
    Ġ or ▁ elsewhere). ``pair_separators`` of them stand between the texts of a pair: one as in BERT, two as in RoBERTa,
    and one where the tokenizer itself puts none.
    """

    size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    continuation: bytes
    fingerprint: str
    pair_separators: int = 1


def spelled(
    tokenizer: PreTrainedTokenizerFast, tokens: Int[np.ndarray, " length"], segment_ids: Int[np.ndarray, " length"]
) -> str:
    """The tokens of a row, without padding, each as the tokenizer has it."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokens[segment_ids > 0]))


def abstract_vocabulary(size: int) -> Vocabulary:
    """A vocabulary of a size and nothing else, for what is compiled without data."""
    return Vocabulary(size, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4), bytes(size), "abstract")


def load_tokenizer(
    spec: str, source: Source | None, *, vocab_size: int, lowercase: bool, cache_dir: str | os.PathLike[str]
) -> PreTrainedTokenizerFast:
    """Trains (once; cached by the source's content) or loads a tokenizer.

    ``source`` matters to the kinds that are trained, ``vocab_size`` to ``wordpiece`` and ``bpe``, ``lowercase`` to
    ``wordpiece`` alone. A small corpus may give fewer tokens, which is said when it is trained.

    Raises:
      UserError: not found, no fast tokenizer, a missing start or end token, or a cache that cannot be written.
    """
    from transformers import AutoTokenizer

    if spec in TRAINED:
        if source is None:
            raise UserError(f"tokenizer {spec!r} is trained on a corpus and there is none; give a folder or hub name")
        least = MIN_VOCAB_SIZE.get(spec, 0)
        if vocab_size < least:
            raise UserError(f"vocab_size={vocab_size} is too small for a {spec} tokenizer; at least {least}")
        settings = {"wordpiece": (vocab_size, lowercase), "bpe": (vocab_size,)}.get(spec, ())
        key = hash_of(spec, FORMAT, source.fingerprint, *settings)

        def train(folder: os.PathLike[str]) -> None:
            trained = TRAINED[spec](source, vocab_size=vocab_size, lowercase=lowercase)
            if spec in MIN_VOCAB_SIZE and len(trained) < vocab_size:
                print(
                    f"note: the {spec} tokenizer has {len(trained)} entries, not config.data.vocab_size={vocab_size}; "
                    f"{source.spec} gives no more",
                    flush=True,
                )
            trained.save_pretrained(str(folder))

        folder = prepare_once(cache_dir, f"{spec}-{key}", train)
        return AutoTokenizer.from_pretrained(str(folder))

    name = os.path.expanduser(spec)
    if spec.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise UserError(f"tokenizer folder {spec!r} does not exist")
    if difflib.get_close_matches(spec, TRAINED, cutoff=0.8) and not os.path.isdir(name):
        raise UserError(f"unknown tokenizer {spec!r}; {nearest(spec, TRAINED)}")  # before the hub's long retries
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub, its cache and the file formats each raise their own kinds
        reason = first_line(error)
        raise UserError(
            f"cannot load tokenizer {spec!r}: none of {', '.join(TRAINED)}, nor a folder or reachable hub name "
            f"({reason[:160]})"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {spec!r} has no fast (tokenizers library) version")
    vocabulary(tokenizer)  # refuses missing special tokens here, where the name is known
    return tokenizer


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Describes a tokenizer; where it has no cls or sep token, bos and eos stand in.

    Raises:
      UserError: it lacks a cls/bos or sep/eos token.
    """
    ids = {
        "pad": tokenizer.pad_token_id,
        "cls/bos": tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id,
        "sep/eos": tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id,
        "mask": tokenizer.mask_token_id,
    }
    missing = [name for name in ("cls/bos", "sep/eos") if ids[name] is None]
    if missing:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"{name} has no {', '.join(missing)} token; pretraining needs both a cls/bos and a sep/eos one")
    ids["pad"] = ids["sep/eos"] if ids["pad"] is None else ids["pad"]
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described.update(truncation=None, padding=None)  # how it was last called, not what it is
    pieces = tokenizer.get_vocab()
    size = max(pieces.values()) + 1
    special_ids = tuple(sorted(set(tokenizer.all_special_ids)))
    if described["model"].get("type") == "WordPiece":
        prefix = described["model"]["continuing_subword_prefix"]
        continues = {token for piece, token in pieces.items() if piece.startswith(prefix) and piece != prefix}
    else:
        starts = {token for piece, token in pieces.items() if piece.startswith(("Ġ", "Ċ", "▁"))}
        continues = set(pieces.values()) - starts if starts else set()
    continues -= set(special_ids)
    pair, (begin, end) = tokenizer("a", "a").input_ids, (ids["cls/bos"], ids["sep/eos"])
    ends = pair.count(end) - (begin == end and pair[0] == begin)  # the one at the beginning ends nothing
    return Vocabulary(
        size=size,
        pad_id=ids["pad"],
        unk_id=tokenizer.unk_token_id if tokenizer.unk_token_id is not None else ids["pad"],
        cls_id=ids["cls/bos"],
        sep_id=ids["sep/eos"],
        mask_id=ids["mask"],
        special_ids=special_ids,
        continuation=bytes(token in continues for token in range(size)),
        fingerprint=hash_of(described, ids),
        pair_separators=max(1, ends - 1),
    )


def _train_wordpiece(source: Source, *, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    counts = Counter()
    for text in _training_texts(source):
        counts.update(normalizer.normalize_str(text))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(characters[: min(1000, (vocab_size - len(SPECIAL_TOKENS)) // 4)])
    # Punctuation and ideographs are words of their own, so they need no piece inside a word.
    inside = [c for c in alphabet if len(splitter.pre_tokenize_str(normalizer.normalize_str("a" + c))) == 1]

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *("##" + c for c in inside)],  # "special" only in that their ids are fixed
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(_training_texts(source), trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    return BertTokenizer(vocab=dict(pieces), do_lower_case=lowercase)


def _train_bpe(source: Source, *, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    from tokenizers import trainers

    trained = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD, MASK],
        initial_alphabet=_byte_letters(),
        show_progress=False,
    )
    trained.train_from_iterator(_training_texts(source), trainer)
    return _wrapped(trained)


def _bytes(source: Source, *, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    tokens = [END, PAD, MASK, *_byte_letters()]
    return _wrapped(_byte_level({token: i for i, token in enumerate(tokens)}, []))


def _train_char(source: Source, *, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models

    characters = sorted(set().union(*map(set, _training_texts(source))))
    tokens = [END, PAD, MASK, UNKNOWN, *characters]
    trained = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token=UNKNOWN))
    trained.decoder = decoders.Fuse()
    return _wrapped(trained, unk_token=UNKNOWN)


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """The printable letters that stand for bytes, in an order that is always the same."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _wrapped(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def _training_texts(source: Source, chunk: int = 1000) -> Iterator[str]:
    stride = -(-len(source) // TRAINING_DOCUMENTS)
    for start in range(0, len(source), chunk * stride):
        for row in source.__getitems__(range(start, min(start + chunk * stride, len(source)), stride)):
            yield row["text"]
            if "pair" in row:
                yield row["pair"]


# What each kind is trained by, from a source.
TRAINED = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "byte": _bytes, "char": _train_char}
SIZED = ("wordpiece", "bpe")  # as large as ``vocab_size`` says

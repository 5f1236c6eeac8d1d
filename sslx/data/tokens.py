"""A corpus as one flat array of token ids on disk, written once per tokenizer and mapped afterwards.

In: a `Source` and a tokenizer. Out: a `TokenCorpus`; rows of any length are index plans over it (`packing`, `pairs`),
so a new sequence length re-tokenises nothing. Documents go through in chunks, so a corpus may be larger than memory;
the tokenizer itself works on all cores. A document is tokenised sentence by sentence, each with the white space
before it, which gives the ids of the whole and says for nothing where sentences start.

Who tokenises is the caller's choice (`Encoder`): this process, or many (`token_shards`); what is written is the same.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from sslx.data.cache import hash_of, prepare_once
from sslx.data.packing import flat_ranges
from sslx.data.sources import Source
from sslx.data.tokenizer import vocabulary
from sslx.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
CHUNK_DOCUMENTS = 512
# Before white space: after the end of a sentence (its closing quotes included) if a new one seems to follow, or at a
# line end.
_SENTENCE_GAP = re.compile(
    r"""(?<=[.!?])(?=\s+["'(\[]?[A-Z0-9])|(?<=[.!?]["')\]])(?=\s+["'(\[]?[A-Z0-9])|(?<=\S)(?=\s*\n\s*\S)"""
)


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Documents laid end to end without special tokens; arrays are mapped from disk, read-only.

    ``sentence_starts`` are places in ``tokens`` where a sentence or line starts; each document start is one. A document
    that is a pair of texts holds the first, then the second, whose length ``pair_lengths`` has.
    """

    tokens: Int[np.ndarray, " tokens"] = field(repr=False)  # uint16, or uint32 beyond 65,536 ids
    document_offsets: Int64[np.ndarray, " documents+1"] = field(repr=False)
    sentence_starts: Int64[np.ndarray, " sentences"] = field(repr=False)
    labels: Int32[np.ndarray, " documents"] | Float32[np.ndarray, " documents"] | None = field(repr=False)
    label_names: tuple[str, ...] | None
    unigram_counts: Int64[np.ndarray, " vocab"] = field(repr=False)
    skipped_documents: int  # those without a single token
    fingerprint: str
    pair_lengths: Int64[np.ndarray, " documents"] | None = field(default=None, repr=False)

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1


@dataclass(frozen=True, eq=False)
class Chunk:
    """Neighbouring documents, tokenised; the corpus is its chunks in order. A document may hold no token."""

    tokens: Int[np.ndarray, " tokens"] = field(repr=False)
    sentence_lengths: Int64[np.ndarray, " sentences"] = field(repr=False)
    sentence_counts: Int64[np.ndarray, " documents"] = field(repr=False)  # at least one a document
    pair_lengths: Int64[np.ndarray, " documents"] | None = field(repr=False)
    labels: Int32[np.ndarray, " documents"] | Float32[np.ndarray, " documents"] | None = field(repr=False)


# (source, the tokenizer as JSON, dtype of the tokens, folder for scratch files) -> its chunks in order.
Encoder = Callable[[Source, str, type, Path], Iterable[Chunk]]


def encode_here(source: Source, tokenizer: str, dtype: type, folder: Path) -> Iterator[Chunk]:
    """Tokenises a source in this process, reading ahead by one chunk; shows progress when someone watches."""
    from rich.console import Console
    from rich.progress import track

    backend = encoding_backend(tokenizer)
    ranges = chunk_ranges(0, len(source))
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(source.__getitems__, ranges[0])
        watched = track(
            ranges,
            description=f"tokenising {source.spec} {source.split}",
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        for number, _ in enumerate(watched):
            rows = ahead.result()
            if number + 1 < len(ranges):
                ahead = reader.submit(source.__getitems__, ranges[number + 1])
            yield encode_chunk(rows, backend, dtype)


def tokenize_corpus(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache_dir: str | os.PathLike[str],
    encoder: Encoder = encode_here,
) -> TokenCorpus:
    """Tokenises a source, or maps what an earlier call with the same content and tokenizer wrote.

    Raises:
      UserError: an unreadable record, no document with a token in it, or a cache that cannot be written.
    """
    words = vocabulary(tokenizer)
    key = hash_of("tokens", FORMAT, source.fingerprint, words.fingerprint)
    dtype = np.uint16 if words.size <= 1 << 16 else np.uint32
    write = functools.partial(_write, source, tokenizer, words.size, dtype, encoder)
    folder = prepare_once(cache_dir, f"tokens-{key}", write)
    meta = json.loads((folder / "meta.json").read_text())
    return TokenCorpus(
        tokens=np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"),
        document_offsets=np.load(folder / "document_offsets.npy"),
        sentence_starts=np.memmap(folder / "sentence_starts.bin", dtype=np.int64, mode="r"),
        pair_lengths=np.load(folder / "pair_lengths.npy") if meta.get("paired") else None,
        labels=np.load(folder / "labels.npy") if meta["labelled"] else None,
        label_names=source.label_names,
        unigram_counts=np.load(folder / "unigram_counts.npy"),
        skipped_documents=meta["skipped_documents"],
        fingerprint=key,
    )


def _write(
    source: Source, tokenizer: PreTrainedTokenizerFast, size: int, dtype: type, encoder: Encoder, folder: Path
) -> None:
    counts = np.zeros(size, np.int64)
    lengths, pair_lengths, labels, written = [], [], [], 0
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "sentence_starts.bin", "wb") as starts_file:
        for chunk in encoder(source, tokenizer.backend_tokenizer.to_str(), dtype, folder):
            document_of_sentence = np.repeat(np.arange(len(chunk.sentence_counts)), chunk.sentence_counts)
            document_lengths = np.bincount(document_of_sentence, chunk.sentence_lengths, len(chunk.sentence_counts))
            starts = written + np.cumsum(chunk.sentence_lengths) - chunk.sentence_lengths
            starts_file.write(starts[chunk.sentence_lengths > 0].astype(np.int64).tobytes())
            tokens_file.write(chunk.tokens.tobytes())
            counts += np.bincount(chunk.tokens, minlength=size)
            lengths.append(document_lengths.astype(np.int64))
            pair_lengths.append(chunk.pair_lengths)
            labels.append(chunk.labels)
            written += len(chunk.tokens)
    lengths = np.concatenate(lengths)
    kept = lengths > 0
    if not kept.any():
        raise UserError(
            f"split {source.split!r} of {source.spec} has no document with a token in it ({len(kept)} empty)"
        )
    labelled, paired = labels[0] is not None, pair_lengths[0] is not None
    np.save(folder / "document_offsets.npy", np.concatenate([[0], np.cumsum(lengths[kept])]))
    np.save(folder / "unigram_counts.npy", counts)
    if labelled:
        np.save(folder / "labels.npy", np.concatenate(labels)[kept])
    if paired:
        np.save(folder / "pair_lengths.npy", np.concatenate(pair_lengths)[kept])
    meta = {"labelled": labelled, "paired": paired, "skipped_documents": int((~kept).sum())}
    (folder / "meta.json").write_text(json.dumps(meta))


def encoding_backend(tokenizer: str) -> Tokenizer:
    """Returns a tokenizer of our own from its JSON, so that the caller's keeps its settings."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a document that says "[MASK]" means those characters
    return backend


def chunk_ranges(start: int, stop: int) -> list[range]:
    """Cuts documents ``start`` to ``stop`` into ranges of `CHUNK_DOCUMENTS`."""
    return [range(first, min(first + CHUNK_DOCUMENTS, stop)) for first in range(start, stop, CHUNK_DOCUMENTS)]


def encode_chunk(rows: list[dict[str, Any]], backend: Tokenizer, dtype: type) -> Chunk:
    """Tokenises the records of a source."""
    paired = "pair" in rows[0]
    sentences = [split_sentences(row["text"]) for row in rows]
    firsts = np.fromiter(map(len, sentences), np.int64, len(sentences))
    if paired:
        sentences = [first + split_sentences(row["pair"]) for first, row in zip(sentences, rows, strict=True)]
    encodings = backend.encode_batch_fast(list(itertools.chain.from_iterable(sentences)), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum()))
    counts = np.fromiter(map(len, sentences), np.int64, len(sentences))
    pair_lengths = labels = None
    if paired:
        of_pair = flat_ranges(np.zeros_like(counts), counts) >= np.repeat(firsts, counts)
        document = np.repeat(np.arange(len(rows)), counts)
        pair_lengths = np.bincount(document, lengths * of_pair, len(rows)).astype(np.int64)
    if "label" in rows[0]:
        labels = np.array([row["label"] for row in rows])
        labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)
    return Chunk(tokens, lengths, counts, pair_lengths, labels)


def split_sentences(text: str) -> list[str]:
    """Cuts a text at line ends and after sentences; joined, the pieces are the text again."""
    cuts = [0, *(match.start() for match in _SENTENCE_GAP.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]

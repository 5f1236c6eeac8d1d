"""From a text config to rows ready for training: open, tokenise, plan; each step is cached under ``cache_dir``.

In: a `TextConfig` and the layout that the objective needs. Out: `PreparedText`. A source ``rows:FOLDER`` has been
through all of it (`row_writer.write_rows`) and is only opened.

If the splits are left at ``train`` and ``validation`` and the source has no ``validation`` (files have only
``train``), a random 2 % of ``train`` are held out (``train[98%:]``; at least one document) and the rest is trained
on; of a source that is one document, its last tenth. Splits that were written out are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Int64

from sslx.data.cache import cache_folder, hash_of
from sslx.data.labels import save_labels
from sslx.data.packing import causal_plan, documents_plan, packed_plan, text_pairs_plan
from sslx.data.pairs import pair_plan
from sslx.data.rows import TextRows
from sslx.data.sources import Collection, Source, open_collection
from sslx.data.stored_rows import StoredRows, open_rows, tokenizer_folder
from sslx.data.tokenizer import SIZED, TRAINED, Vocabulary, load_tokenizer, vocabulary
from sslx.data.tokens import TokenCorpus, tokenize_corpus
from sslx.errors import UserError, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Layout = Literal["packed", "nsp", "sop", "causal", "documents"]
MIN_SEQ_LEN = 8
ROWS = "rows:"


@dataclass(frozen=True)
class TextConfig:
    """``config.data`` of text experiments."""

    source: str = "python_docs"  # or tfds:NAME[/CONFIG], text:GLOB, csv:, jsonl: or parquet:GLOB, rows:FOLDER
    train_split: str = "train"  # TFDS slices, also for files
    eval_split: str = "validation"
    test_split: str = ""  # "" = none
    text_field: str = "text"
    pair_field: str = ""  # second text of a pair, for tasks on pairs; "" = none
    label_field: str = "label"
    label_type: str = "class"  # | number
    tokenizer: str = "wordpiece"  # or bpe, char (trained on the training split), byte; or a folder or hub name
    vocab_size: int = 8192  # of a wordpiece or bpe tokenizer
    lowercase: bool = True  # by a wordpiece tokenizer
    seq_len: int = 128
    cache_dir: str = ""  # "" = $SSLX_CACHE or ~/.cache/sslx
    tfds_dir: str = ""  # "" = TFDS's own default


@dataclass(frozen=True, eq=False)
class PreparedText:
    """``statistics``: the splits used, documents, tokens, rows and fill share of train and eval, ``unigram_entropy``
    (nats, of the eval split's tokens: what a model that knows only frequencies reaches), ``unread_splits`` (names of
    those that the source has besides), ``tokenizer`` and ``vocab_size`` as configured, where a tokenizer was trained by
    them, and ``fingerprint`` (of all the data)."""

    train: TextRows | StoredRows
    eval: TextRows | StoredRows
    test: TextRows | StoredRows | None
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    label_names: tuple[str, ...] | None
    statistics: dict[str, Any]
    layout: Layout

    def save(self, folder: Path) -> None:
        """Writes ``folder/tokenizer/`` and, if there are labels, ``folder/labels.json``: what readers of a run need."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        save_labels(folder, self.label_names)


def saved_tokenizer(run: Path) -> tuple[PreTrainedTokenizerFast, Vocabulary]:
    """The tokenizer that `PreparedText.save` has written into a run's folder, and its vocabulary.

    Raises:
      UserError: there is none.
    """
    folder = Path(run) / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"{run} has no tokenizer/; expected the folder of a run on text")
    tokenizer = load_tokenizer(str(folder.absolute()), None, vocab_size=0, lowercase=False, cache_dir="")
    return tokenizer, vocabulary(tokenizer)


def prepare_text(
    config: TextConfig, *, layout: Layout, tokenizer_override: str | None = None, seed: int = 0
) -> PreparedText:
    """Prepares train, eval and, if asked for, test rows.

    Args:
      config: what to read and how to tokenise it.
      layout: ``packed``, sentence pairs (``nsp``, ``sop``), ``causal`` (packed, with the next token of each), or
        ``documents`` (one a row, or one pair of texts, with labels if there are any).
      tokenizer_override: a folder or hub name that replaces ``config.tokenizer``: fine-tuning keeps its run's
        tokenizer.
      seed: draws the sentence pairs.

    Raises:
      UserError: whatever the source, the splits, the tokenizer or the cache do not allow.
    """
    choose(layout, get_args(Layout), "text layout")
    if config.pair_field and layout != "documents":
        raise UserError(
            f"config.data.pair_field is {config.pair_field!r}; pretraining reads single texts, expected none"
        )
    cache_dir = cache_folder(config.cache_dir)
    if config.source.startswith(ROWS) and config.source != ROWS:
        return _stored(config, layout, tokenizer_override, cache_dir)
    collection, sources, tokenizer = open_text(config, tokenizer_override)
    words = vocabulary(tokenizer)
    _check_tokens(words, layout, tokenizer_override or config.tokenizer)
    rows, statistics = {}, {}
    for role, source in sources.items():
        corpus = tokenize_corpus(source, tokenizer, cache_dir=cache_dir)
        if layout == "documents":
            _check_labels(corpus, source)
        rows[role] = _rows(corpus, words, config.seq_len, layout, seed, cache_dir)
        statistics |= {
            f"{role}_split": source.split,
            f"{role}_documents": corpus.num_documents,
            f"{role}_skipped_documents": corpus.skipped_documents,
            f"{role}_tokens": len(corpus.tokens),
            f"{role}_rows": len(rows[role]),
            f"{role}_fill_share": rows[role].plan.fill_share,
        }
    if tokenizer_override is None and config.tokenizer in TRAINED:
        statistics["tokenizer"] = config.tokenizer
        if config.tokenizer in SIZED:
            statistics["vocab_size"] = config.vocab_size
    statistics["unread_splits"] = collection.unread(source.split for source in sources.values())
    statistics["tokens_per_row"] = rows["train"].plan.fill_share * config.seq_len
    counts = rows["eval"].corpus.unigram_counts.copy()
    if layout == "causal":
        counts[words.sep_id] += rows["eval"].corpus.num_documents  # the end of each is predicted too
    statistics["unigram_entropy"] = entropy(counts)
    corpora = {role: text_rows.corpus.fingerprint for role, text_rows in rows.items()}
    statistics["fingerprint"] = hash_of(corpora, layout, config.seq_len, seed if layout in ("nsp", "sop") else None)
    return PreparedText(
        rows["train"], rows["eval"], rows.get("test"), tokenizer, words, collection.label_names, statistics, layout
    )


def _stored(config: TextConfig, layout: Layout, tokenizer_override: str | None, cache_dir: Path) -> PreparedText:
    """Opens rows that were written; refuses what the config wants otherwise than they were."""
    folder, meta = open_rows(config.source.removeprefix(ROWS))
    if meta.layout != layout:
        raise UserError(
            f"{folder} holds rows of layout {meta.layout!r} and this config needs {layout!r}; prepare others"
        )
    if meta.seq_len != config.seq_len:
        raise UserError(
            f"config.data.seq_len={config.seq_len}, but the rows in {folder} were prepared with {meta.seq_len}; "
            f"set it to {meta.seq_len}, or prepare others"
        )
    for role in ("train", "eval", "test"):
        wanted, written = getattr(config, f"{role}_split"), meta.statistics.get(f"{role}_split", "none")
        if wanted not in (written, getattr(TextConfig, f"{role}_split")):
            raise UserError(
                f"config.data.{role}_split={wanted!r}, but the rows in {folder} were prepared with {written!r}; "
                "leave it out, or prepare others"
            )
    for key in ("tokenizer", "vocab_size"):
        wanted, written = getattr(config, key), meta.statistics.get(key)
        trained = config.tokenizer in TRAINED and not tokenizer_override  # else it is compared below, as a whole
        if trained and written is not None and wanted not in (written, getattr(TextConfig, key)):
            raise UserError(
                f"config.data.{key}={wanted!r}, but the rows in {folder} were prepared with {written!r}; "
                f"set it to {written!r}, or prepare others"
            )
    given = tokenizer_override or ("" if config.tokenizer in TRAINED else config.tokenizer)
    spec = given or str(tokenizer_folder(folder, meta, cache_dir))
    tokenizer = load_tokenizer(
        spec, None, vocab_size=config.vocab_size, lowercase=config.lowercase, cache_dir=cache_dir
    )
    words = vocabulary(tokenizer)
    if words.fingerprint != meta.vocabulary:
        raise UserError(
            f"the rows in {folder} were prepared with another tokenizer than {spec}; prepare others with it"
        )
    rows = {role: StoredRows(folder, meta, role) for role in meta.rows}
    return PreparedText(
        rows["train"], rows["eval"], rows.get("test"), tokenizer, words, meta.label_names, meta.statistics, layout
    )


def open_text(
    config: TextConfig, tokenizer_override: str | None = None
) -> tuple[Collection, dict[str, Source], PreTrainedTokenizerFast]:
    """Opens what a config names, as far as is known before anything is tokenised.

    Returns:
      The collection, its slices by role (``train``, ``eval`` and perhaps ``test``), and the tokenizer (trained if need
      be).

    Raises:
      UserError: as `prepare_text`.
    """
    if config.seq_len < MIN_SEQ_LEN:
        raise UserError(f"config.data.seq_len={config.seq_len} is too short; expected at least {MIN_SEQ_LEN}")
    collection = text_collection(config)
    return collection, *sources_and_tokenizer(config, collection, tokenizer_override)


def sources_and_tokenizer(
    config: Any, collection: Collection, tokenizer_override: str | None
) -> tuple[dict[str, Source], PreTrainedTokenizerFast]:
    """Each role's slice of a collection, and the tokenizer, trained on the training slice if need be.

    Raises:
      UserError: splits that cannot be or overlap, or a tokenizer that cannot be loaded.
    """
    splits = role_splits(config, collection)
    collection.check_disjoint(splits)
    sources = {role: collection.slice(split) for role, split in splits.items()}
    tokenizer = load_tokenizer(
        tokenizer_override or config.tokenizer,
        sources["train"],
        vocab_size=config.vocab_size,
        lowercase=config.lowercase,
        cache_dir=cache_folder(config.cache_dir),
    )
    return sources, tokenizer


def text_collection(config: TextConfig) -> Collection:
    """Opens everything that ``config.source`` names; of a single document, its last tenth as ``validation``.

    Raises:
      UserError: as `open_collection`.
    """
    collection = open_collection(
        config.source,
        text_field=config.text_field,
        pair_field=config.pair_field,
        label_field=config.label_field,
        label_type=choose(config.label_type, ("class", "number"), "config.data.label_type"),
        cache_dir=cache_folder(config.cache_dir),
        tfds_dir=config.tfds_dir or None,
    )
    single = _to_hold_out(config, collection) and len(collection.splits["train"]) == 1
    return collection.divided() if single and collection.label_names is None else collection


def _to_hold_out(config: Any, collection: Collection) -> bool:
    """Whether some of ``train`` is to be held out, since nothing else is there and nobody said otherwise."""
    untouched = config.train_split == TextConfig.train_split and config.eval_split == TextConfig.eval_split
    return untouched and "validation" not in collection.splits and "train" in collection.splits


def role_splits(config: Any, collection: Collection) -> dict[str, str]:
    """The split expression of each role: as ``config`` says, or a held-out share of the one split that there is.

    Raises:
      UserError: there is nothing to hold out.
    """
    splits = {"train": config.train_split, "eval": config.eval_split}
    if _to_hold_out(config, collection):
        documents = len(collection.splits["train"])
        if collection.parts("train") < 2:
            one = collection.together or "record"
            raise UserError(f"{config.source} has one {one}, and training needs another one to evaluate on")
        # Below 50 documents, 2 % rounds to none.
        parts = ("train[:-1]", "train[-1:]") if documents < 50 else ("train[:98%]", "train[98%:]")
        splits = dict(zip(splits, parts, strict=True))
    return splits | ({"test": config.test_split} if config.test_split else {})


def _check_tokens(words: Vocabulary, layout: Layout, tokenizer: str) -> None:
    if words.mask_id is None and layout in ("packed", "nsp", "sop"):
        raise UserError(f"tokenizer {tokenizer} has no mask token; masked language modelling needs one")


def _check_labels(corpus: TokenCorpus, source: Source) -> None:
    """Refuses the -1 that stands for a class that is kept secret, as in the test sets of benchmarks."""
    if source.label_names and corpus.labels is not None and (corpus.labels < 0).any():
        hidden = int((corpus.labels < 0).sum())
        raise UserError(
            f"split {source.split!r} of {source.spec} has {hidden:,} records without a label (-1); "
            "evaluate on a split that has labels, such as validation"
        )


def _rows(corpus: TokenCorpus, words: Vocabulary, seq_len: int, layout: Layout, seed: int, cache_dir: Path) -> TextRows:
    if layout == "documents" and corpus.pair_lengths is not None:
        plan = text_pairs_plan(corpus.document_offsets, corpus.pair_lengths, seq_len, words.pair_separators)
        return TextRows(corpus, plan, words, corpus.labels)
    if layout == "documents":
        return TextRows(corpus, documents_plan(corpus.document_offsets, seq_len), words, corpus.labels)
    if layout == "causal":
        return TextRows(corpus, causal_plan(corpus.document_offsets, seq_len), words)
    if layout == "packed":
        return TextRows(corpus, packed_plan(corpus.document_offsets, seq_len), words)
    return TextRows(corpus, pair_plan(corpus, seq_len, layout, seed=seed, cache_dir=cache_dir), words)


def entropy(counts: Int64[np.ndarray, " kinds"]) -> float:
    """The entropy, in nats, of drawing one of the kinds that occur so often."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())

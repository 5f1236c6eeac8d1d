"""BERT's masked language modelling from documents on disk to the update, beside Hugging Face's `run_mlm` recipe.

Both sides: the model of `bert_step.py` in batches of 32 rows of 128 tokens, the docstrings of ``python_docs`` as two
JSON-lines files, labels on 15 % of the tokens, masks drawn anew each time, AdamW at 5e-5 without decay, clip 1.0,
float32, and one WordPiece tokenizer, which sslx trains on the documents; a vocabulary of 30,522 is asked for, and its
real size printed. sslx is its real loop on its own preparation: documents in pieces of at most 126 tokens, packed into
rows, in which each piece sees itself alone; the vocabulary head and the last layer's queries and MLP are computed where
a token was picked. The peer is what the recipe does, in its two forms:

- torch_grouped: documents one after the other, a thousand at a time, in chunks of 128 that see all of themselves;
- torch_lines, its ``--line_by_line --pad_to_max_length``: a document a row, of which 128 tokens are kept, padded.

It is written here with transformers' tokenizer, collator and model and PyTorch's loader (in the training process, as
the recipe's default is; ``--workers`` changes that), fused AdamW and loop: `Trainer` and `datasets` would need the
packages accelerate and datasets. Rows are lists in memory, which are cheaper to read than the tables of the latter.

    pip install -e ".[peers]" && python tests/benchmarks/bert_documents.py

The sides take turns: wall time of ``--steps`` steps of the running loop a turn, waiting for input included, spread over
``--turns`` turns. Counted are useful tokens: those of documents, so neither padding nor [CLS] and [SEP], of which each
side has its own number; ``useful_share`` is their share of the places in a batch. ``preparation`` is the seconds from
files to rows (reading, tokenising, packing or grouping; both splits, nothing cached), before the first step, ``input``
the share of the loop's time that waits for a batch. Use an otherwise idle machine. ``--torch-python`` names another
interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bert_step import MASKED, SIZES, peer_model, sslx_model
from peers import WARMUP, compare, time_torch

RATE, CHUNK = 5e-5, 1000  # documents that `datasets` maps at a time
SPLITS = ("train", "validation")


def write_documents(arguments: argparse.Namespace) -> dict[str, float]:
    """Writes ``documents/train.jsonl`` and ``validation.jsonl``, and ``tokenizer/``, trained on the former."""
    from sslx.data.cache import cache_folder
    from sslx.data.sources import open_source
    from sslx.data.text import TextConfig, open_text

    folder, counts = arguments.folder / "documents", {}
    folder.mkdir()
    for split in SPLITS:
        source = open_source("python_docs", split, cache_dir=cache_folder())
        lines = [json.dumps({"text": row["text"]}) + "\n" for row in source.__getitems__(range(len(source)))]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf8")
        counts[f"{split}_documents"] = len(lines)
    config = TextConfig(
        f"jsonl:{folder}/*.jsonl", vocab_size=arguments.size.vocabulary, cache_dir=str(arguments.folder / "cache")
    )
    _, _, tokenizer = open_text(config)
    tokenizer.save_pretrained(arguments.folder / "tokenizer")
    return counts | {"vocabulary": len(tokenizer)}


def load_tokenizer(folder: Path) -> Any:
    """What `write_documents` has written, as a ``BertTokenizerFast``; imports what is not to count as preparation."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder / "tokenizer"))


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """Preparation and loop of masked language modelling."""
    from sslx.config import experiment
    from sslx.data.text import TextConfig
    from sslx.pretext.mlm import MaskedLanguageModel, MaskedLanguageModelConfig
    from sslx.runtime import configure
    from sslx.session import run_config
    from sslx.timing.clock import TimedSteps, time_steps
    from sslx.train.loop import Trainer
    from sslx.train.sharding import on_mesh
    from sslx.train.steps import IN_FLIGHT

    configure()
    words = load_tokenizer(arguments.folder)
    length = arguments.size.length
    with tempfile.TemporaryDirectory() as cache:
        source, tokenizer = (str(arguments.folder / name) for name in ("documents", "tokenizer"))
        config = experiment(
            data=TextConfig(f"jsonl:{source}/*.jsonl", tokenizer=tokenizer, seq_len=length, cache_dir=cache),
            model=sslx_model(arguments),
            pretext=MaskedLanguageModelConfig(mask_ratio=MASKED),
        )
        config.batch_size, config.steps = arguments.size.rows, 10_000
        config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.warmup_steps = RATE, 0.0, 0
        written = config.to_dict()
        begin = time.perf_counter()
        objective, data = MaskedLanguageModel.prepare(written)
        preparation = time.perf_counter() - begin
        trainer, warmup = Trainer(run_config(written, "pretext"), objective, data), IN_FLIGHT + 1
        with on_mesh(trainer.program.mesh):
            laps = time_steps(TimedSteps(trainer, trainer.program.fresh()), 0, arguments.steps, warmup)
        # The rows of a step are a function of its number, and are masked inside it.
        batches = [trainer.batches.at(step) for step in range(warmup, warmup + arguments.steps)]
    tokens, segments = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "segment_ids"))
    useful = int(((segments > 0) & ~np.isin(tokens, (words.cls_token_id, words.sep_token_id))).sum())
    return {
        "seconds": statistics.mean(lap.total for lap in laps),
        "units": useful / arguments.steps,
        "useful_share": useful / tokens.size,
        "input": sum(lap.input for lap in laps) / sum(lap.total for lap in laps),
        "preparation": preparation,
    }


def recipe_rows(file: Path, tokenizer: Any, length: int, line_by_line: bool) -> list[dict[str, list[int]]]:
    """What `run_mlm` makes of a file."""
    with file.open(encoding="utf8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    rows = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        if line_by_line:
            cut = {"truncation": True, "padding": "max_length", "max_length": length}
            columns = dict(tokenizer(chunk, return_special_tokens_mask=True, **cut))
        else:
            columns = {}
            for name, documents in tokenizer(chunk, return_special_tokens_mask=True).items():
                joined = list(itertools.chain.from_iterable(documents))
                whole = len(joined) - len(joined) % length  # the rest of a thousand documents is dropped
                columns[name] = [joined[at : at + length] for at in range(0, whole, length)]
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def measure_torch(line_by_line: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """The recipe in one of its forms."""
    import torch
    from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

    size = arguments.size
    tokenizer = load_tokenizer(arguments.folder)
    masked = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=MASKED)
    begin = time.perf_counter()
    files = (arguments.folder / "documents" / f"{split}.jsonl" for split in SPLITS)
    rows, _ = (recipe_rows(file, tokenizer, size.length, line_by_line) for file in files)
    preparation = time.perf_counter() - begin

    def collate(some: list[dict[str, list[int]]]) -> dict[str, Any]:
        useful = sum(row["special_tokens_mask"].count(0) for row in some)  # padding is special, too
        return {**masked(some), "useful": useful}

    useful, waits = [], []

    def stream() -> Iterator[dict[str, Any]]:
        drawn = torch.Generator(arguments.torch_device)
        loader = torch.utils.data.DataLoader(
            rows, size.rows, shuffle=True, collate_fn=collate, num_workers=arguments.workers, generator=drawn
        )
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def loss(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> torch.Tensor:
        begin = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - begin)
        useful.append(batch.pop("useful"))
        return model(**batch).loss

    found = time_torch(
        lambda: BertForMaskedLM(peer_model(size, len(tokenizer))),
        stream,
        loss,
        arguments,
        average=statistics.mean,
        lr=RATE,
        weight_decay=0.0,
    )
    units = statistics.mean(useful[WARMUP:])
    return found | {
        "units": units,
        "useful_share": units / (size.rows * size.length),
        "input": statistics.mean(waits[WARMUP:]) / found["seconds"],
        "preparation": preparation,
    }


if __name__ == "__main__":
    compare(
        __doc__,
        __file__,
        sslx=measure_sslx,
        torch_grouped=functools.partial(measure_torch, False),
        torch_lines=functools.partial(measure_torch, True),
        one_arena=False,
        shared=write_documents,
        sizes=SIZES,
        unit="useful tokens",
        workers=0,
    )

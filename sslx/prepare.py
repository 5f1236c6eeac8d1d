"""Prepares a config's data ahead of training: ``python -m sslx.prepare --config=configs/bert_mlm.py --out=FOLDER``.

Training with ``--config.data.cache_dir=FOLDER`` then finds everything made: the tokenizer, the tokens and the plans of
rows, the same bytes that it would have written itself. Without ``--out`` they go where training looks anyway.

  --out=FOLDER            the cache to fill; default: config.data.cache_dir
  --processes=N           processes of this machine that tokenise; default: one a core
  --shards=N              pieces of each split that are tokenised apart; default: one per 8,192 documents
  --beam=RUNNER           tokenises with Apache Beam (pip install 'sslx[beam]'): DirectRunner, DataflowRunner,
                          FlinkRunner, SparkRunner or PortableRunner
  --beam_option=KEY=VALUE an option of the Beam pipeline; may be repeated
  --rows=FOLDER           also writes the rows themselves, for training from storage far away (rows:FOLDER)

Beam's workers need sslx, and the source and --out at the same place as here: a file system that all of them mount.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from sslx import entry
from sslx.config import build
from sslx.data.cache import cache_folder
from sslx.data.row_writer import check_room, write_rows
from sslx.data.text import ROWS, TextConfig, open_text
from sslx.data.token_shards import Workers, encode_in_shards
from sslx.data.tokens import tokenize_corpus
from sslx.errors import UserError
from sslx.runtime import display
from sslx.session import run_config
from sslx.storage import local_copy
from sslx.train.initialise import inherited, objective_class, part_of


def prepare(written: dict[str, Any], out: str = "", *, workers: Workers, rows: str = "") -> Any:
    """Fills the cache ``out`` with what training on the config needs.

    Args:
      written: The whole config as plain dicts, of a pretext or a downstream task.
      out: Becomes ``config.data.cache_dir``; "" leaves that as it is.
      workers: Who tokenises.
      rows: Where the rows are to be written too; "" writes none.

    Returns:
      The data, as the objective's ``prepare`` gives it to training.

    Raises:
      UserError: anything the user can mend.
    """
    run_config(written, part_of(written))
    if out:  # absolute: workers may start elsewhere
        written = written | {"data": written["data"] | {"cache_dir": str(cache_folder(out).absolute())}}
    written, folder = inherited(written, entry.given_keys())
    tokenizer = str(local_copy(folder)) if folder else None
    config = build(TextConfig, written["data"], "config.data")
    if config.source.startswith(ROWS):
        raise UserError(
            f"config.data.source is {config.source!r}, rows that have been prepared; give what they are from"
        )
    if rows:
        check_room(rows)
    _, sources, loaded = open_text(config, tokenizer)
    encoder = functools.partial(encode_in_shards, config=config, workers=workers)
    for source in sources.values():
        tokenize_corpus(source, loaded, cache_dir=cache_folder(config.cache_dir), encoder=encoder)
    _, data = objective_class(written).prepare(written, tokenizer)
    if rows:
        write_rows(data, rows)
    return data


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Prepares and says what there is now and how to train on it."""
    given = flags.FLAGS
    processes = len(os.sched_getaffinity(0)) if given.processes is None else given.processes
    workers = Workers(processes, given.beam, tuple(given.beam_option), given.shards)
    data = prepare(config.to_dict(), given.out, workers=workers, rows=given.rows)
    for role in ("train", "eval", "test"):
        if f"{role}_rows" in data.statistics:
            documents, skipped, tokens, rows = (
                data.statistics[f"{role}_{what}"] for what in ("documents", "skipped_documents", "tokens", "rows")
            )
            empty = f" ({skipped:,} without a token left out)" if skipped else ""
            print(f"{role:<6} {documents:,} documents{empty}, {tokens:,} tokens, {rows:,} rows")
    if given.out:
        print(f"train on it with --config.data.cache_dir={given.out}")
    elif not given.rows:
        print(f"the cache that training looks in has it: {display(cache_folder(config.data.cache_dir))}")
    if given.rows:
        print(f"train on it from anywhere with --config.data.source=rows:{given.rows}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "Cache to fill; default: config.data.cache_dir")
    flags.DEFINE_integer("processes", None, "Processes that tokenise; default: one a core")
    flags.DEFINE_integer("shards", None, "Pieces of each split that are tokenised apart")
    flags.DEFINE_string("beam", "", "Apache Beam runner that tokenises instead")
    flags.DEFINE_multi_string("beam_option", [], "KEY=VALUE option of the Beam pipeline; may be repeated")
    flags.DEFINE_string("rows", "", "Also writes the rows here")
    entry.run(main, needs_workdir=False)

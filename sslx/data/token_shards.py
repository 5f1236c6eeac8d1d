"""Tokenising a source in shards: by several processes of this machine, or by an Apache Beam pipeline on many.

In: a text config, one of its sources, and who works. Out: the chunks of the corpus in order, which `tokens` assembles;
the corpus is byte for byte the one that a single process writes, whatever the number and size of the shards.

A shard is a range of neighbouring documents. The shards are a TFDS dataset of ArrayRecord files with a record per
chunk, made by TFDS's ``ShardBasedBuilder``. It is the builder that keeps the order of documents (the others shuffle by
hash), it writes a shard with the same function locally and inside Beam, so that both give the same bytes, and neither
needs TensorFlow. The shards live in a scratch folder beside the corpus until it is assembled.

A worker opens the source and the tokenizer by path: source and scratch folder are at the same place on all machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import multiprocessing
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter

from sslx.data.sources import Source
from sslx.data.text import TextConfig, text_collection
from sslx.data.tokens import Chunk, chunk_ranges, encode_chunk, encoding_backend
from sslx.errors import Unavailable, UserError, choose, nearest

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

SHARD_DOCUMENTS = 8192
MOST_SHARDS = 1000  # by default; each is two steps of a Beam pipeline, whose description has a limited size
SPLIT = "documents"
# Beam's own "DirectRunner" first looks for a runner in Go that it downloads; this is the one inside Python.
RUNNERS = {"DirectRunner": "FnApiRunner"} | {
    name: name for name in ("DataflowRunner", "FlinkRunner", "SparkRunner", "PortableRunner")
}
# What tells a runner where its cluster is; without it some try to start one here.
WHERE = {
    "FlinkRunner": "flink_master=HOST:PORT",
    "SparkRunner": "spark_master_url=spark://HOST:PORT",
    "PortableRunner": "job_endpoint=HOST:PORT",
    "DataflowRunner": "project, region and temp_location",
}

Example = tuple[int, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Workers:
    """Who tokenises: ``processes`` of this machine, or the Beam ``runner`` with ``options`` (``KEY=VALUE``)."""

    processes: int = 1
    runner: str = ""
    options: tuple[str, ...] = ()
    shards: int | None = None  # of each split, at most one a document; None: as many as `SHARD_DOCUMENTS` gives

    def __post_init__(self):
        for name, value in (("processes", self.processes), ("shards", self.shards)):
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; expected at least 1")
        if self.runner:
            choose(self.runner, RUNNERS, "Beam runner")
            _beam_options(RUNNERS[self.runner], self.options)
        elif self.options:
            raise UserError(f"--beam_option={self.options[0]} needs --beam=RUNNER; {nearest('', RUNNERS)}")


def encode_in_shards(
    source: Source, tokenizer: str, dtype: type, folder: Path, *, config: TextConfig, workers: Workers
) -> Iterator[Chunk]:
    """Tokenises a source of ``config`` by way of shards in ``folder``; an `Encoder` once config and workers are bound.

    Raises:
      UserError: an unreadable record, a worker that does not see this source, a pool of processes that broke, or a
        Beam runner that did not begin.
      Unavailable: a Beam runner that had begun failed.
    """
    scratch = Path(folder) / "shards"
    builder = write_shards(source, tokenizer, dtype, scratch, config=config, workers=workers)
    records = builder.as_data_source(SPLIT)
    for number in range(len(records)):
        record = records[number]
        yield Chunk(**{field.name: record.get(field.name) for field in dataclasses.fields(Chunk)})
    shutil.rmtree(scratch)


def write_shards(
    source: Source, tokenizer: str, dtype: type, folder: Path, *, config: TextConfig, workers: Workers
) -> tfds.core.DatasetBuilder:
    """Writes the shards as a TFDS dataset under ``folder`` and returns its builder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(tokenizer, encoding="utf8")
    count = min(workers.shards or min(-(-len(source) // SHARD_DOCUMENTS), MOST_SHARDS), len(source))
    bounds = [len(source) * number // count for number in range(count + 1)]
    shards = [
        Shard(config, source.split, source.fingerprint, str(path.absolute()), np.dtype(dtype).name, start, stop)
        for start, stop in itertools.pairwise(bounds)
    ]
    by = f"by Beam's {workers.runner}" if workers.runner else f"in {min(workers.processes, count)} process(es)"
    print(f"tokenising {len(source):,} documents of {source.split}: {count:,} shard(s) {by}", flush=True)
    options: dict[str, Any] = {}
    if workers.runner:
        runner = RUNNERS[workers.runner]
        options = {"beam_runner": runner, "beam_options": _beam_options(runner, workers.options)}
    with _ahead(shards, 1 if workers.runner else workers.processes) as examples:
        sample = encode_chunk([source[0]], encoding_backend(tokenizer), np.dtype(dtype))
        builder = TokenShards(examples, sample, data_dir=str(folder), file_format="array_record")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS says what has been said above
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
        except BrokenProcessPool as error:
            raise UserError("a tokenising process was killed (out of memory?); give fewer --processes") from error
        except Exception as error:
            if mistake := _mistake(error):
                raise UserError(mistake) from error
            if workers.runner not in WHERE:
                raise
            if not _has_run(error):
                raise UserError(_failed(workers, error)) from error
            traceback.print_exception(error)  # its cause may be anything: a worker's disk, the network, this program
            raise Unavailable(_failed(workers, error)) from error
    return builder


@dataclass(frozen=True)
class Shard:
    """Documents ``start`` to ``stop`` of one split; called on a worker, it yields their records."""

    config: TextConfig
    split: str
    fingerprint: str
    tokenizer: str  # path of its JSON: a thousand shards would carry a thousand copies
    dtype: str
    start: int
    stop: int

    def __call__(self) -> Iterator[Example]:
        source, backend = _source(self.config, self.split), _backend(self.tokenizer)
        if source.fingerprint != self.fingerprint:
            raise UserError(
                f"a worker found other content in {source.spec} than the machine that started it; expected the same "
                "files at the same place everywhere"
            )
        for rows in chunk_ranges(self.start, self.stop):
            chunk = encode_chunk(source.__getitems__(rows), backend, np.dtype(self.dtype))
            yield rows.start, _columns(chunk)


def _columns(chunk: Chunk) -> dict[str, np.ndarray]:
    columns = {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)}
    return {name: column for name, column in columns.items() if column is not None}


class TokenShards(tfds.core.dataset_builder.ShardBasedBuilder, skip_registration=True):
    """The dataset of the shards; ``examples`` has one function per shard, and ``sample`` the columns they give."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for a README, tags and checksums beside this file

    def __init__(self, examples: Sequence[Callable[[], Iterable[Example]]], sample: Chunk, **options: Any):
        self._examples, self._kinds = examples, {name: column.dtype for name, column in _columns(sample).items()}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Tensor(shape=(None,), dtype=kind.type, encoding="bytes")
            for name, kind in self._kinds.items()
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable]]:
        return {SPLIT: self._examples}

    def _example_writer(self) -> ExampleWriter:
        return _WholeFiles(self.info.file_format)


class _WholeFiles(ExampleWriter):
    """Shards come into being whole: runners try again, and some run one piece of work twice at the same time."""

    def write(self, path: os.PathLike[str], examples: Iterable[tuple[Any, bytes]]) -> Any:
        with tfds.core.utils.incomplete_file(path) as unfinished:
            try:
                return super().write(unfinished, examples)
            except RuntimeError as error:  # how ArrayRecord's C++ reports a full disk
                raise OSError(str(error)) from error


@functools.lru_cache(maxsize=4)
def _source(config: TextConfig, split: str) -> Source:
    return text_collection(config).slice(split)


@functools.lru_cache(maxsize=2)
def _backend(path: str) -> Any:
    return encoding_backend(Path(path).read_text(encoding="utf8"))


@contextlib.contextmanager
def _ahead(shards: Sequence[Shard], processes: int) -> Iterator[Sequence[Callable[[], Iterable[Example]]]]:
    """Gives one function per shard; with several processes they work ahead of the one that writes."""
    processes = min(processes, len(shards))
    if processes == 1:
        yield shards
        return
    # Spawned: a fork of a process that has threads (JAX's, the tokenizer's) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_one_thread) as pool:
        submitted = {}

        def examples(number: int) -> Iterable[Example]:
            for near in range(number, min(number + processes + 1, len(shards))):  # more would only wait in memory
                if near not in submitted:
                    submitted[near] = pool.submit(_all_of, shards[near])
            return submitted.pop(number).result()

        try:
            yield [functools.partial(examples, number) for number in range(len(shards))]
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every process has a core


def _all_of(shard: Shard) -> list[Example]:
    return list(shard())


def _beam_options(runner: str, given: Sequence[str]) -> PipelineOptions:
    """Reads ``KEY=VALUE`` options as Beam's command line would, and lets the runner say what it lacks.

    Raises:
      UserError: Beam is not installed, an unknown or malformed option, or one that the runner requires is missing.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"--beam needs Apache Beam ({error}); install it with: pip install 'sslx[beam]'") from error
    for option in given:
        if not re.fullmatch(r"[a-z]\w*(=.*)?", option, re.DOTALL):
            raise UserError(f"bad --beam_option {option!r}; expected KEY=VALUE, for example region=europe-west1")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse's page of usage
            options = PipelineOptions([f"--{option}" for option in given])
            known = options.get_all_options()
            unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
    except SystemExit:
        raise UserError(f"bad --beam_option: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    if unknown:
        name = min(unknown)
        raise UserError(f"unknown --beam_option {name!r}; {nearest(name, known)}")
    try:
        beam.Pipeline(runner=runner, options=options)
    except (ImportError, ValueError) as error:
        raise UserError(f"Beam's {runner}: {error}") from error
    return options


def _has_run(error: BaseException) -> bool:
    """Whether a pipeline that failed had begun: Beam then says in which step, or hands on a worker's traceback."""
    return any(sign in str(error) for sign in ("while running", "Traceback "))


def _failed(workers: Workers, error: BaseException) -> str:
    """Why a runner failed, as one line; where nothing has run yet, its cluster is mostly not where it looks for it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1] if any(line.startswith("Traceback ") for line in lines) else lines[0]
    given = ", ".join(workers.options) or "none"
    return (
        f"Beam's {workers.runner} failed (--beam_option: {given}; its cluster is given by {WHERE[workers.runner]}): "
        f"{reason[:500]}"
    )


def _mistake(error: BaseException) -> str:
    """The line of a `UserError` that Beam or TFDS has wrapped; "" if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        # Beam adds where it was; what ran on another machine comes back as the text of a traceback.
        if isinstance(seen, UserError):
            return str(seen).partition(" [while running")[0]
        if found := re.search(r"sslx\.errors\.UserError: (.+?)(?: \[while running|\n|$)", str(seen)):
            return found[1]
        seen = seen.__cause__ or seen.__context__
    return ""

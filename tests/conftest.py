"""What all tests share: eight simulated CPU devices, caches of their own, and a tiny experiment on real text.

The environment is set here, before jax makes its first device. Nothing is read from or written to ``~/.cache``.

- Compiled programs are kept in ``$SSLX_TEST_COMPILE_CACHE`` (default ``.jax_cache/`` in the repository, which git
  ignores); all xdist workers and all test runs share it.
- Prepared data goes to a folder of this test run, which its xdist workers share too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

from entries import Entries, collect_rarely, simulated

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("SSLX_TEST_COMPILE_CACHE", str(REPOSITORY / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # most of the tests' programs compile in less than 0.5
os.environ["NO_GCE_CHECK"] = "true"  # no test is to ask the machine's cloud who may read its buckets
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit this from the process that starts them
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated(8)['XLA_FLAGS']}".strip()
    os.environ["SSLX_CACHE"] = tempfile.mkdtemp(prefix="sslx-tests-")

import ml_collections  # noqa: E402
import pytest  # noqa: E402

from sslx.entry import load_config  # noqa: E402
from sslx.runtime import configure  # noqa: E402

# The files that take longest. xdist gives a worker a whole file, since its tests share what they train.
BEGUN_FIRST = (
    "train/test_hosts.py",
    "pretext/test_joint.py",
    "tasks/test_image_runs.py",
    "test_study.py",
    "test_storage.py",
    "train/test_resume.py",
    "test_replay.py",
    "pretext/test_cifar_recipes.py",
    "inference/test_tasks.py",
    "launch/test_colab.py",
    "test_export.py",
    "train/test_initialise.py",
    "test_glue.py",
    "pretext/test_online.py",
    "pretext/test_electra.py",
    "inference/test_model.py",
    "test_evaluate.py",
    "train/test_nonfinite.py",
    "pretext/test_span_context.py",
    "test_real_corpora.py",
)


def pytest_configure(config):
    configure()
    config.option.loadscopereorder = False  # xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    """Begins with the longest files: at the end, no worker is to have much left when the other has nothing."""
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish(session):
    collect_rarely()


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["SSLX_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A .jsonl of some hundred docstrings of the standard library; label: the module."""
    import argparse
    import decimal
    import email.message
    import statistics
    import tarfile

    path = tmp_path_factory.mktemp("corpus") / "docstrings.jsonl"
    records = []
    for module in (argparse, decimal, email.message, statistics, tarfile):
        owners = [module, *(value for _, value in sorted(vars(module).items()) if inspect.isclass(value))]
        for owner in owners:
            for _, value in sorted(vars(owner).items()):
                text = inspect.getdoc(value) if callable(value) else None
                if text and len(text) > 30:
                    records.append({"text": text, "label": module.__name__})
    records.sort(key=lambda record: record["text"][::-1])  # not by label, since the last 2 % are held out
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


@pytest.fixture(scope="session")
def made_up_texts():
    """Sixty texts of sixty words each, of a vocabulary that the smallest tokenizers hold."""
    words, draw = [f"word{i}" for i in range(60)], random.Random(0)
    return [" ".join(draw.choices(words, k=60)) + "." for _ in range(60)]


@pytest.fixture(scope="session")
def tiny_changes(corpus_file):
    """What makes a published experiment a small run."""
    return {
        "data.source": f"jsonl:{corpus_file}",
        "data.train_split": "train[:90%]",
        "data.eval_split": "train[90%:]",
        "data.test_split": "",
        "data.seq_len": 32,
        "data.vocab_size": 512,
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 4,
        "model.mlp_width": 64,
        "model.max_length": 64,
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 2,
        "eval.every_steps": 1000,
        "eval.examples": 0,
        "diagnostics.rows": 0,
        "checkpoint.every_steps": 1000,
        "log.every_steps": 1,
    }


@pytest.fixture(scope="session")
def tiny_config(tiny_changes):
    """Makes the config of a small run: ``tiny_config("bert_mlm", {"steps": 4, "model.layers": 1})``."""

    def make(name: str = "bert_mlm", changes: dict | None = None, argument: str = "") -> ml_collections.ConfigDict:
        config = load_config(REPOSITORY / "configs" / f"{name}.py", argument)
        with config.unlocked():
            config.update_from_flattened_dict(tiny_changes | (changes or {}))
        return config

    return make


@pytest.fixture(scope="session")
def trained(tiny_config, tmp_path_factory):
    """Folder of a small run, trained once: ``trained("bert_mlm")``, ``"gpt_clm"`` or a config of ``finetune/``.

    A task's run starts from random parameters.
    """
    from sslx.session import train

    @functools.cache
    def make(name: str) -> Path:
        task = name.startswith("finetune/")
        run = tmp_path_factory.mktemp("trained") / name.rpartition("/")[2]
        changes = {"eval.batches": 1, "init": "scratch" if task else ""}
        written = tiny_config(name, changes).to_dict()
        train(written, run, part="task" if task else "pretext", tokenizer=None, title="test")
        return run

    return make


@pytest.fixture(scope="session")
def picture_classifier(tmp_path_factory):
    """Folder of a classifier of handwritten digits, three steps from random parameters, with a moving average."""
    from tiny_images import tiny_images

    from sslx.session import train

    run = tmp_path_factory.mktemp("trained") / "digits"
    settings = dict(steps=3, init="scratch", model__pool="class", task__ema=0.5, eval__batches=1)
    settings |= dict(model__pixel_mean=(0.3,), model__pixel_std=(0.4,))
    config = tiny_images("finetune/image_classification", **settings)
    train(config.to_dict(), run, part="task", tokenizer=None, title="test")
    return run


@pytest.fixture(scope="session")
def write_tiny_config(tiny_changes):
    """Writes a config file of a small run, whose values the command line may change as those of a user's file."""

    def write(file: Path, name: str = "bert_mlm", changes: dict | None = None) -> None:
        file.write_text(
            "from sslx.entry import load_config\n\n\n"
            "def get_config():\n"
            f"    config = load_config({str(REPOSITORY / 'configs' / f'{name}.py')!r})\n"
            "    with config.unlocked():\n"
            f"        config.update_from_flattened_dict({tiny_changes | (changes or {})!r})\n"
            "    return config\n"
        )

    return write


@pytest.fixture(scope="session")
def entries(tmp_path_factory):
    """Runs command line entries as real processes: ``entries.run("main", "--config=a.py", folder=folder)``."""
    with contextlib.closing(Entries(tmp_path_factory.mktemp("entries"))) as entries:
        yield entries


@pytest.fixture(scope="session")
def vocabulary():
    """A made-up vocabulary of 120 tokens; 40 to 79 continue a word."""
    from sslx.data.tokenizer import Vocabulary

    continuation = bytes(40 <= token < 80 for token in range(120))
    return Vocabulary(120, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4), continuation, "made up")


@pytest.fixture(scope="session")
def packed_rows():
    """Makes rows of random tokens: one to three documents each, ``[CLS] ... [SEP]``, then padding; unequal lengths."""
    import numpy as np

    def make(rows: int, length: int, *, paired: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
        for row in range(rows):
            start, pieces = 0, 1 if paired else int(rng.integers(1, 4))
            for segment in range(1, pieces + 1):
                size = int(rng.integers(5, max(6, length // pieces)))
                stop = start + size
                batch["tokens"][row, start:stop] = [2, *rng.integers(5, 120, size - 2), 3]
                batch["segment_ids"][row, start:stop] = segment
                batch["positions"][row, start:stop] = np.arange(size)
                start = stop
        if paired:
            batch["token_types"] = (batch["positions"] > 3).astype(np.int32) * batch["segment_ids"]
            batch["sentence_label"] = rng.integers(0, 2, rows).astype(np.int32)
        return batch | {"row": 100 + np.arange(rows, dtype=np.int32)}

    return make


@pytest.fixture
def bucket(monkeypatch):
    """``gs://bucket`` of an emulator."""
    import object_store

    with object_store.serving("bucket") as address:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, address)
        yield "gs://bucket"

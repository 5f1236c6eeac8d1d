"""The real-corpus recipe on small stand-ins with the features of the real ones: Wikipedia, C4, a folder of Parquet."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from entries import REPOSITORY
from tfds_folders import write_tfds

from sslx.entry import load_config
from sslx.session import train

TEXT = tfds.features.Text()


def corpus(kind, root, texts):
    """Writes a corpus; returns its source."""
    if kind == "wikipedia":
        articles = [{"title": f"Title {i}", "text": text} for i, text in enumerate(texts)]
        write_tfds(root, "wikipedia/20230601.en", {"title": TEXT, "text": TEXT}, {"train": articles})
        return "tfds:wikipedia/20230601.en"
    if kind == "c4":
        names = ("text", "url", "content-type", "content-length", "timestamp")
        pages = [dict.fromkeys(names, "x") | {"text": text} for text in texts]
        write_tfds(root, "c4/en", dict.fromkeys(names, TEXT), {"train": pages[:-4], "validation": pages[-4:]}, "3.1.0")
        return "tfds:c4/en"
    for part in range(2):
        rows = [{"id": str(i), "url": "x", "title": "y", "text": text} for i, text in enumerate(texts[part::2])]
        (root / "wiki").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "wiki" / f"train-{part:05d}.parquet", row_group_size=7)
    return f"text:{root}/wiki"


@pytest.mark.parametrize("kind", ["wikipedia", "c4", "parquet"])
def test_a_published_size_pretrains_on_the_corpus(kind, tmp_path, made_up_texts, tiny_changes):
    source = corpus(kind, tmp_path, made_up_texts)
    config = load_config(REPOSITORY / "configs/bert_mlm.py", f"base,data={source}")
    own = {key: value for key, value in tiny_changes.items() if key != "data.source" and "split" not in key}
    with config.unlocked():
        config.update_from_flattened_dict(own | {"data.tfds_dir": str(tmp_path), "data.vocab_size": 200, "steps": 3})
    session = train(config.to_dict(), tmp_path / "run", part="pretext", tokenizer=None, title="test")
    statistics = session.data.statistics
    held_out = {"c4": ("validation", 4)}.get(kind, ("train[98%:]", 1))
    assert (statistics["eval_split"], statistics["eval_documents"]) == held_out
    assert statistics["train_documents"] + statistics["eval_documents"] == len(made_up_texts)
    first = session.data.train.fetch(np.zeros(1, np.int64))["tokens"][0]
    words = session.data.tokenizer.decode(first, skip_special_tokens=True).split()
    assert {word.rstrip(".") for word in words} <= {f"word{i}" for i in range(60)} | {""}
    losses = [
        json.loads(line)["train/loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)

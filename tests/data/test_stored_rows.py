"""Rows written to a folder and read back: the same rows, few reads, and one line for what cannot be."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading

import jax
import numpy as np
import pytest

from sslx.data import row_writer
from sslx.data.batches import EvalBatches, TrainBatches
from sslx.data.block_cache import read_range
from sslx.data.row_writer import write_rows
from sslx.data.sources import open_collection
from sslx.data.stored_rows import BLOCK_ROWS, StoredRows, open_rows, positions_of
from sslx.data.text import TextConfig, prepare_text
from sslx.errors import Unavailable, UserError

LAYOUTS = ("packed", "nsp", "sop", "causal", "documents")
SPLITS = {"train_split": "train[:70%]", "eval_split": "train[70%:90%]", "test_split": "train[90%:]"}


@pytest.fixture(scope="module")
def settings(corpus_file, tmp_path_factory):
    """Of a corpus that makes about a thousand rows, of three labels."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return {"source": f"jsonl:{corpus_file}", "cache_dir": cache, "vocab_size": 400, "seq_len": 16, **SPLITS}


@pytest.fixture(scope="module")
def prepare(settings):
    """Prepares rows of a layout from the documents, with changed settings."""
    return lambda layout="packed", **changes: prepare_text(TextConfig(**settings | changes), layout=layout)


@pytest.fixture(scope="module")
def packed(prepare, tmp_path_factory):
    """Prepared rows, and the folder they were written to."""
    prepared, folder = prepare(), tmp_path_factory.mktemp("rows") / "packed"
    write_rows(prepared, folder)
    return prepared, folder


class CountingStore:
    """Real files; reads are listed, and the most that were under way at once is kept."""

    def __init__(self):
        self.reads, self.deepest, self._under_way = [], 0, 0
        self._lock = threading.Lock()

    def read(self, path, offset, length):
        with self._lock:
            self.reads.append((path, offset))
            self._under_way += 1
            self.deepest = max(self.deepest, self._under_way)
        try:
            return read_range(path, offset, length)
        finally:
            with self._lock:
                self._under_way -= 1


def assert_same_rows(written, read):
    assert len(written) == len(read) > 0
    assert written.seq_len == read.seq_len
    rng = np.random.default_rng(0)
    for ids in (np.arange(len(written)), rng.integers(0, len(written), 300), np.empty(0, np.int64)):
        expected, found = written.fetch(ids), read.fetch(ids)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype == np.int32
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [1 << 28, 3 * 256 * 16 * 3])
def test_what_is_read_equals_what_was_written(prepare, tmp_path, monkeypatch, layout, shard_bytes):
    monkeypatch.setattr(row_writer, "SHARD_BYTES", shard_bytes)
    written = prepare(layout)
    write_rows(written, tmp_path / "rows")
    read = prepare(layout, source=f"rows:{tmp_path}/rows")
    for role in ("train", "eval", "test"):
        assert_same_rows(getattr(written, role), getattr(read, role))
    shards = len(list((tmp_path / "rows").glob("train-*.rows")))
    blocks = -(-len(written.train) // BLOCK_ROWS)
    assert shards == (1 if shard_bytes == 1 << 28 else -(-blocks // open_rows(tmp_path / "rows")[1].blocks_per_shard))
    assert read.label_names == written.label_names
    assert read.vocabulary == written.vocabulary
    assert read.tokenizer("some words")["input_ids"] == written.tokenizer("some words")["input_ids"]
    assert read.statistics | {"fingerprint": ""} == written.statistics | {"fingerprint": ""}
    # Another order: a run that was started on the one may not go on with the other.
    assert read.statistics["fingerprint"] != written.statistics["fingerprint"]


def test_many_segments_in_a_long_row_keep_their_numbers(tmp_path):
    corpus = tmp_path / "short.txt"
    corpus.mkdir()
    (corpus / "words.jsonl").write_text('{"text": "a"}\n' * 4000)
    config = TextConfig(f"text:{corpus}/*.jsonl", vocab_size=128, seq_len=1024, cache_dir=str(tmp_path / "cache"))
    written = prepare_text(config, layout="packed")
    write_rows(written, tmp_path / "rows")
    read = StoredRows(*open_rows(tmp_path / "rows"), "train")
    assert read.fetch(np.arange(3))["segment_ids"].max() == 341
    assert_same_rows(written.train, read)


def test_positions_count_within_segments():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8, [0] * 8])
    assert positions_of(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [*range(8)], [0] * 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_take_less_than_half_of_their_int32_arrays(prepare, tmp_path, layout):
    written = prepare(layout)
    write_rows(written, tmp_path / "rows")
    arrays = written.train.fetch(np.arange(BLOCK_ROWS))
    assert open_rows(tmp_path / "rows")[1].block_bytes < sum(array.nbytes for array in arrays.values()) / 2


def test_row_ids_beyond_the_rows_are_refused(packed):
    rows = StoredRows(*open_rows(packed[1]), "eval")
    for ids in ([len(rows)], [-1, 0]):
        with pytest.raises(IndexError, match=f"of {len(rows)} rows"):
            rows.fetch(np.array(ids))


def test_an_epoch_reads_each_block_once_and_ahead(packed):
    written, folder = packed
    store = CountingStore()
    rows = StoredRows(*open_rows(folder), "train", read=store.read)
    blocks = -(-len(rows) // BLOCK_ROWS)
    assert blocks > 2
    order = rows.order(0)
    seen = []
    for start in range(0, len(rows), 16):
        ids = order.rows_at(np.arange(start, min(start + 16, len(rows))))
        np.testing.assert_array_equal(rows.fetch(ids)["tokens"], written.train.fetch(ids)["tokens"])
        seen += ids.tolist()
    assert sorted(seen) == list(range(len(rows)))
    assert len(store.reads) == len(set(store.reads)) == blocks
    assert rows.cache.hits == rows.cache.requests  # the order had asked for all of them
    assert rows.cache.bytes_read == blocks * open_rows(folder)[1].block_bytes


@pytest.fixture(scope="module")
def small_blocks(packed, tmp_path_factory):
    """The rows in blocks of 4, with windows of 10 blocks."""
    folder = tmp_path_factory.mktemp("rows") / "small"
    write_rows(packed[0], folder, block_rows=4, window_blocks=10)
    return folder


@pytest.fixture
def many_blocks(packed, small_blocks):
    """Rows as written, as read from many small blocks, the store they come from, and how many blocks there are."""
    store = CountingStore()
    rows = StoredRows(*open_rows(small_blocks), "train", read=store.read)
    blocks = -(-len(rows) // 4)
    assert blocks > 100  # the cache holds 20
    return packed[0].train, rows, store, blocks


def test_reads_do_not_grow_with_rows_when_blocks_are_many_times_the_cache(many_blocks):
    written, rows, store, blocks = many_blocks
    order = rows.order(1)
    for start in range(0, 2 * len(rows) - 23, 23):
        ids = order.rows_at(np.arange(start, start + 23))
        np.testing.assert_array_equal(rows.fetch(ids)["tokens"], written.fetch(ids)["tokens"])
        assert rows.cache.held <= 20 * 4 * 16 * 3  # two windows
    assert 2 * blocks <= len(store.reads) <= 2 * blocks + 20  # the window ahead, and what a batch takes of epoch three
    assert rows.cache.hits == rows.cache.requests


def test_rows_in_a_full_shuffle_would_read_a_block_for_most_rows(many_blocks):
    """The contrast that the order is for."""
    written, rows, store, _ = many_blocks
    order = written.order(1)
    for start in range(0, len(rows), 23):
        rows.fetch(order.rows_at(np.arange(start, start + 23)))
    assert len(store.reads) > 0.8 * len(rows)


def test_evaluation_reads_each_block_once_and_ahead(many_blocks):
    written, rows, store, blocks = many_blocks
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = EvalBatches(rows, 50, sharding)
    found = np.concatenate([np.asarray(batch["tokens"]) for batch in batches])
    np.testing.assert_array_equal(found[: len(rows)], written.fetch(np.arange(len(rows)))["tokens"])
    # The last batch is filled up with the first row.
    assert blocks <= len(store.reads) <= blocks + 1
    assert rows.cache.hits >= rows.cache.requests - 1


def test_training_batches_come_from_the_rows_own_order(packed):
    written, folder = packed
    rows = StoredRows(*open_rows(folder), "train")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = TrainBatches(rows, rows.order(5), 16, sharding).at(3)
    ids = rows.order(5).rows_at(np.arange(48, 64))
    np.testing.assert_array_equal(batch["row"], ids)
    np.testing.assert_array_equal(batch["tokens"], written.train.fetch(ids)["tokens"])
    assert written.train.order(5).rows_at(np.arange(48, 64)).tolist() != ids.tolist()


def test_rows_can_be_written_again_from_where_they_are(packed, prepare, tmp_path):
    folder = packed[1]
    write_rows(prepare(source=f"rows:{folder}"), tmp_path / "copy")
    for file in folder.glob("*.rows"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_without_its_meta_is_incomplete_and_writing_again_replaces_it(packed, prepare, tmp_path):
    class Broken:
        def __getattr__(self, name):
            return getattr(packed[0].tokenizer, name)

        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    folder = tmp_path / "rows"
    with pytest.raises(UserError, match=f"cannot write prepared rows to {folder}: No space left on device"):
        write_rows(dataclasses.replace(packed[0], tokenizer=Broken()), folder)
    with pytest.raises(UserError, match=rf"{folder} is incomplete \(no meta.json\)"):
        prepare(source=f"rows:{folder}")
    (folder / "train-00099.rows").write_bytes(b"of a longer corpus")
    write_rows(packed[0], folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in packed[1].iterdir())
    assert_same_rows(packed[0].train, prepare(source=f"rows:{folder}").train)


def test_nothing_that_is_there_is_overwritten(packed, tmp_path):
    before = (packed[1] / "meta.json").read_bytes()
    with pytest.raises(UserError, match="already holds prepared rows; give another folder"):
        write_rows(packed[0], packed[1])
    assert (packed[1] / "meta.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"already holds 'thesis.tex'.*; give another folder"):
        write_rows(packed[0], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 32}, r"seq_len=32, but the rows in .*/packed were prepared with 16; set it to 16"),
        ({"layout": "sop"}, r"holds rows of layout 'packed' and this config needs 'sop'"),
        ({"train_split": "train[:5%]"}, r"train_split='train\[:5%\]'.* prepared with 'train\[:70%\]'"),
        ({"vocab_size": 500}, r"vocab_size=500, but the rows in .*/packed were prepared with 400; set it to 400"),
        ({"tokenizer": "bpe"}, r"tokenizer='bpe', but the rows in .*/packed were prepared with 'wordpiece'"),
        ({"tokenizer": "wordpeace"}, r"unknown tokenizer 'wordpeace'"),
    ],
)
def test_a_config_that_wants_other_rows_is_refused(packed, prepare, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(**{"source": f"rows:{packed[1]}", **changes})


def test_values_left_at_their_defaults_are_those_that_were_written(packed, settings):
    left = {name: value for name, value in settings.items() if name not in (*SPLITS, "vocab_size")}
    read = prepare_text(TextConfig(**left | {"source": f"rows:{packed[1]}"}), layout="packed")
    assert (read.statistics["train_split"], len(read.test)) == ("train[:70%]", len(packed[0].test))


def test_a_runs_tokenizer_has_to_be_that_of_the_rows(packed, prepare, settings, tmp_path):
    config = TextConfig(**settings | {"source": f"rows:{packed[1]}"})
    packed[0].save(tmp_path)
    own = prepare_text(config, layout="packed", tokenizer_override=str(tmp_path / "tokenizer"))
    assert own.vocabulary == packed[0].vocabulary
    (tmp_path / "other").mkdir()
    prepare(vocab_size=200).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"were prepared with another tokenizer than .*other/tokenizer"):
        prepare_text(config, layout="packed", tokenizer_override=str(tmp_path / "other" / "tokenizer"))


def test_a_missing_folder_names_the_nearest(packed, prepare, tmp_path):
    with pytest.raises(UserError, match=r"/pakced does not exist; did you mean 'packed'\?"):
        prepare(source=f"rows:{packed[1].parent}/pakced")
    with pytest.raises(UserError, match=r"holds no prepared rows \(no meta.json\); make some with"):
        prepare(source=f"rows:{packed[1].parent.parent}")
    with pytest.raises(UserError, match="unknown data source 'rows:'"):
        prepare(source="rows:")
    with pytest.raises(UserError, match="holds prepared rows and no documents"):
        open_collection(f"rows:{packed[1]}", cache_dir=tmp_path)


@pytest.mark.parametrize("change", ["cut", "format", "not rows"])
def test_a_meta_that_cannot_be_used_is_one_line(packed, prepare, tmp_path, change):
    text = (packed[1] / "meta.json").read_text()
    changed = {
        "cut": text[: len(text) // 2],
        "format": json.dumps(json.loads(text) | {"format": 7}),
        "not rows": '{"labelled": true}',
    }[change]
    (tmp_path / "meta.json").write_text(changed)
    message = "prepared rows of format 7, expected 2" if change == "format" else "meta.json is damaged or not of"
    with pytest.raises(UserError, match=message):
        prepare(source=f"rows:{tmp_path}")


def test_cut_missing_and_changed_files_are_named(packed, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("sslx.data.block_cache.FIRST_PAUSE", 0.0)
    write_rows(packed[0], tmp_path / "rows")
    file = tmp_path / "rows" / "train-00000.rows"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{file} has {len(content) - 1:,} bytes, expected {len(content):,}"):
        prepare(source=f"rows:{tmp_path}/rows")
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} is missing, expected {len(content):,}"):
        prepare(source=f"rows:{tmp_path}/rows")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit, in the padding of the last block
    rows = prepare(source=f"rows:{tmp_path}/rows").train
    assert rows.fetch(np.array([0]))["tokens"].shape == (1, 16)
    with pytest.raises(Unavailable, match=rf"cannot read {file} at byte [\d,]+ .*not those that were written"):
        rows.fetch(np.array([len(rows) - 1]))


def test_gs_without_its_library_names_the_extra(prepare, monkeypatch):
    import fsspec  # noqa: F401

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    with pytest.raises(UserError, match=r"needs gcsfs, which is not installed: pip install 'sslx\[gcs\]'"):
        prepare(source="rows:gs://bucket/packed")


def test_rows_on_gs_are_the_same_rows(packed, prepare, settings, bucket, tmp_path):
    folder = f"{bucket}/text/packed"
    with pytest.raises(UserError, match=r"^gs://bucket/text/packed does not exist"):
        prepare(source=f"rows:{folder}")
    write_rows(packed[0], folder)
    read = prepare(source=f"rows:{folder}", cache_dir=str(tmp_path))
    for role in ("train", "eval", "test"):
        assert_same_rows(getattr(packed[0], role), getattr(read, role))
    assert read.statistics == prepare(source=f"rows:{packed[1]}").statistics  # a run may move to a copy
    with pytest.raises(UserError, match="already holds prepared rows"):
        write_rows(packed[0], folder)
    with pytest.raises(UserError, match=r"packd does not exist; did you mean 'packed'\?"):
        prepare(source=f"rows:{bucket}/text/packd")
    ids = read.train.order(0).rows_at(np.arange(32))
    np.testing.assert_array_equal(read.train.fetch(ids)["tokens"], packed[0].train.fetch(ids)["tokens"])

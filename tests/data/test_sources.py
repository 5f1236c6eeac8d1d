"""Sources on real files and a real TFDS dataset: slices agree, fingerprints follow content, errors name things."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from tfds_folders import write_tfds

from sslx.data.files import splits_of_files
from sslx.data.sources import open_collection, open_source
from sslx.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Opens a source whose files are under ``tmp_path``, written {} in the spec."""

    def opened(spec, split="train", **options):
        return open_source(spec.format(tmp_path), split, cache_dir=tmp_path / "cache", **options)

    return opened


def texts(source):
    return [row["text"] for row in source.__getitems__(range(len(source)))]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
    made = {
        split: [{"text": f"{split} {i} é", "label": i % 2} for i in range(count)]
        for split, count in {"train": 20, "test": 5}.items()
    }
    write_tfds(root, "small_news", features, made)
    return root


def test_tfds_slices_labels_and_sums(read, tfds_dir):
    source = read("tfds:small_news", "train[:25%]+test", tfds_dir=tfds_dir)
    assert texts(source) == [f"train {i} é" for i in range(5)] + [f"test {i} é" for i in range(5)]
    assert source.label_names == ("no", "yes")
    assert source[6] == {"text": "test 1 é", "label": 1}


def test_tfds_mistakes(read, tfds_dir):
    with pytest.raises(
        UserError, match=r"'small_new' is not prepared.*did you mean 'small_news'.*tfds build small_new"
    ):
        read("tfds:small_new", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match=r"no split 'validation'.*valid: test, train"):
        read("tfds:small_news", "validation", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match=r"no field 'txt'; did you mean 'text'.*; --config.data.text_field=NAME reads"):
        read("tfds:small_news", text_field="txt", tfds_dir=tfds_dir)


def test_text_reads_txt_jsonl_and_parquet_recursively(read, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("one\ntwo", encoding="utf-8-sig")
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": "three"}, {"text": "four \ud800"}])
    pq.write_table(
        pa.table({"text": ["five", "six", "seven"]}), tmp_path / "in" / "deep" / "c.parquet", row_group_size=2
    )
    (tmp_path / "in" / "README.md").write_text("not this")
    expected = ["one\ntwo", "three", "four \ufffd", "five", "six", "seven"]
    assert texts(read("text:{}/in")) == expected
    assert texts(read("text:{}/in/**/*")) == expected
    source = read("text:{}/in")
    assert [row["text"] for row in source.__getitems__([5, 0, 3])] == ["seven", "one\ntwo", "five"]


def test_home_folder_is_expanded(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert texts(read("text:~/a.txt")) == ["home"]


def test_slices_are_complementary_random_samples(read, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(200)])
    train, held_out = read("text:{}/a.jsonl", "train[:90%]"), read("text:{}/a.jsonl", "train[90%:]")
    assert (len(train), len(held_out)) == (180, 20)
    assert sorted(map(int, texts(train) + texts(held_out))) == list(range(200))
    assert min(map(int, texts(held_out))) < 100  # not the file's last twenty
    assert texts(read("text:{}/a.jsonl", "train[90%:]")) == texts(held_out)


def test_csv_and_jsonl_labels_agree_over_slices_and_files(read, tmp_path):
    (tmp_path / "a.csv").write_text('label,text,other\nspam,"one, two",1\nham,"line\nbreak",2\n')
    (tmp_path / "b.csv").write_text("text,label\nlast,zebra\n")
    source = read("csv:{}/*.csv")
    assert source.label_names == ("ham", "spam", "zebra")
    assert source.__getitems__([0, 1, 2]) == [
        {"text": "one, two", "label": 1},
        {"text": "line\nbreak", "label": 0},
        {"text": "last", "label": 2},
    ]
    assert read("csv:{}/*.csv", "train[:1]").label_names == source.label_names
    write_jsonl(tmp_path / "n.jsonl", [{"text": "x", "label": n} for n in (10, 2, 1)])
    numbers = read("jsonl:{}/n.jsonl")
    assert numbers.label_names == ("1", "2", "10")
    assert numbers[0]["label"] == 2
    write_jsonl(tmp_path / "u.jsonl", [{"text": "x"}])
    assert read("jsonl:{}/u.jsonl").label_names is None
    assert read("jsonl:{}/u.jsonl")[0] == {"text": "x"}


def test_every_word_for_a_split_is_known():
    for word, split in {"val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}.items():
        assert splits_of_files(["/a/training_0.jsonl", f"/a/{word}.jsonl"]) == ["train", split]
    assert splits_of_files(["/a/train.jsonl", "/a/value.jsonl"]) == ["train", "train"]  # no such word


@pytest.mark.parametrize("scheme", ["csv", "jsonl", "text"])
def test_files_named_as_splits_are_the_splits(tmp_path, scheme):
    counts = {"train-0": 60, "dev": 3, "test": 5, "Train-1": 40}
    for name, count in counts.items():
        records = [{"text": f"{name} {i}", "label": "b" if name == "dev" else "ac"[i % 2]} for i in range(count)]
        if scheme == "csv":
            lines = [f"{record['text']},{record['label']}\n" for record in records]
            (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines))
        else:
            write_jsonl(tmp_path / f"{name}.jsonl", records)
    collection = open_collection(f"{scheme}:{tmp_path}", cache_dir=tmp_path)
    sizes = {name: len(records) for name, records in collection.splits.items()}
    assert sizes == {"train": 100, "validation": 3, "test": 5}
    assert sorted(texts(collection.slice("validation"))) == [f"dev {i}" for i in range(3)]
    assert texts(collection.slice("test")) == [f"test {i}" for i in range(5)]
    part, rest = collection.slice("train[:90%]"), collection.slice("train[90%:]")
    wanted = [f"train-0 {i}" for i in range(60)] + [f"Train-1 {i}" for i in range(40)]
    assert (len(part), sorted(texts(part) + texts(rest))) == (90, sorted(wanted))
    if scheme != "text":
        assert collection.label_names == ("a", "b", "c")  # over all splits
        assert collection.slice("validation")[0]["label"] == 1
    # Another file with another name: none of them says its split any more.
    (tmp_path / "dev.csv" if scheme == "csv" else tmp_path / "dev.jsonl").rename(
        tmp_path / ("more.csv" if scheme == "csv" else "more.jsonl")
    )
    assert list(open_collection(f"{scheme}:{tmp_path}", cache_dir=tmp_path).splits) == ["train"]


def test_one_document_to_train_on_is_divided_and_the_test_files_stay_whole(tmp_path):
    (tmp_path / "train.txt").write_text("0123456789" * 2)
    (tmp_path / "test.txt").write_text("asked")
    collection = open_collection(f"text:{tmp_path}", cache_dir=tmp_path).divided()
    found = {name: texts(collection.slice(name)) for name in ("train", "validation", "test")}
    assert found == {"train": ["012345678901234567"], "validation": ["89"], "test": ["asked"]}


def test_a_split_without_records_is_refused(read, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no records for split 'test'"):
        read("jsonl:{}")


def test_fingerprint_follows_content_and_slice(read, tmp_path):
    (tmp_path / "one").mkdir()
    write_jsonl(tmp_path / "one" / "a.jsonl", [{"text": str(i)} for i in range(10)])
    first = read("text:{}/one").fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "a.jsonl", (1, 1))
    assert read("text:{}/two").fingerprint == first
    assert read("text:{}/two", "train[:50%]").fingerprint != first
    write_jsonl(tmp_path / "two" / "a.jsonl", [{"text": str(i)} for i in range(1, 11)])
    assert read("text:{}/two").fingerprint != first


def test_fingerprint_follows_whether_labels_are_read_and_what_kind_of_file_it_is(read, tmp_path):
    records = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    write_jsonl(tmp_path / "a.jsonl", records)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.txt")
    without, with_labels = read("text:{}/a.jsonl"), read("jsonl:{}/a.jsonl")
    assert (without[0], with_labels[0]) == ({"text": "one"}, {"text": "one", "label": 0})
    found = [without, with_labels, read("text:{}/b.txt"), read("jsonl:{}/a.jsonl", label_field="text")]
    assert len({source.fingerprint for source in found}) == 4
    # A label field that is not there is not read: the records are those without, and so are their tokens.
    write_jsonl(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two"}])
    assert read("jsonl:{}/c.jsonl").fingerprint == read("text:{}/c.jsonl").fingerprint


def test_overlapping_splits_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)])
    collection = open_collection(f"text:{tmp_path}/a.jsonl", cache_dir=tmp_path)
    collection.check_disjoint({"train": "train[:98%]", "eval": "train[98%:]", "test": ""})
    with pytest.raises(
        UserError, match=r"train split 'train\[:60%\]' and eval split 'train\[50:70\]'.* share 10 records"
    ):
        collection.check_disjoint({"train": "train[:60%]", "eval": "train[50:70]"})


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[", "bad split 'train\\['"),
        ("train[a:b]", "bad split"),
        ("", "bad split"),
        ("trian", "no split 'trian'; did you mean 'train'"),
        ("train[:50]", "split 'train\\[:50\\]' of .* 10 examples"),
        ("train[5:5]", "is empty \\(train has 10 records\\)"),
    ],
)
def test_split_mistakes(read, tmp_path, split, message):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    with pytest.raises(UserError, match=message) as caught:
        read("text:{}/a.jsonl", split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is an empty file"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no records"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl:1: no field 'text'; did you mean 'txt'"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: field 'text' is not a string but int"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected a JSON object, got list"),
        ("a.parquet", b"nonsense", "a.parquet: not a parquet file"),
        ("a.csv", b"txt,label\na,b\n", "a.csv: no field 'text'; did you mean 'txt'"),
        (
            "a.csv",
            b'text,label\n"a\nb",c\n\na,b,c\n',
            r"a.csv:5: not CSV \(expected 2 columns, as in the header, got 3\)",
        ),
        (
            "a.csv",
            b"text,label,text\na,b,c\n",
            "a.csv: 2 columns are named 'text'; expected one of each name that is read",
        ),
        ("a.csv", b"label,text,label\na,b,c\n", "a.csv: 2 columns are named 'label'; expected one"),
        (
            "a.csv",
            b"text;label\na;b\n",
            r"a.csv: its columns are separated by semicolons \('text;label'\); expected com",
        ),
        (
            "a.csv",
            b"text\tlabel\na\tb\n",
            r"a.csv: its columns are separated by tabs \('text\\tlabel'\); expected commas",
        ),
        ("a.csv", b"text\n\xff\n", "a.csv: not UTF-8 at byte 5"),
    ],
)
def test_file_mistakes_name_the_place(read, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    scheme = "csv" if name.endswith("csv") else "text"
    with pytest.raises(UserError, match=message) as caught:
        texts(read(f"{scheme}:{{}}/{name}"))
    assert "\n" not in str(caught.value)


def test_documents_without_text_are_empty_among_others(read, tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "c.jsonl").write_text("")
    (tmp_path / "d.jsonl").write_text("\n\n")
    write_jsonl(tmp_path / "e.jsonl", [{"text": "two"}, {"text": None}, {"text": "three"}])
    pq.write_table(pa.table({"text": ["four", None]}), tmp_path / "f.parquet")
    source = read("text:{}")
    assert texts(source) == ["", "one", "two", "", "three", "four", ""]
    assert [row["text"] for row in source.__getitems__([5, 2, 0])] == ["four", "two", ""]


def test_an_empty_label_is_no_class(read, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,a\ntwo,\n")
    with pytest.raises(UserError, match=r"a.csv:3: the field 'label' is empty"):
        read("csv:{}/a.csv")


def test_a_line_of_csv_is_that_where_its_record_begins(read, tmp_path):
    (tmp_path / "a.csv").write_text('\ntext,label\n\n"one\nand",a\r\n\ntwo,\n')
    with pytest.raises(UserError, match=r"a.csv:7: the field 'label' is empty"):
        read("csv:{}/a.csv")
    # A text too long for the reader that counts lines: then the number of the record is what is sure.
    (tmp_path / "b.csv").write_text(f"text,label\n{'long ' * 30_000},a\ntwo,\n")
    with pytest.raises(UserError, match=r"b.csv, record 2: the field 'label' is empty"):
        read("csv:{}/b.csv")


def test_columns_that_nobody_reads_may_share_a_name(read, tmp_path):
    (tmp_path / "a.csv").write_text("text,,,label\none,1,2,a\n")
    assert texts(read("csv:{}/a.csv")) == ["one"]
    (tmp_path / "b.csv").write_text("a;b\none\n")  # which is a name like others where it is asked for
    assert texts(read("csv:{}/b.csv", text_field="a;b")) == ["one"]


def test_a_damaged_column_of_parquet_is_named(read, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one" * 50, "two" * 50], "label": ["a" * 90, "b"]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    for name, said in {"text": "cannot read row group 1", "label": "cannot read column 'label'"}.items():
        number = ["text", "label"].index(name)
        place = pq.ParquetFile(path).metadata.row_group(0).column(number)
        begin, size = place.dictionary_page_offset, place.total_compressed_size
        path.write_bytes(content[:begin] + b"\xff" * size + content[begin + size :])
        with pytest.raises(UserError, match=rf"a.parquet: {said} \(\S") as caught:
            texts(read("parquet:{}/a.parquet"))
        assert "\n" not in str(caught.value)
        path.write_bytes(content)
    names = pa.table([["one"], ["two"]], names=["text", "text"])
    pq.write_table(names, path)
    with pytest.raises(UserError, match=r"a.parquet: 2 columns are named 'text'"):
        read("parquet:{}/a.parquet")


def test_a_label_that_is_no_number_or_no_finite_one_is_no_label(read, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1.5}\n\n{"text": "y", "label": NaN}\n')
    pq.write_table(pa.table({"text": ["x", "y"], "label": [1.5, float("nan")]}), tmp_path / "a.parquet")
    for label_type in ("class", "number"):
        with pytest.raises(UserError, match=r"a.jsonl:3: the field 'label' is empty \(NaN\)"):
            read("jsonl:{}/a.jsonl", label_type=label_type)
        with pytest.raises(UserError, match=r"a.parquet, record 2: the field 'label' is empty \(NaN\)"):
            read("parquet:{}/a.parquet", label_type=label_type)
    (tmp_path / "b.csv").write_text("text,label\nx,nan\ny,a\n")  # a word like others
    assert read("csv:{}/b.csv").label_names == ("a", "nan")
    for label, said in {
        "nan": "'nan' is not finite",
        "-inf": "'-inf' is not finite",
        "high": "'high' is no number",
        "h" * 70: f"'{'h' * 60}…' is no number",
    }.items():
        (tmp_path / "b.csv").write_text(f"text,label\nx,1\ny,{label}\n")
        with pytest.raises(UserError, match=rf"b.csv:3: label {said}$"):
            read("csv:{}/b.csv", label_type="number")


def test_labels_that_begin_with_dashes_are_names(read, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,--5\ntwo,10\nthree,-2\n")
    assert read("csv:{}/a.csv").label_names == ("--5", "-2", "10")
    (tmp_path / "b.csv").write_text("text,label\none,5\ntwo,10\nthree,-2\n")
    assert read("csv:{}/b.csv").label_names == ("-2", "5", "10")


@pytest.mark.parametrize(
    ("label", "message"),
    [("", "field 'label' is empty"), ([1], "'label' is a list; expected a label"), ({"a": 1}, "'label' is an object")],
)
def test_what_is_no_label_is_refused(read, tmp_path, label, message):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": label}])
    with pytest.raises(UserError, match=f"a.jsonl:2: the .*{message}"):
        read("jsonl:{}/a.jsonl")
    table = {"text": ["x", "y"], "label": [label or "a", label]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=f"b.parquet, record {1 if label else 2}: the .*{message}"):
        read("parquet:{}/b.parquet")


def test_labels_that_are_all_null_are_not_there(read, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "kind": None}, {"text": "y", "kind": None}])
    with pytest.raises(UserError, match=r"a.jsonl: field 'kind' is null in all records; expected labels"):
        read("jsonl:{}/a.jsonl", label_field="kind")


def test_a_whole_number_is_one_class_however_it_is_written(read, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in (1, 1.0, "1", 0.0, 10)])
    source = read("jsonl:{}/a.jsonl")
    assert source.label_names == ("0", "1", "10")
    assert [row["label"] for row in source.__getitems__(range(5))] == [1, 1, 1, 0, 2]


def test_lines_of_white_space_are_no_records(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b' \t \n{"text": "one"}\n  {"text": "two"} \r\n\r\n\t\r\n{"text": }\n   ')
    source = read("text:{}/a.jsonl")
    assert len(source) == 3
    assert [source[0], source[1]] == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(UserError, match=r"a.jsonl:6: not JSON"):
        source[2]


def test_labels_are_not_asked_of_a_file_without_records(read, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "no"}, {"text": None, "label": "yes"}])
    source = read("jsonl:{}/*.jsonl")
    assert source.label_names == ("no", "yes")
    assert source[1] == {"text": "", "label": 1}


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (("a.txt", "b.txt", "c.jsonl"), b"", r"a.txt is an empty file, like the 2 others$"),
        (("a.jsonl", "b.jsonl"), b"\n", r"a.jsonl holds no records, like the 1 others$"),
    ],
)
def test_a_source_that_is_all_empty_is_refused(read, tmp_path, names, content, message):
    for name in names:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("text:{}")


def test_an_empty_file_of_a_format_with_a_header_is_refused(read, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"b.parquet is an empty file$"):
        read("text:{}")


def test_spec_mistakes(read, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown data source 'python_doc'; did you mean 'python_docs'"):
        read("python_doc")
    meant = {"row:data": "rows:FOLDER", "txt:a.txt": "text:GLOB", "tdfs:x": "tfds:NAME", "rows:": "rows:FOLDER"}
    for given, form in meant.items():
        with pytest.raises(UserError, match=f"unknown data source '{given}'; did you mean '{form}"):
            read(given)
    with pytest.raises(UserError, match=r"no file matches .* did you mean 'corpus'"):
        read("text:{}/corpsu/*.txt")
    with pytest.raises(UserError, match=r"reads only .txt, .jsonl, .parquet"):
        read("text:{}/corpus/*.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder without"):
        read("text:{}/empty")


def test_a_collection_is_opened_once_for_all_its_slices(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    collection = open_collection(f"text:{tmp_path}/a.jsonl", cache_dir=tmp_path)
    assert len(collection.slice("train[:7]")) + len(collection.slice("train[7:]")) == 10

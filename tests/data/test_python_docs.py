import hashlib
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from sslx.data import python_docs as pd
from sslx.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The real dataset: the builder, and per split the list of (text, label). Built once, shared by xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    builder = pd.python_docs(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    rows = {}
    for split in pd.SPLITS:
        source = builder.as_data_source(split)
        rows[split] = [(row["text"].decode(), int(row["label"])) for row in source.__getitems__(range(len(source)))]
    return builder, rows


def _shingles(text):
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def test_size_is_as_documented(corpus):
    _, rows = corpus
    texts = [text for split in rows.values() for text, _ in split]
    assert 8_000 < len(texts) < 16_000
    assert 8e6 < sum(len(text.encode()) for text in texts) < 16e6
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= pd.MIN_CHARACTERS


def test_every_class_is_in_every_split_in_proportion(corpus):
    builder, rows = corpus
    names = builder.info.features["label"].names
    assert len(names) >= 15
    assert {"python", "numpy", "jax"} <= set(names)
    total = Counter(label for split in rows.values() for _, label in split)
    assert min(total.values()) >= pd.MIN_TEXTS_PER_LABEL
    assert max(total.values()) <= pd.MAX_TEXTS_PER_LABEL
    for split, share in pd.SPLITS.items():
        counts = Counter(label for _, label in rows[split])
        assert all(abs(counts[label] - share * total[label]) <= 1 for label in range(len(names)))


def test_no_near_duplicates_across_splits(corpus):
    # An inverted index over shingle strings: no hashing, no sampling, every pair counted.
    _, rows = corpus
    heldout = [(split, _shingles(text)) for split in ("test", "validation") for text, _ in rows[split]]
    index = defaultdict(list)
    for i, (_, shingles) in enumerate(heldout):
        for shingle in shingles:
            index[shingle].append(i)
    others = [("train", _shingles(text)) for text, _ in rows["train"]] + heldout
    twins, compared = [], 0
    for split, shingles in others:
        shared = Counter(i for shingle in shingles for i in index.get(shingle, ()) if heldout[i][0] != split)
        compared += len(shared)
        for i, count in shared.items():
            if count / min(len(shingles), len(heldout[i][1])) >= pd.CONTAINMENT:
                twins.append((shingles, heldout[i]))
    assert compared > 1000, "the check compared nothing"
    assert not twins


def test_a_slice_is_a_random_sample_of_the_labels(corpus):
    builder, rows = corpus
    sample = builder.as_data_source("train[:2000]")
    assert len(sample) == 2000
    labels = [int(row["label"]) for row in sample.__getitems__(range(2000))]
    assert labels == [label for _, label in rows["train"][:2000]]
    for label, count in Counter(label for _, label in rows["train"]).items():
        share = count / len(rows["train"])
        assert abs(labels.count(label) - 2000 * share) < 5 * (2000 * share) ** 0.5


def test_text_does_not_start_with_where_it_comes_from(corpus):
    builder, rows = corpus
    names = builder.info.features["label"].names
    told = sum(text.lower().startswith((f"{names[label]}.", f"{names[label]}/")) for text, label in rows["train"])
    assert told < 0.02 * len(rows["train"])


def test_opening_it_again_is_quick_and_writes_nothing(corpus):
    builder, _ = corpus
    root = Path(builder.data_path).parent.parent
    before = sorted((root / pd.NAME).rglob("*"))
    begin = time.monotonic()
    assert len(pd.python_docs(root).as_data_source("validation")) > 0
    assert time.monotonic() - begin < 1
    assert sorted((root / pd.NAME).rglob("*")) == before


# --- Small packages made for the purpose -----------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of 40 different docstrings each, and one that is not installed; nothing else."""
    places = {}
    for label in ("ant", "bee"):
        folder = tmp_path / "site" / label
        (folder / "tests").mkdir(parents=True)
        for i in range(40):
            words = " ".join(hashlib.sha256(f"{label}{i}{j}".encode()).hexdigest()[:6] for j in range(50))
            (folder / f"m{i}.py").write_text(f'raise RuntimeError("imported")\ndef f():\n    """{words}"""\n')
            (folder / "tests" / f"t{i}.py").write_text(f'"""{words[::-1]}"""\n')
            (folder / f"test_m{i}.py").write_text(f'"""{words[::-1]}"""\n')
        places[label] = [folder]
    monkeypatch.setattr(pd, "PACKAGES", {name: pd.Package(name, (name,)) for name in ("ant", "bee", "gone")})
    monkeypatch.setattr(pd, "_folders", lambda label: places.get(label, []))
    monkeypatch.setattr(pd, "MIN_TEXTS_PER_LABEL", 20)
    return tmp_path / "site"


def _hashes(root):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.array_record*")}


def test_two_builds_are_the_same_bytes(packages, tmp_path):
    builder = pd.python_docs(tmp_path / "a")
    pd.python_docs(tmp_path / "b")
    assert builder.info.features["label"].names == ["ant", "bee"]
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        "train": 70,
        "validation": 4,
        "test": 6,
    }
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    assert len(_hashes(tmp_path / "a")) == 3


def test_twins_go_and_small_labels_are_dropped(packages, tmp_path):
    for i in range(30):
        words = (packages / "ant" / f"m{i}.py").read_text().split('"""')[1]
        (packages / "bee" / f"m{i}.py").write_text(f'"""{words} with a few words more."""')
    names, records = pd.documents()
    # Of bee's 40, 30 are the longer twins of ant's and stay; ant keeps 10 of its own, too few.
    assert names == ["bee"]
    assert sum(map(len, records.values())) == 40


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    script = """
        import resource, sys
        from sslx.data import python_docs as pd
        from sslx.errors import UserError
        pd.documents = lambda: (["a"], {split: [(str(list(range(20_000))), "a")] for split in pd.SPLITS})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            pd.python_docs(sys.argv[1])
        except UserError as error:
            print(error)
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(told) == 2  # that it is being prepared, and the error
    told = told[-1]
    assert told.startswith(f"cannot write the data cache {tmp_path}/python_docs: ")
    assert "too large" in told
    assert [path.suffix for path in (tmp_path / "python_docs").iterdir()] == [".lock"]


def test_nothing_installed_is_an_error(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "_folders", lambda label: [])
    with pytest.raises(UserError, match="would be empty"):
        pd.python_docs(tmp_path / "cache")


def test_fingerprint_follows_the_versions(monkeypatch):
    before = pd.fingerprint()
    assert pd.fingerprint() == before
    version = pd.importlib.metadata.version
    monkeypatch.setattr(pd.importlib.metadata, "version", lambda name: "999" if name == "jax" else version(name))
    assert pd.fingerprint() != before


def test_docstrings_are_found_wherever_a_statement_can_stand():
    source = '''"""module"""
if True:
    class A:
        """class"""
        async def f(self):
            "method"
            def g(): """inner"""
else:
    try: pass
    except ImportError:
        def h():
            """handler"""
add_newdoc("numpy", "x", ("attribute", """added"""))
x = """no docstring"""
'''
    assert {"module", "class", "method", "inner", "handler", "added"} <= set(pd.docstrings(source.encode()))
    assert "no docstring" not in set(pd.docstrings(source.encode()))
    assert list(pd.docstrings(b'"""cut off')) == []


def test_clean_normalises_layout_and_unicode():
    assert (
        pd.clean("First.  \n\n    Cafe\u0301\x0c\ud800 x\t\n      indented\n    ")
        == "First.\n\nCaf\u00e9 x\n  indented"
    )

"""Names of functions: tags of written modules against tags by hand, and splits that share no module."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter

import pytest

from sslx.data import python_names as pn
from sslx.data.tagged_words import TaggedWordsConfig, prepare_tagged_words
from sslx.errors import UserError

LETTERS = {
    "B-MODULE": "M",
    "I-MODULE": "m",
    "B-CLASS": "C",
    "B-FUNCTION": "F",
    "B-PARAMETER": "P",
    "B-VARIABLE": "V",
    "B-GLOBAL": "G",
    "B-ATTRIBUTE": "A",
    "B-KEYWORD": "K",
    "I-FUNCTION": "f",
}
HELPER = """
    import sys

    LIMIT = 3
    def inner(x): return x
    class Thing: pass
    try:
        from fast import inner as either
    except ImportError:
        def either(x): return x
"""


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    """Tags the functions of a module beside `HELPER`: ``word`` or ``word/LETTERS[tag]``, a string a function."""
    monkeypatch.setattr(pn, "MIN_WORDS", 1)
    monkeypatch.setattr(pn, "MAX_WORDS", 99)

    def run(source, file="module.py"):
        package = tmp_path / "package"
        (package / "sub").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("from .helper import Thing as Renamed\n")
        (package / "helper.py").write_text(textwrap.dedent(HELPER))
        path = tmp_path / file
        path.write_text(textwrap.dedent(source))
        made = []
        for words, tags in pn.Library(tmp_path).functions(path):
            pairs = zip(words, tags, strict=True)
            made.append(" ".join(word if tag == "O" else f"{word}/{LETTERS[tag]}" for word, tag in pairs))
        return made

    return run


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (  # parameters of all sorts, an annotation, defaults, an attribute, a call's keyword
            """
            import os
            SIZE = 4
            def f(a, /, b: int = SIZE, *rest, c=None, **more):
                "A docstring."
                return os.path.join(a, sep=b, **more)  # a comment
            """,
            "def f/F ( a/P , / , b/P : int/C = SIZE/G , * rest/P , c/P = None , ** more/P ) : "
            "return os/M . path/A . join/A ( a/P , sep/K = b/P , ** more/P )",
        ),
        (  # bound by for, with, except, a comprehension and a walrus; a string; builtins
            """
            def f(xs):
                for i, (j, k) in enumerate(xs):
                    try:
                        with open("name") as file: n = [y for y in file if y]
                    except (ValueError, OSError) as error: print(error, i)
                if (m := len(xs)) > 1: xs = m
            """,
            "def f/F ( xs/P ) : for i/V , ( j/V , k/V ) in enumerate/C ( xs/P ) : try : "
            'with open/F ( "" ) as file/V : n/V = [ y/V for y/V in file/V if y/V ] '
            "except ( ValueError/C , OSError/C ) as error/V : print/F ( error/V , i/V ) "
            "if ( m/V := len/F ( xs/P ) ) > 1 : xs/P = m/V",
        ),
        (  # names that imports bring, looked up in their modules, one through another module
            """
            from package import Renamed, helper
            from package.helper import LIMIT, inner as own
            def f(): return Renamed, helper, LIMIT, own(1.5), f
            """,
            "def f/F ( ) : return Renamed/C , helper/M , LIMIT/G , own/F ( 1.5 ) , f/F",
        ),
        (  # imports inside: a dotted name is one name of several words, and a parameter stays one
            """
            def f(helper):
                import package.helper
                from package.helper import inner as own, Thing
                return package.helper, helper, own, Thing
            """,
            "def f/F ( helper/P ) : import package/M ./m helper/m "
            "from package/M ./m helper/m import inner/F as own/F , Thing/C "
            "return package/M . helper/A , helper/P , own/F , Thing/C",
        ),
        (  # a class's own names are not those of its methods
            """
            inside = 1
            class A:
                inside = 2
                @property
                async def get(self): return self.inside + inside + A.inside
            """,
            "async def get/F ( self/P ) : return self/P . inside/A + inside/G + A/C . inside/A",
        ),
        ('def f(x): return f"{x}{len(x)!r:>{x}}" + "a" "b"', 'def f/F ( x/P ) : return "" + "" ""'),
    ],
)
def test_tags_are_those_done_by_hand(tagged, source, expected):
    assert tagged(source) == [expected]


@pytest.mark.parametrize(
    "source",
    [
        "import time\nfrom time import sleep\ndef f(): return sleep",  # has no source here
        "from package import sub\ndef f(): return sub",  # a folder without source
        "from package.helper import *\ndef f(): return LIMIT",
        "from package.helper import either\ndef f(): return either",  # two things, by what is installed
        "import os\nos = None\ndef f(): return os",
        "def f(): return missing",
        "def f(x):\n    def g(): return x\n    return g",
        "def f(x): return lambda y: x",
        "def f():\n    global x\n    x = 1",
        "def f(x): return [x for x in x]",
        "def f(y): return [len for len in y], len",
        "def f(x):\n    import x",
        "def f(x):\n    match x:\n        case [y]: return y",
        "class A:\n    int = 3\n    def f(self, x: int): return x",
        "def f(x): return 'é', x",
        "def f(x) return x",
    ],
)
def test_what_is_not_decided_is_left_out(tagged, source):
    assert tagged(source) == []


def test_relative_imports_and_circles_end(tagged):
    inside = "from . import helper\nfrom .helper import Thing\nfrom .module import Thing as other\n{}"
    found = tagged(inside.format("def f(): return helper, Thing"), "package/module.py")
    assert found == ["def f/F ( ) : return helper/M , Thing/C"]
    assert tagged(inside.format("def f(): return other"), "package/module.py") == ["def f/F ( ) : return other/C"]
    circle = "from package.a import x\ndef f(): return x"
    assert tagged("from package.b import x\n", "package/a.py") == tagged(circle, "package/b.py") == []


def test_a_head_ends_with_a_whole_line(tagged, monkeypatch):
    monkeypatch.setattr(pn, "MAX_WORDS", 10)
    assert tagged("def f(a):\n    a = (1 +\n      a)\n    return a\n") == ["def f/F ( a/P ) :"]
    assert tagged("def f(a):\n    a = 1\n    return a\n") == ["def f/F ( a/P ) : a/P = 1"]


# --- A library made for the purpose ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of 60 modules with four functions each, of words that differ, and one module twice."""
    root = tmp_path_factory.mktemp("library")
    for i in range(60):
        words = [hashlib.sha256(f"{i}{j}".encode()).hexdigest()[:6] for j in range(16)]
        functions = (
            f"def f{a}(x{a}, y{a}):\n    z{a} = x{a}.b{a}(y{a})\n    return len(z{a}) + y{b} if z{a} else x{a}\n"
            for a, b in zip(words[::4], words[1::4], strict=True)
        )
        (root / f"m{i}.py").write_text("".join(f"y{word} = 1\n" for word in words[1::4]) + "".join(functions))
    (root / "copy.py").write_text((root / "m7.py").read_text())
    (root / "tests").mkdir()
    (root / "tests" / "m.py").write_text((root / "m1.py").read_text().replace("x", "q"))
    return root


@pytest.fixture
def embedded(library, monkeypatch, tmp_path):
    """The config of the set made of `library`, in a cache of its own."""
    monkeypatch.setattr(pn.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setenv("SSLX_CACHE", str(tmp_path / "cache"))
    return lambda **changes: TaggedWordsConfig(**{"source": "python_names", "seq_len": 96, "vocab_size": 300} | changes)


def test_splits_share_no_module_and_hold_the_promised_shares(library):
    made = pn.sentences(library)
    names = {split: {words[1] for words, _ in found} for split, found in made.items()}
    module_of = {}
    for file in sorted(library.glob("m*.py")):
        module_of |= dict.fromkeys((line.split("(")[0][4:] for line in file.open() if line.startswith("def")), file)
    modules = {split: {module_of[name] for name in found} for split, found in names.items()}
    assert not modules["train"] & (modules["validation"] | modules["test"]) | (modules["validation"] & modules["test"])
    assert {split: len(found) for split, found in modules.items()} == {"train": 53, "validation": 2, "test": 5}
    assert sum(map(len, made.values())) == 240  # each once; none of the copy or of tests


def test_two_builds_are_the_same_and_rows_come_from_them(embedded, tmp_path):
    first = {path.name: path.read_bytes() for path in pn_folder(tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in pn_folder(tmp_path / "b").iterdir()}
    assert sorted(first) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    data, names = prepare_tagged_words(embedded(test_split="test"))
    assert (len(data.train), len(data.eval), len(data.test)) == (212, 8, 20)
    assert names == ("B-ATTRIBUTE", "B-FUNCTION", "B-GLOBAL", "B-PARAMETER", "B-VARIABLE", "O")
    rows = [json.loads(line) for line in first["validation.jsonl"].splitlines()]
    counts = Counter(names.index(tag) for row in rows for tag in row["tags"])
    assert data.eval.tag_counts.tolist() == [counts[i] for i in range(len(names))]


def pn_folder(cache):
    return pn.Path(pn.python_names(cache).removeprefix("jsonl:"))


def test_its_name_has_to_be_right(embedded):
    with pytest.raises(UserError, match="unknown data source 'python_name'; did you mean 'python_names'"):
        prepare_tagged_words(embedded(source="python_name"))


def test_no_source_is_one_line(embedded, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(pn.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not installed as source: python_names would be empty"):
        prepare_tagged_words(embedded())

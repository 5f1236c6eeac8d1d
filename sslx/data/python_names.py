"""An embedded set of tagged words: the functions of Python's standard library, each name tagged with what it is.

It needs no download: what it reads is installed wherever Python is. In: a cache folder. Out: a folder of JSON lines
(``tokens``, ``tags``) in files named after the splits; of CPython 3.11.7, 5,507 heads of functions for training,
285 for validation and 586 for testing.

A sentence is the head of a function: its ``def`` and the statements that follow while they fit in `MAX_WORDS`, without
its docstring and comments, split into words by `tokenize`; a string is written ``""``. Tags are BIO (a name is mostly
one word; ``os.path`` behind ``import`` is one name of three) and follow from the source alone, by Python's own scoping:

- FUNCTION, CLASS, MODULE: a name that a ``def``, ``class`` or ``import`` of its module binds, or a builtin; of
  ``from m import x``, what ``x`` is in the source of ``m``
- PARAMETER and VARIABLE: names of this function; GLOBAL: a name that the module assigns, or another builtin
- ATTRIBUTE: what follows a dot; KEYWORD: the name of an argument in a call; O: all else

A function about which this does not decide (an ``import`` of a module without source, ``import *``, names bound in two
ways, functions within it, ``lambda``, ``global``, ``match``) is left out, as are near-duplicates. Modules, which are
files, are dealt to the splits by the rank of the hash of their path, so that no module is in two; of one module at most
`MAX_FUNCTIONS` functions are kept. All of it is the same for the same version and installation of Python.
"""

from __future__ import annotations

import ast
import bisect
import builtins
import hashlib
import io
import json
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sslx.data import near_duplicates
from sslx.data.cache import prepare_once
from sslx.data.python_docs import SPLITS, source_files
from sslx.errors import UserError

NAME = "python_names"
# Raise this whenever the code below would make other sentences from the same sources.
_RECIPE = 1
MIN_WORDS, MAX_WORDS = 12, 48
MAX_FUNCTIONS = 40  # of one module: tkinter alone has hundreds that look the same
CONTAINMENT = 0.6  # as in `python_docs`; heads of functions share more by nature

Tagged = tuple[list[str], list[str]]
Place = tuple[int, int]  # line and column

_STAR = "*"  # bound by a module in which any name may be bound
_FORMATTED = tuple(getattr(ast, name) for name in ("JoinedStr", "TemplateStr") if hasattr(ast, name))
_BLOCKS = ("body", "orelse", "handlers", "finalbody")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# What has a scope of its own, says where names belong, or has names that are no ast.Name.
_UNDECIDED = (*_FUNCTIONS, ast.ClassDef, ast.Lambda, ast.Global, ast.Nonlocal, ast.Match)
# Those that `site` adds are not there under python -S.
_BUILTINS = {name for name in dir(builtins) if name not in ("copyright", "credits", "exit", "license", "quit", "_")}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# Python 3.12 has f-strings in parts, 3.14 t-strings too.
_PARTS_BEGIN = {getattr(tokenize, f"{kind}STRING_START", None) for kind in "FT"} - {None}
_PARTS_END = {getattr(tokenize, f"{kind}STRING_END", None) for kind in "FT"} - {None}


def python_names(cache_dir: str | os.PathLike[str]) -> str:
    """Returns the source spec of the files; writes them under ``cache_dir`` the first time (some 20 s, 4 MB).

    Raises:
      UserError: the folder cannot be written, or Python has no sources.
    """

    def lines(found: list[Tagged]) -> str:
        return "".join(json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in found)

    return f"jsonl:{written_once(cache_dir, NAME, [], '.jsonl', lines)}"


def written_once(
    cache_dir: str | os.PathLike[str],
    name: str,
    recipe: list[int],
    suffix: str,
    content: Callable[[list[Tagged]], str],
) -> Path:
    """The folder of a set that is made of these sentences, a file a split; written the first time.

    Args:
      cache_dir: Where it is kept.
      name: Of the set.
      recipe: Numbers that change with how ``content`` makes it; that of the sentences is counted in.
      suffix: Of the files, which are named after the splits.
      content: A file's text from the sentences of its split; "" where there would be nothing.

    Raises:
      UserError: the folder cannot be written, or Python has no sources.
    """

    def build(folder: Path) -> None:
        for split, found in sentences(Path(sysconfig.get_path("stdlib"))).items():
            text = content(found)
            if not text:
                raise UserError(f"Python's standard library is not installed as source: {name} would be empty")
            (folder / f"{split}{suffix}").write_text(text, encoding="utf8")

    version = f"{name} {[_RECIPE, *recipe]} {platform.python_implementation()} {platform.python_version()}"
    return prepare_once(Path(cache_dir) / name, _digest(version)[:12], build)


def sentences(root: Path) -> dict[str, list[Tagged]]:
    """Words and tags by split, of the modules under a folder, in an order that is random and fixed."""
    library = Library(root)
    found: dict[str, tuple[str, Tagged]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in others' sources
        for path in source_files(root):
            module = path.relative_to(root).as_posix()
            own = {" ".join(words): (words, tags) for words, tags in library.functions(path)}
            for text in sorted(own, key=_digest)[:MAX_FUNCTIONS]:
                found.setdefault(text, (module, own[text]))
    texts = sorted(found)
    kept = sorted(set(near_duplicates.representatives(texts, containment=CONTAINMENT).tolist())) if texts else []
    split_of = dealt({found[texts[i]][0] for i in kept})
    made: dict[str, list[Tagged]] = {split: [] for split in SPLITS}
    for i in sorted(kept, key=lambda i: _digest(texts[i])):
        module, tagged = found[texts[i]]
        made[split_of[module]].append(tagged)
    return made


def dealt(modules: set[str]) -> dict[str, str]:
    """The split of each module: by the rank of the hash of its path, in the proportions of `SPLITS`."""
    ranked, split_of, share = sorted(modules, key=_digest), {}, 0.0
    for split, proportion in SPLITS.items():
        begin, share = round(share * len(ranked)), share + proportion
        split_of |= dict.fromkeys(ranked[begin : round(share * len(ranked))], split)
    return split_of


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Import(NamedTuple):
    """What ``from module import name`` binds; the module is where its file would be, without ``.py``."""

    module: Path
    name: str


class Library:
    """The modules under a folder, read as text: what kind of thing each of their names is."""

    def __init__(self, root: Path):
        self._root = root
        self._bindings: dict[Path, dict[str, set[str | Import | None]]] = {}

    def functions(self, file: Path) -> Iterator[Tagged]:
        """The tagged heads of a module's functions and methods; none of a file that does not parse or is not ASCII."""
        parsed = _parsed(file)
        if parsed is None:
            return
        tree, source = parsed
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        lines = source.split("\n")
        for function, of_class in _functions_in(tree.body, frozenset()):
            tags = self._tags_of_places(file, function, of_class, lines)
            tagged = _head(function, tokens, tags) if tags is not None else None
            if tagged is not None and len(tagged[0]) >= MIN_WORDS:
                yield tagged

    def kind(self, file: Path, name: str) -> str | None:
        """What a name that a function reads from outside is; None if the sources do not decide it."""
        bindings = self._bindings_of(file)
        if name in bindings:
            return self._resolved(file, name, frozenset())
        if _STAR in bindings or name not in _BUILTINS:
            return None
        value = getattr(builtins, name)
        return "CLASS" if isinstance(value, type) else "FUNCTION" if callable(value) else "GLOBAL"

    def _resolved(self, file: Path, name: str, seen: frozenset[tuple[Path, str]]) -> str | None:
        seen |= {(file, name)}
        kinds = {self._followed(bound, seen) for bound in self._bindings_of(file)[name]}
        return kinds.pop() if len(kinds) == 1 else None

    def _followed(self, bound: str | Import | None, seen: frozenset[tuple[Path, str]] = frozenset()) -> str | None:
        """The kind of what a statement binds."""
        if not isinstance(bound, Import):
            return bound
        file, module = _file_of(bound.module), bound.module
        # Modules may import from one another in circles, and a package what lies in its own folder.
        if file is not None and bound.name in self._bindings_of(file) and (file, bound.name) not in seen:
            return self._resolved(file, bound.name, seen)
        return "MODULE" if module.is_dir() and _file_of(module / bound.name) else None

    def _bindings_of(self, file: Path) -> dict[str, set[str | Import | None]]:
        """What a module's statements outside of functions bind, and all that each name is bound to."""
        if file not in self._bindings:
            found = self._bindings[file] = {}
            parsed = _parsed(file)
            for statement in _statements(parsed[0].body) if parsed else ():
                for name, bound in self._bound_by(statement, file):
                    found.setdefault(name, set()).add(bound)
        return self._bindings[file]

    def _bound_by(self, statement: ast.stmt, file: Path) -> Iterator[tuple[str, str | Import | None]]:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], "MODULE"
        elif isinstance(statement, ast.ImportFrom):
            folder = file.parents[statement.level - 1] if statement.level else self._root
            module = folder.joinpath(*(statement.module or "").split("."))
            for alias in statement.names:
                yield alias.asname or alias.name, Import(module, alias.name)
        elif isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
            yield statement.name, "CLASS" if isinstance(statement, ast.ClassDef) else "FUNCTION"
        elif isinstance(statement, ast.Match):
            yield _STAR, None
        else:
            yield from ((name, "GLOBAL") for name in _assigned(statement))

    def _tags_of_places(
        self, file: Path, function: ast.FunctionDef, of_class: frozenset[str], lines: list[str]
    ) -> dict[Place, str | None] | None:
        """The tag of each place where a name is, None where it is not decided; None if that is so of the function."""
        inner = [node for statement in function.body for node in _walk(statement)]
        if getattr(function, "type_params", None) or any(isinstance(node, _UNDECIDED) for node in inner):
            return None
        signature = function.args
        parameters = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
        parameters += filter(None, (signature.vararg, signature.kwarg))
        own = self._own_names(file, inner, {parameter.arg for parameter in parameters})
        if own is None:
            return None
        outer = [*signature.defaults, *signature.kw_defaults, function.returns, *(p.annotation for p in parameters)]
        outer = [node for expression in outer if expression for node in _walk(expression)]
        if any(isinstance(node, (*_UNDECIDED, *_COMPREHENSIONS, ast.NamedExpr)) for node in outer):
            return None
        kinds: dict[Place, str | None] = {_place(parameter): "PARAMETER" for parameter in parameters}
        for node in outer:
            if isinstance(node, ast.Name):
                # Evaluated where the function is defined: in a class's body its own names come first.
                kinds[_place(node)] = None if node.id in of_class else self.kind(file, node.id)
        for node in inner:
            if isinstance(node, ast.Name):
                kinds[_place(node)] = own[node.id] if node.id in own else self.kind(file, node.id)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                line, begin = node.type.end_lineno, node.type.end_col_offset
                found = re.match(rf"\)* as (?={node.name}\b)", lines[line - 1][begin:])
                kinds[line, begin + (found.end() if found else 0)] = "VARIABLE" if found else None
        for node in (*inner, *outer):
            if isinstance(node, ast.Attribute):
                kinds[node.end_lineno, node.end_col_offset - len(node.attr)] = "ATTRIBUTE"
            elif isinstance(node, ast.keyword) and node.arg:
                kinds[_place(node)] = "KEYWORD"
        tags = {place: kind and f"B-{kind}" for place, kind in kinds.items()}
        for node in inner:
            if isinstance(node, ast.Import | ast.ImportFrom):
                tags |= _tags_of_import(node, own, lines)
        return tags

    def _own_names(self, file: Path, inner: list[ast.AST], parameters: set[str]) -> dict[str, str | None] | None:
        """What the names are that a function binds; None if one of them is two things."""
        assigned = {name for node in inner for name in _names_bound(node)} - parameters
        own: dict[str, str | None] = dict.fromkeys(parameters, "PARAMETER") | dict.fromkeys(assigned, "VARIABLE")
        imports = [node for node in inner if isinstance(node, ast.Import | ast.ImportFrom)]
        for name, bound in (pair for node in imports for pair in self._bound_by(node, file)):
            kind = self._followed(bound)
            if name == _STAR or own.setdefault(name, kind) != kind:
                return None
        elsewhere = _BUILTINS | set(self._bindings_of(file))
        for node in inner:
            for part in node.generators if isinstance(node, _COMPREHENSIONS) else ():
                for name in (name for target in _walk(part.target) for name in _names_bound(target)):
                    # Outside the comprehension the same name would be another thing.
                    if own[name] != "VARIABLE" or name in elsewhere:
                        return None
        return own


def _tags_of_import(node: ast.Import | ast.ImportFrom, own: dict, lines: list[str]) -> dict[Place, str | None]:
    tags: dict[Place, str | None] = {}

    def put(line: int, column: int, name: str, kind: str | None) -> None:
        tags[line, column] = kind and f"B-{kind}"
        for offset in range(1, len(name)):  # a dotted name is several words
            tags[line, column + offset] = kind and f"I-{kind}"

    if isinstance(node, ast.ImportFrom) and node.module:
        begin = f"from {'.' * node.level}"
        written = lines[node.lineno - 1].startswith(f"{begin}{node.module} ", node.col_offset)
        put(node.lineno, node.col_offset + len(begin), node.module, "MODULE" if written else None)
    for alias in node.names:
        kind = own[alias.asname or alias.name.partition(".")[0]]
        put(alias.lineno, alias.col_offset, alias.name, kind)
        if alias.asname:
            put(alias.end_lineno, alias.end_col_offset - len(alias.asname), alias.asname, kind)
    return tags


def _head(function: ast.FunctionDef, tokens: list[tokenize.TokenInfo], tags: dict[Place, str | None]) -> Tagged | None:
    """The words of the first lines of a function, as many as fit, and their tags; None if one is not decided."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = ((first.lineno, first.col_offset), (first.end_lineno, first.end_col_offset)) if documented else None
    end = (function.end_lineno, function.end_col_offset)
    words, found, kept, depth = [], [], 0, 0
    for token in tokens[bisect.bisect_left(tokens, _place(function), key=lambda token: token.start) :]:
        if token.type == tokenize.NEWLINE or token.start >= end:
            if len(words) > MAX_WORDS:
                break
            kept = len(words)
            if token.start >= end:
                break
        elif token.type in _PARTS_END:
            depth -= 1
        elif token.type in _PARTS_BEGIN or depth or token.type in _LAYOUT:
            if token.type in _PARTS_BEGIN and not depth:
                words.append('""')
                found.append("O")
            depth += token.type in _PARTS_BEGIN
        elif not (docstring and docstring[0] <= token.start < docstring[1]):
            named = words[-1:] == ["def"]
            words.append('""' if token.type == tokenize.STRING else token.string)
            found.append("B-FUNCTION" if named else tags.get(token.start, "O"))
    words, found = words[:kept], found[:kept]
    return (words, found) if None not in found else None


def _functions_in(
    body: Iterable[ast.AST], of_class: frozenset[str]
) -> Iterator[tuple[ast.FunctionDef, frozenset[str]]]:
    """A body's functions and its classes' methods, with the names that the class around each binds."""
    for statement in _statements(body):
        if isinstance(statement, _FUNCTIONS):
            yield statement, of_class
        elif isinstance(statement, ast.ClassDef):
            names = {name for inner in _statements(statement.body) for name in _assigned(inner)}
            names |= {n.name for n in _statements(statement.body) if isinstance(n, (*_FUNCTIONS, ast.ClassDef))}
            yield from _functions_in(statement.body, frozenset(names))


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All statements of a scope, without those of the functions and classes in it."""
    for statement in body:
        yield statement
        if not isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
            for block in _BLOCKS:
                yield from _statements(getattr(statement, block, ()))


def _assigned(statement: ast.AST) -> set[str]:
    """The names that a statement itself binds, without those of its blocks."""
    found = set(_names_bound(statement))
    for name, value in ast.iter_fields(statement):
        if name not in _BLOCKS:
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST) and not isinstance(part, (*_COMPREHENSIONS, ast.Lambda)):
                    found |= _assigned(part)
    return found


def _names_bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    return [node.name] if isinstance(node, ast.ExceptHandler) and node.name else []


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, but not into f-strings, whose inside is no word and whose places Python 3.11 does not tell."""
    yield node
    if not isinstance(node, _FORMATTED):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)


def _place(node: ast.AST) -> Place:
    return node.lineno, node.col_offset


def _file_of(module: Path) -> Path | None:
    files = (module.with_name(f"{module.name}.py"), module / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _parsed(file: Path) -> tuple[ast.Module, str] | None:
    content = file.read_bytes()
    try:
        # Elsewhere a column is not a number of characters.
        return (ast.parse(content), content.decode().replace("\r\n", "\n")) if content.isascii() else None
    except (SyntaxError, ValueError, RecursionError):
        return None

"""Asks a trained run about texts or pictures: ``python -m sslx.predict --run=runs/bert_mlm --input=texts.jsonl``.

In: .jsonl with a field "text" (and perhaps "id"; "pair" to classify or score pairs; "question" and "context" to
answer; "tokens", a list of words, to tag these and no text), or .txt with a text a line. Of a run on pictures: a
folder, a file, a pattern of files, or .jsonl with a field "image", the path of one, which if it is relative begins
where the .jsonl lies. Out: a JSON object a line, in the same order (of a folder, sorted by path), with the fields of
the input.

  --run=FOLDER            the run
  --verb=NAME             fill | generate | classify | score | tag | answer | embed; default: what it was trained for
  --input=FILE            .jsonl or .txt, or pictures; - is JSON lines from stdin
  --output=FILE           where to write, whole or not at all; default: - (stdout)
  --overwrite             the output may exist; it is never the input
  --keep=FIELD,...        more fields that the input may have; they are copied. None of the answer's, such as label
  --batch_size=32         inputs that go through the model at once
  --step=N                which checkpoint; default: the best of a task's run, the newest of any other

  fill:                   --top=5 guesses for each [MASK]
  generate:               --new_tokens=64 --temperature=0.8 --top_k=K --top_p=1.0 --seed=0
  answer:                 --top=1 candidates
  embed:                  --pool=mean|first|last|own (of texts)  --normalise=True
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import flags

from sslx import entry
from sslx.data.files import decoded, json_object, matching_files
from sslx.data.image_sources import SUFFIXES as PICTURES
from sslx.errors import UserError, choose, nearest
from sslx.inference import BY_MODALITY, VERBS
from sslx.inference.loading import modality_of
from sslx.inference.model import load, verb_class
from sslx.inference.verb import InputError, Verb
from sslx.runtime import configure

ALWAYS = ("id",)  # a field that any input may have
SUFFIXES = (".jsonl", ".txt")
KINDS = {
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "str": flags.DEFINE_string,
    "bool": flags.DEFINE_bool,
}


def main() -> None:
    """Predicts as the flags say."""
    given = flags.FLAGS
    for name in ("run", "input"):
        if not getattr(given, name):
            raise UserError(f"no --{name} given; expected --run=FOLDER --input=FILE")
    if given.verb:
        choose(given.verb, VERBS, "--verb")
    _check_output(given.output, given.overwrite)
    modality = modality_of(given.run)
    files = modality == "images" and given.input != "-" and not given.input.endswith(".jsonl")
    content = _files(given.input) if files else _content(given.input)
    _check_apart(given.output, content if files else [given.input])
    configure()
    model = load(given.run, step=given.step)
    name = given.verb or next(iter(model.verbs), "embed")
    model.require(name)
    verb = _verb(name, modality)
    keep = tuple(filter(None, given.keep.split(",")))
    for field in keep:
        if field in verb.answer_fields():
            raise UserError(f"--keep={field}: {name} writes {field!r} itself; give the field of the input another name")
    if files:
        places, records = [given.input] * len(content), [{"image": path} for path in content]
    else:
        lines, records = _records(content, given.input, verb, keep)
        places = [_where(given.input, line) for line in lines]
    asked = [_placed(record, given.input) for record in records] if modality == "images" else records
    try:
        answers = model.answers(verb, asked, given.batch_size)
    except InputError as error:
        if given.input.endswith(".txt") and not records[error.index]["text"].strip():
            raise UserError(f"{places[error.index]} is empty") from None
        raise UserError(f"{places[error.index]}: {error.reason}") from None
    told = 0
    with _writing(given.output) as file:
        for record, answer in zip(records, answers, strict=True):
            values = plain(answer, verb.counted)
            told += bool(verb.counted) and verb.counted in values
            file.write(json.dumps(record | values, ensure_ascii=False) + "\n")
    print(f"{len(records):,} answers by step {model.run.step} of {given.run}", file=sys.stderr)
    if told:
        print(f'{told:,} {verb.note(model.run)} ("{verb.counted}")', file=sys.stderr)


def plain(answer: Any, counted: str) -> dict[str, Any]:
    """An answer as JSON values; what is ``counted``, if anything is, only where there are some."""
    values = dataclasses.asdict(answer)
    if counted and not values[counted]:
        del values[counted]
    return {name: _shortest(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _shortest(vector: np.ndarray) -> list[float]:
    # The shortest decimals that are the same float32: half as long as those of the float64 they would become.
    return [float(str(value)) for value in vector]


def _verb(name: str, modality: str) -> Verb:
    """The verb with the options that the flags give it.

    Raises:
      UserError: an option of another verb, or one that cannot be.
    """
    cls = verb_class(name, modality)
    own = [field.name for field in dataclasses.fields(cls)]
    given = {option: value for option in _options() if (value := getattr(flags.FLAGS, option)) is not None}
    for option in given:
        if option not in own:
            takes = ", ".join(f"--{one}" for one in own) or "none"
            raise UserError(f"--{option} is no option of {name}; its options: {takes}")
    try:
        return cls(**given)
    except UserError as error:
        raise UserError(f"--{error}") from None


def _options() -> dict[str, str]:
    """The options of all verbs, with the name of their type."""
    kinds = {}
    for modality, verbs in BY_MODALITY.items():
        for name in verbs:
            for field in dataclasses.fields(verb_class(name, modality)):
                kinds[field.name] = str(field.type).partition(" ")[0]
    return kinds


def _files(pictures: str) -> list[str]:
    """The pictures that a folder, a path or a pattern names, as it names them."""
    found, here = matching_files(f"--input={pictures}", pictures, PICTURES), os.getcwd()
    return found if os.path.isabs(os.path.expanduser(pictures)) else [os.path.relpath(path, here) for path in found]


def _placed(record: dict[str, Any], file: str) -> dict[str, Any]:
    """A record of a .jsonl whose picture is found from here."""
    folder = os.path.dirname(file) if file.endswith(".jsonl") else ""
    return record | {"image": os.path.join(folder, os.path.expanduser(record["image"]))}


def _content(file: str) -> str:
    if file == "-":
        return decoded(sys.stdin.buffer.read(), "stdin")
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--input={file} is neither {' nor '.join(SUFFIXES)}; - reads JSON lines from stdin")
    try:
        return decoded(path.read_bytes(), file)
    except FileNotFoundError:
        beside = [str(path.with_name(p.name)) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(file, [name for name in beside if name.endswith(SUFFIXES)])
        raise UserError(f"no file --input={file}; {near}") from None
    except OSError as error:
        raise UserError(f"cannot read --input={file}: {error.strerror or error}") from None


def _records(content: str, file: str, verb: Verb, keep: tuple[str, ...]) -> tuple[list[int], list[dict[str, Any]]]:
    """The records of an input and the lines they stand in, from 1."""
    lines = content.split("\n")
    if lines[-1] == "":  # the end of the last line begins no other
        lines.pop()
    if not any(line.strip() for line in lines):
        raise UserError(f"{'stdin' if file == '-' else file} is empty; expected {_expected(file, verb)}")
    if file.endswith(".txt"):
        if verb.fields != ("text",):
            raise UserError(f"{file} has texts alone; expected .jsonl with {_expected('-', verb)}")
        return [*range(1, len(lines) + 1)], [{"text": line.removesuffix("\r")} for line in lines]
    places = [place for place, line in enumerate(lines) if line.strip()]
    records = [json_object(lines[place], lambda place=place: _where(file, place + 1)) for place in places]
    there = {name for record in records for name in record}
    for place, record in zip(places, records, strict=True):
        _check_record(record, _where(file, place + 1), verb, keep, there)
    return [place + 1 for place in places], records


def _check_record(record: dict[str, Any], where: str, verb: Verb, keep: tuple[str, ...], there: set[str]) -> None:
    """Refuses a record that the verb cannot read; ``there`` are the fields of all of them."""
    listed = (verb.listed,) if verb.listed else ()
    valid = (*verb.fields, *verb.optional, *listed, *ALWAYS, *keep)
    for name in record:
        if name in verb.answer_fields():
            raise UserError(f"{where}: field {name!r} is one of the answer's; give it another name")
        if name not in valid:
            for kept in keep:
                if kept not in there:
                    near = nearest(kept, there.difference(verb.fields, verb.optional, listed, ALWAYS))
                    raise UserError(f"--keep={kept} names no field of the input; {near}")
            raise UserError(f"{where}: unknown field {name!r}; {nearest(name, valid)}; --keep={name} copies it")
    instead = verb.listed in record  # it is looked at where its words are
    for name in verb.fields:
        if instead and name in record:
            raise UserError(f"{where}: both {name!r} and {verb.listed!r}; expected one of them")
        if not instead and name not in record:
            raise UserError(f"{where}: no field {name!r}; expected {_expected('-', verb)}")
    for name in (*verb.fields, *verb.optional):
        if not isinstance(record.get(name, ""), str):
            raise UserError(f"{where}: field {name!r} is not a string but {type(record[name]).__name__}")


def _expected(file: str, verb: Verb) -> str:
    fields = " and ".join(f'"{name}"' for name in verb.fields)
    fields += f' or a list "{verb.listed}"' if verb.listed else ""
    return "a text a line" if file.endswith(".txt") else f"a JSON object a line, with {fields}"


def _where(file: str, line: int) -> str:
    return f"{'stdin' if file == '-' else file}, line {line}"


def _check_output(file: str, overwrite: bool) -> None:
    path = Path(file)
    if file == "-":
        return
    if path.is_dir():
        raise UserError(f"--output={file} is a folder; expected a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write --output={file}: no folder {path.parent}")
    if path.exists() and not overwrite:
        raise UserError(f"--output={file} exists; give another, or --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write --output={file}: {path.parent} is not writable")


def _check_apart(file: str, inputs: list[str]) -> None:
    """Refuses to write over what is read, under whatever name, even where the output may exist."""
    if file == "-" or not os.path.exists(file):
        return
    for path in inputs:
        if path != "-" and os.path.samefile(file, path):
            raise UserError(f"--output={file} is the input {path} itself; give another")


@contextlib.contextmanager
def _writing(file: str) -> Iterator[IO[str]]:
    """A file that appears under its name when all of it is written; - is stdout."""
    if file == "-":
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has read enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    path, temporary = Path(file), None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as opened:
            temporary = Path(opened.name)
            yield opened
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write --output={file}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _define_flags() -> None:
    flags.DEFINE_string("run", "", "Run folder")
    flags.DEFINE_string("verb", "", "What to do; default: what the run was trained for")
    flags.DEFINE_string("input", "", "File of texts; or a folder, a file or a pattern of pictures")
    flags.DEFINE_string("output", "-", "File to write")
    flags.DEFINE_bool("overwrite", False, "The output may exist")
    flags.DEFINE_string("keep", "", "More fields that the input may have")
    flags.DEFINE_integer("batch_size", 32, "Rows at once")
    flags.DEFINE_integer("step", None, "Checkpoint")
    for name, kind in _options().items():
        KINDS[kind](name, None, "An option of a verb")


if __name__ == "__main__":
    _define_flags()
    entry.run_without_config(main)

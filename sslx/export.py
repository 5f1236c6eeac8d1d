"""Exports a run: ``python -m sslx.export --run=runs/bert_mlm --format=hf --out=FOLDER``.

--run=FOLDER            the run
--format=hf             config.json, model.safetensors, tokenizer (of pictures: preprocessor_config.json) and a model
                        card, which transformers loads; of the original BERT, RoBERTa, ELECTRA, GPT-2 and ViT
--format=stablehlo      features (and logits, where there is a head) of any model as StableHLO, for any batch; the card
                        says how they are called
--out=FOLDER            where to; must not exist
--step=N                which checkpoint; default: the best of a task's run, the newest of any other
--encoder_only          without the head (hf)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path as LocalPath
from typing import Any

from absl import flags
from etils.epath import Path

from sslx import entry
from sslx.data.text import saved_tokenizer
from sslx.data.tokenizer import Vocabulary
from sslx.errors import UserError, choose
from sslx.interop import preprocessor, stablehlo, writing
from sslx.interop.folder import is_published
from sslx.interop.model_card import model_card
from sslx.interop.tokenizer import complete
from sslx.models.transformer_config import computed_by
from sslx.pretext.clm import CausalLanguageModel
from sslx.runtime import configure
from sslx.storage import is_remote
from sslx.train.checkpoint import chosen_step, read_variables
from sslx.train.initialise import objective_class
from sslx.train.run_folder import read_config

FORMATS = ("hf", "stablehlo")


def main() -> None:
    """Exports as the flags say."""
    given = flags.FLAGS
    for name, expected in (("run", "a run folder"), ("format", " or ".join(FORMATS)), ("out", "a folder to write")):
        if not getattr(given, name):
            raise UserError(f"no --{name} given; expected {expected}")
    choose(given.format, FORMATS, "--format")
    if given.encoder_only and given.format != "hf":
        raise UserError("--encoder_only is for --format=hf; features.stablehlo is the encoder alone")
    configure()
    for line in export(given.run, given.out, given.format, step=given.step, encoder_only=given.encoder_only):
        print(line)


def export(run: str, out: str, form: str, *, step: int | None = None, encoder_only: bool = False) -> list[str]:
    """Writes a run into a new folder, whole or not at all.

    Args:
      run: The run's folder.
      out: The folder to make.
      form: ``hf`` or ``stablehlo``.
      step: The checkpoint; None: the best of a task's run, the newest of any other.
      encoder_only: Without the head (``hf``).

    Returns:
      What was written, to be printed.

    Raises:
      UserError: anything the user can mend.
    """
    if is_remote(run):
        raise UserError(
            f"--run={run} is on remote storage; copy it to a disk first (config.json, tokenizer/ and so on)"
        )
    folder = Path(run)
    config = read_config(folder)
    if is_published(config):
        raise UserError(f"--run={run} is a folder of published weights and no run of sslx")
    _check_out(out)
    config = {**config, "model": computed_by("xla", config["model"])}  # a kernel would tie it to its kind of device
    step = chosen_step(folder, config, step)
    objective = objective_class(config).restored(config, folder)
    variables = read_variables(folder, step)
    params, state = variables["params"], variables["state"]
    with _whole(LocalPath(out)) as made:
        if form == "hf":
            class_name, notes = _write_hf(objective, folder, params, state, made, encoder_only, config["data"])
        else:
            _, row = objective_class(config).abstract(config)
            class_name, notes = "", stablehlo.write(objective, params, state, row, made)
            if names := getattr(objective, "label_names", ()):
                (made / "labels.json").write_text(json.dumps(names) + "\n", encoding="utf8")
                notes["labels.json"] = "the classes, in the order of the logits"
            if (folder / "tokenizer").is_dir():
                # Features are of whole texts, also those of a causal language model.
                _complete(objective, folder, config["data"], continued=False)[0].save_pretrained(made / "tokenizer")
        card = model_card(folder, config, step, form=form, class_name=class_name, notes=notes)
        (made / "README.md").write_text(card, encoding="utf8")
    said = [f"exported step {step:,} of {run} to {out}", *(f"  {name}: {text}" for name, text in notes.items())]
    return said + ([f"  loads with transformers.{class_name}.from_pretrained({out!r})"] if class_name else [])


def _write_hf(
    objective: Any,
    run: Path,
    params: Any,
    state: Any,
    folder: LocalPath,
    encoder_only: bool,
    data: Mapping[str, Any],
) -> tuple[str, dict[str, str]]:
    tokenizer, rows = None, {"vocab_size": 0, "pad_id": 0}
    if objective.modality == "text":
        causal = isinstance(objective, CausalLanguageModel) and not encoder_only
        tokenizer, words = _complete(objective, run, data, continued=causal)
        rows = {"vocab_size": words.size, "pad_id": words.pad_id}
        notes = {"vocabulary": f"{words.size:,} tokens"}
    form = writing.published(
        objective.model,
        objective.parts(params, state),
        head_reads=objective.head_reads,
        encoder_only=encoder_only,
        **rows,
    )
    labels = None if encoder_only else getattr(objective, "label_names", None)
    writing.write(form, folder, tokenizer, labels)
    if objective.modality == "images":
        preprocessor.write(objective.model, data, folder)
        features = {"class": "the class token", "mean": "the mean of the patches"}[objective.model.pool]
        notes = {"a picture's features": f"{features}, of last_hidden_state"}
    count = sum(array.size for array in form.tensors.values())
    return form.class_name, {"parameters": f"{count:,}", **notes}


def _complete(objective: Any, run: Path, data: Mapping[str, Any], *, continued: bool) -> tuple[Any, Vocabulary]:
    tokenizer, words = saved_tokenizer(run)
    types = getattr(objective.model, "token_types", 1) > 1
    done = complete(tokenizer, words, longest=data["seq_len"], continued=continued, token_types=types)
    return done, words


def _check_out(out: str) -> None:
    if is_remote(out):
        raise UserError(f"--out={out} is on remote storage; expected a folder on a disk")
    folder = LocalPath(out)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--out={out} exists; give another, or remove it first")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"cannot write --out={out}: {above} is not a folder that can be written")


@contextlib.contextmanager
def _whole(out: LocalPath) -> Iterator[LocalPath]:
    """A folder that gets its name when all of it is written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = LocalPath(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror or error}") from None
    try:
        yield made
        made.chmod(0o755)
        made.rename(out)
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "Run folder")
    flags.DEFINE_string("format", "", "hf or stablehlo")
    flags.DEFINE_string("out", "", "Folder to write")
    flags.DEFINE_integer("step", None, "Checkpoint")
    flags.DEFINE_bool("encoder_only", False, "Without the head")
    entry.run_without_config(main)

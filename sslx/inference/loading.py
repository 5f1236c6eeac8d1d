"""A trained run, ready to be asked: objective, tokenizer and parameters from its folder, without its data."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path as LocalPath
from typing import TYPE_CHECKING, Any

import jax
from etils.epath import Path

from sslx.data.files import without_halves
from sslx.data.text import saved_tokenizer
from sslx.data.tokenizer import Vocabulary
from sslx.data.tokens import encoding_backend
from sslx.errors import UserError
from sslx.interop.folder import is_published
from sslx.models.transformer_config import computed_by
from sslx.objective import Objective
from sslx.runtime import ignore_absent_tpu
from sslx.storage import check, is_remote, local_copy
from sslx.train.checkpoint import chosen_step, read_variables
from sslx.train.initialise import objective_class, part_of
from sslx.train.run_folder import read_config

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRun:
    """What the verbs need of a run."""

    name: str  # its folder, as it was given
    written: dict[str, Any]
    step: int  # of its checkpoint
    objective: Objective
    tokenizer: PreTrainedTokenizerFast | None  # of a run on text
    words: Vocabulary | None
    variables: dict[str, Any]  # {"params", "state"}, on the device
    longest: int | None  # tokens of its rows, special ones included: what it has seen positions of

    @property
    def kind(self) -> str:
        """``mlm``, ``text_classification``: what it was trained for."""
        return self.written[part_of(self.written)]["name"]

    def tokens_of(self, text: str) -> list[int]:
        """A text's tokens as training made them: special tokens that it spells are characters like others."""
        return self._backend.encode(without_halves(text), add_special_tokens=False).ids

    def encoded_with_special(self, text: str) -> Encoding:
        """Its tokens and the characters they stand for, where special tokens that the text spells are meant."""
        return self.tokenizer.backend_tokenizer.encode(without_halves(text), add_special_tokens=False)

    @functools.cached_property
    def _backend(self) -> Tokenizer:
        return encoding_backend(self.tokenizer.backend_tokenizer.to_str())


def modality_of(run: str | Path) -> str:
    """What a run's rows are of, from its config alone.

    Raises:
      UserError: there is no run.
    """
    check(run)
    written = written_of(run)
    return objective_class(written).modality_of(written)


def load_run(run: str | Path, step: int | None = None) -> LoadedRun:
    """Reads a run.

    Args:
      run: Its folder.
      step: Which checkpoint; None: the best of a downstream task's run, the newest of any other.

    Raises:
      UserError: no run or no checkpoint there, or an objective that needs its data.
    """
    ignore_absent_tpu()
    check(run)
    written = written_of(run)
    step = chosen_step(Path(run), written, step)
    folder = local(Path(run))
    objective = objective_class(written).restored(written, folder)
    tokenizer, words = saved_tokenizer(folder) if objective.modality == "text" else (None, None)
    return LoadedRun(
        name=str(run),
        written=written,
        step=step,
        objective=objective,
        tokenizer=tokenizer,
        words=words,
        variables=jax.device_put(read_variables(Path(run), step)),
        longest=written["data"].get("seq_len"),
    )


def written_of(run: str | Path) -> dict[str, Any]:
    """The whole config of a run.

    Raises:
      UserError: there is no run (names the nearest), or it is a folder of published weights.
    """
    written = read_config(Path(run))
    if is_published(written):
        raise UserError(f"{run} is a folder of published weights and no run of sslx; config.init takes it")
    return {**written, "model": computed_by("auto", written["model"])}


def local(run: Path) -> LocalPath:
    """The folder, or where it is far away a copy of what lies beside its checkpoints."""
    if not is_remote(run):
        return LocalPath(run)
    copy = LocalPath(tempfile.mkdtemp(prefix="sslx-"))
    if (run / "tokenizer").is_dir():
        (copy / "tokenizer").symlink_to(local_copy(run / "tokenizer"))
    for file in run.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    return copy

"""Where numbers go: ``metrics.jsonl``, TensorBoard, Weights & Biases if asked, and ``curves.png`` at the end."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path as LocalPath
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from tensorboardX import SummaryWriter

from sslx.errors import UserError
from sslx.storage import absolute, is_remote, staging, write_bytes, write_figure, write_picture, write_text

UPLOAD_SECONDS = 60  # between copies of the metrics to remote storage


class MetricsWriter:
    """Writes one JSON object a line, and the same numbers as TensorBoard scalars.

    What was written after the step resumed from is cut away first: those steps run again. Only host 0 writes; on the
    others nothing happens.
    """

    def __init__(self, run: Path, resumed_from: int, wandb_project: str = "", config: dict[str, Any] | None = None):
        self._run, self._writes = run, jax.process_index() == 0
        if not self._writes:
            return
        self._folder, self._uploaded = staging(run), time.monotonic()
        self._path = self._folder / "metrics.jsonl"
        kept = [record for record in read_metrics(run) if record["step"] <= resumed_from]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        try:
            self._file = open(self._path, "a", encoding="utf8")  # noqa: SIM115  (open as long as the run)
            self._board = SummaryWriter(str(self._folder), purge_step=resumed_from + 1)
        except OSError as error:
            raise UserError(f"cannot write in {run}: {error.strerror or error}") from None
        self._wandb = _start_wandb(run, self._folder, wandb_project, config) if wandb_project else None

    def scalars(self, step: int, values: dict[str, float], **said: str) -> None:
        """Writes values of a step, with all their digits, and what is ``said`` of it, which has no curve.

        Raises:
          UserError: the disk is full.
        """
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({"step": step, **values, **said}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from None
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if is_remote(self._run) and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def alarm(self, step: int, name: str, line: str) -> None:
        """Writes that an alarm was raised: ``alarm/NAME`` 1, and its line as ``diagnosis`` and as TensorBoard text."""
        self.scalars(step, {f"alarm/{name}": 1.0}, diagnosis=line)
        if self._writes:
            self._board.add_text(f"alarm/{name}", line, step)

    def table(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Writes a table as TensorBoard text."""
        if rows and self._writes:
            self._board.add_text(name, markdown(rows), step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture uint8[height, width, 3] as ``pictures/NAME_STEP.png`` and for TensorBoard."""
        if not self._writes:
            return
        write_picture(Path(self._run) / "pictures" / f"{name}_{step:08d}.png", picture)
        self._board.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Puts remote storage in step with what was written: called before a checkpoint, from which a run goes on."""
        if self._writes and is_remote(self._run):
            self._board.flush()
            self._upload()

    def close(self) -> None:
        """Puts everything on disk."""
        if not self._writes:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()
        if is_remote(self._run):
            self._upload()
        if self._wandb is not None:
            self._wandb.finish()

    def _upload(self) -> None:
        # An object cannot be appended to, so the files go up whole.
        for file in (self._path, *self._folder.glob("events.*")):
            write_bytes(Path(self._run) / file.name, file.read_bytes())
        self._uploaded = time.monotonic()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of ``metrics.jsonl``; a last line cut short by a kill is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().decode("utf8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table; the first row's keys are the header."""
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(row[key]) for key in rows[0]] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_curves(run: Path, chance: float | None, unit: str = "nats") -> Path | None:
    """Draws ``curves.png`` from ``metrics.jsonl``: losses against the chance value, other metrics, the rate, alarms.

    Args:
      run: The run folder.
      chance: What the loss of a guessing model is, or None.
      unit: Of the loss; "" where it has none.

    Returns:
      The picture's path, or None if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run)

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record[name]) for record in records if name in record]
        return [x for x, _ in points], [y for _, y in points]

    evaluated = {name for record in records for name in record if name.startswith("eval/")}
    chosen = next((n for n in ("eval/macro_f1", "eval/accuracy") if n in evaluated), None)
    panels = [(f"loss ({unit})" if unit else "loss", ["train/loss", "eval/loss"])]
    if chosen:
        panels.append((chosen.removeprefix("eval/").replace("_", " "), [chosen]))
    for name, title in {"features/std": "feature spread", "features/rankme": "effective rank"}.items():
        if series(name)[0]:
            panels.append((title, [name]))
    panels.append(("learning rate", ["train/learning_rate"]))
    alarms = sorted(
        (record["step"], name)
        for record in records
        for name in record
        if record[name] == 1.0 and name.startswith("alarm/")
    )
    if not series("train/loss")[0]:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            steps, values = series(name)
            if steps:
                marker = None if name.startswith("train/") and len(steps) > 1 else "o"  # one point has no line
                axes.plot(steps, values, label=name, marker=marker, markersize=3, linewidth=1.3)
        if "loss" in title and chance is not None:
            axes.axhline(chance, color="grey", linestyle="--", linewidth=1, label=f"chance {chance:.2f}")
        for step, name in alarms:
            axes.axvline(step, color="firebrick", linestyle=":", linewidth=1, label=name if "loss" in title else None)
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    path = Path(run) / "curves.png"
    write_figure(path, figure)
    return path


def require_wandb(project: str) -> None:
    """Refuses ``config.log.wandb`` where Weights & Biases is not installed.

    Raises:
      UserError: it is not; says how to install it.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"config.log.wandb={project!r} needs Weights & Biases: pip install 'sslx[wandb]'")


def _start_wandb(run: Path, folder: LocalPath, project: str, config: dict[str, Any] | None) -> Any:
    import wandb

    # The id stays in the folder, so that a resumed run goes on in the same chart and no other run does.
    path = Path(run) / "wandb_id"
    if not path.is_file():
        write_text(path, wandb.util.generate_id())
    name, key = absolute(run).name, path.read_text()
    return wandb.init(project=project, name=name, id=key, resume="allow", dir=str(folder), config=config)

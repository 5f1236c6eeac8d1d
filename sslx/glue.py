"""GLUE: fine-tunes a pretrained run on every task, several seeds each, and prints one table with the average.

  python -m sslx.glue --init=runs/bert_base --workdir=runs/glue --seeds=3

Every row is an ordinary run of sslx.finetune in a folder of the workdir's. The same command goes on where it was
interrupted, and runs again what failed; what is finished is not run again. The data are tfds:glue/TASK, which are
prepared before; the recipe is configs/finetune/glue.py:TASK, whose values change as usual, for all tasks:
--config.data.seq_len=256.

  --init=RUN                the run to start from; scratch:RUN is its baseline
  --tasks=cola,sst2         some tasks; default: all
  --seeds=3                 seeds 0, 1, 2 of every task
  --learning_rates=2e-5,3e-5,4e-5,5e-5
                            tries each and reports the best on the validation set, as BERT did; default: the recipe's
  --list                    prints the rows and ends; needs no --init
  --row=N                   runs row N alone; default in a job array: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX
  --report                  runs nothing; puts together what is finished

Scores are on the validation sets, since the labels of the test sets are not public. They are written to results.json.
To start RTE, MRPC and STS-B from MNLI: --init=runs/glue/mnli_0 --tasks=rte,mrpc,stsb --workdir=runs/glue_from_mnli
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from sslx import entry
from sslx.config import differences
from sslx.data.cache import cache_folder
from sslx.data.sources import open_collection
from sslx.entry import load_config
from sslx.errors import MissingField, UserError, choose
from sslx.runtime import display
from sslx.storage import is_remote, write_text
from sslx.sweep import Job, become, check_switches, own_flags_cut, row_index, run_jobs, told_failures
from sslx.tasks.glue import GLUE, GlueTask, average
from sslx.train.console import Console
from sslx.train.initialise import inherited
from sslx.train.metrics import read_metrics

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "finetune" / "glue.py"
# What the tasks and the flags decide, and what may be otherwise when the same command goes on.
DECIDED = ("init", "seed", "task.name", "data.source", "data.text_field", "data.pair_field", "data.label_field")
DECIDED += ("data.label_type", "data.eval_split", "data.test_split")
MAY_CHANGE = ("mesh", "hosts", "log", "data.cache_dir", "data.tfds_dir")

FLAGS = flags.FLAGS
TEXTS = {"init": "", "tasks": "", "learning_rates": ""}
for _name, _default in TEXTS.items():
    flags.DEFINE_string(_name, _default, "")
flags.DEFINE_integer("seeds", 1, "", lower_bound=1)
VALUED = (*TEXTS, "seeds", "config")


@dataclass(frozen=True)
class Row:
    """One run: a task, a seed and, if several are tried, a learning rate as it was written."""

    task: str
    seed: int
    learning_rate: str

    @property
    def name(self) -> str:
        return "_".join(filter(None, (self.task, self.learning_rate, str(self.seed))))


def main(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Lists, runs or reports GLUE in ``workdir``."""
    check_switches()
    # This process only starts others and adds up: an accelerator is for the rows.
    jax.config.update("jax_platforms", "cpu")
    if is_remote(workdir):
        raise UserError(f"--workdir is {workdir}; GLUE needs a folder on a disk that its rows share")
    file = config_flags.get_config_filename(FLAGS["config"])
    tasks = [choose(name, GLUE, "task of GLUE") for name in _listed(FLAGS.tasks)] or list(GLUE)
    rates = _listed(FLAGS.learning_rates)
    everything = [Row(task, seed, rate) for task in GLUE for rate in _rates(rates) for seed in range(FLAGS.seeds)]
    rows = [row for row in everything if row.task in tasks]
    written = config.to_dict()
    for key, (_, given) in differences(load_config(file).to_dict(), written).items():
        if key in DECIDED:
            raise UserError(f"config.{key} is {given!r}; with sslx.glue, --init, --seeds and --tasks decide it")
    console = Console()
    if FLAGS.list:
        console.table(f"{len(rows)} rows", [{"row": str(i), "name": row.name} for i, row in enumerate(rows)])
        return None
    if not FLAGS.init:
        raise UserError("no run given; expected --init=RUN, such as --init=runs/bert_base, or --init=scratch:RUN")
    inherited(written | {"init": FLAGS.init})  # that there is such a run
    shared = own_flags_cut(sys.argv[1:], VALUED)
    jobs = [_job(row, workdir, str(file), shared) for row in rows]
    index = None if FLAGS.report else row_index(FLAGS.row)
    if not FLAGS.report:
        _check_ready(tasks if index is None else [row.task for row in rows[index : index + 1]], written["data"])
    _check_same(workdir, {"init": FLAGS.init, "config": written}, write=not FLAGS.report)
    failures, stopped = {}, ""
    if not FLAGS.report:
        if index is not None:
            become(jobs, workdir, index, "GLUE")
            return None
        failures, stopped = run_jobs(jobs, workdir, console)
    if stopped:
        console.say(f"stopped on {stopped}; the same command goes on")
        return None
    found = results(everything, workdir)
    write_text(workdir / "results.json", json.dumps({"init": FLAGS.init} | found, indent=1) + "\n")
    _show(found, tasks, len(rates), workdir, console)
    if failures:
        raise UserError(told_failures(jobs, failures, workdir))
    return found


def row_scores(task: GlueTask, run: Path) -> dict[str, float] | None:
    """The published scores of a finished run as shares of 1, or None where it is not finished."""
    try:
        report = json.loads((Path(run) / "report.json").read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    # With test rows the report is on these, and the held-out ones are in the metrics of the checkpoint's step.
    at_step = next((r for r in reversed(read_metrics(run)) if r["step"] == report["step"] and "eval/loss" in r), {})
    values = at_step | report
    return {score.name: values[f"{score.rows}/{score.metric}"] for score in task.scores}


def results(rows: Sequence[Row], workdir: Path) -> dict[str, Any]:
    """Mean, standard deviation and values over the seeds, in percent, of each task's best learning rate; the average.

    A task appears once a run of it is finished, whether this command or an earlier one asked for it.
    """
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(row.task for row in rows):
        task, found = GLUE[name], {}
        for row in rows:
            if row.task == name and (scores := row_scores(task, Path(workdir) / row.name)) is not None:
                found.setdefault(row.learning_rate, []).append(scores)
        if not found:
            continue
        best = max(found, key=lambda rate: statistics.fmean(_main(task, scores) for scores in found[rate]))
        columns = {score.name: [100 * scores[score.name] for scores in found[best]] for score in task.scores}
        tasks[name] = {
            "learning_rate": float(best or task.learning_rate),
            "scores": {
                column: {
                    "mean": statistics.fmean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                    "seeds": values,
                }
                for column, values in columns.items()
            },
        }
    means = {name: {column: score["mean"] for column, score in task["scores"].items()} for name, task in tasks.items()}
    return {"split": "validation", "average": average(means), "tasks": tasks}


def _main(task: GlueTask, scores: dict[str, float]) -> float:
    """What a learning rate is chosen by: the mean of the task's columns in the average (WNLI has none there)."""
    return statistics.fmean(scores[s.name] for s in ([s for s in task.scores if s.averaged] or task.scores))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rates(given: list[str]) -> list[str]:
    for rate in given:
        try:
            fits = float(rate) > 0
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"--learning_rates: {rate!r} is no rate; expected numbers such as 2e-5,3e-5")
    return given or [""]


def _job(row: Row, workdir: Path, file: str, shared: Sequence[str]) -> Job:
    def result() -> str:
        scores = row_scores(GLUE[row.task], Path(workdir) / row.name)
        return ", ".join(f"{name} {100 * value:.1f}" for name, value in (scores or {}).items())

    values = [f"--config.init={FLAGS.init}", f"--config.seed={row.seed}"]
    values += [f"--config.optimizer.learning_rate={row.learning_rate}"] if row.learning_rate else []
    arguments = ("sslx.finetune", f"--config={file}:{row.task}", *shared, *values)
    return Job(row.name, arguments, result, f"seed {row.seed}")


def _check_ready(tasks: Sequence[str], data: dict[str, Any]) -> None:
    """Finds the data sets that are not prepared before anything runs.

    Raises:
      UserError: some are not; says how to prepare them and which tasks could run.
    """
    missing, reason = [], ""
    for name in dict.fromkeys(tasks):
        task, where = GLUE[name], {"cache_dir": cache_folder(data["cache_dir"]), "tfds_dir": data["tfds_dir"] or None}
        try:
            open_collection(f"tfds:glue/{name}", text_field=task.text, pair_field=task.pair, **where)
        except UserError as error:
            missing.append(name)
            # The names of the fields are the task's own.
            reason = reason or (error.said if isinstance(error, MissingField) else str(error))
    if missing:
        ready = [name for name in dict.fromkeys(tasks) if name not in missing]
        others = f"; {', '.join(missing[1:])} neither" if missing[1:] else ""
        run = f"--tasks={','.join(ready)} runs those that are ready" if ready else "no task is ready"
        raise UserError(f"{missing[0]}: {reason}{others}; {run}")


def _check_same(workdir: Path, document: dict[str, Any], *, write: bool) -> None:
    """Refuses to put rows of another start or recipe into one table."""
    path = Path(workdir) / "glue.json"
    if (Path(workdir) / "config.json").is_file():
        raise UserError(f"{workdir} is the folder of a run; give another --workdir")
    document = json.loads(json.dumps(document))
    if path.is_file():
        found = {
            key.removeprefix("config."): values
            for key, values in differences(json.loads(path.read_text(encoding="utf8")), document).items()
        }
        found = {key: values for key, values in found.items() if not key.startswith(MAY_CHANGE)}
        if found:
            told = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in found.items())
            raise UserError(f"{workdir} holds GLUE of another start or recipe: {told}; give another --workdir")
    elif not write:
        raise UserError(f"{workdir} holds nothing of GLUE to report; give the --workdir of an earlier command")
    else:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(document, indent=1) + "\n")


def _show(found: dict[str, Any], tasks: Sequence[str], rates: int, workdir: Path, console: Console) -> None:
    chosen = f"; each the best of {rates} learning rates on these very sets" if rates > 1 else ""
    rows = []
    for name in (name for name in GLUE if name in tasks or name in found["tasks"]):
        scores = found["tasks"].get(name, {}).get("scores", {})
        cell = " / ".join(
            f"{column} {score['mean']:.1f}" + ("" if score["sd"] is None else f" ± {score['sd']:.1f}")
            for column, score in scores.items()
        )
        rows.append({"task": GLUE[name].title, "score": cell or "not finished"})
    mean, lacking = found["average"], [name for name in GLUE if name not in found["tasks"] and name != "wnli"]
    rows.append({"task": "average", "score": f"{mean:.1f}" if mean is not None else f"needs {', '.join(lacking)}"})
    console.table(f"GLUE from {FLAGS.init}", rows)
    console.say(f"scores: in percent, on the validation sets, since the test labels are not public{chosen}")
    console.say("average: BERT's nine columns (MNLI twice, F1 of MRPC and QQP, Spearman of STS-B, no WNLI)")
    console.say(f"written: {display(workdir)}/results.json")


if __name__ == "__main__":
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in sys.argv[1:]):
        sys.argv.insert(1, f"--config={CONFIG}")
    entry.run(main)

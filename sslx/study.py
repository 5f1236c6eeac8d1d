"""Scaling studies: a grid of model sizes and budgets, fitted, drawn, and asked about a larger budget.

  python -m sslx.study --config=configs/bert_mlm.py --sizes=64,96,128,192 --budgets=500k,1M,2M,4M --workdir=runs/study

Every row of the grid is an ordinary run of sslx.main in a folder of the study's. The same command goes on where it was
interrupted, and runs again what failed; what is finished is not run again. Values of the experiment change as usual,
but for those that every row sets: steps, schedule, warm-up, layers, heads and evaluation.

  --sizes=64,96,128       widths; depth is width / aspect, heads are width / head_width, the MLP keeps its multiple
  --budgets=500k,1M,2M    tokens a row; or FLOPs, such as 1e13flops,3e13flops
  --held_out=256:4M       rows SIZE:BUDGET that run last and are not fitted, but compared with what the fit predicts
  --list                  prints the grid and ends
  --row=N                 runs row N alone; default in a job array: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX
  --report                runs nothing; fits and draws what is finished
  --predict=1e15flops     the best size for that many FLOPs; or SIZE:BUDGET, the loss there; with intervals
  --parameters=total      what N is: total | non_embedding
  --aspect=32             width / layers
  --head_width=32
  --rate_rule=sqrt        learning rate by width, from the config's at the config's width: sqrt | inverse | constant
  --warmup_share=0.1      warm-up, as a share of the row's steps

Job arrays: rows count from 0, so `sbatch --array=0-15` or an Indexed Job of 16 completions runs 16 rows, each in a
process of its own and all at once; --report puts them together. A queue that sets neither variable (TPU queued
resources), and a job whose index counts hosts and not rows (a JobSet of several hosts a row), gives --row. With --row,
--list and --report the --workdir may be on gs://.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import jax
import ml_collections
from absl import flags
from etils.epath import Path
from ml_collections import config_flags

from sslx import entry
from sslx.errors import UserError, choose
from sslx.scaling.family import Family, check_base, measure
from sslx.scaling.fit import shortage
from sslx.scaling.grid import Asked, Budget, Study, open_study, parse_budget, parse_points
from sslx.scaling.report import Findings, grid_table, repetition_note, report
from sslx.scaling.runs import job
from sslx.session import check_run, run_config
from sslx.storage import check, is_remote
from sslx.sweep import become, check_switches, own_flags_cut, row_index, run_jobs, told_failures
from sslx.train.console import Console

FLAGS = flags.FLAGS
TEXTS = {"sizes": "", "budgets": "", "held_out": "", "predict": "", "parameters": "total", "rate_rule": "sqrt"}
for _name, _default in TEXTS.items():
    flags.DEFINE_string(_name, _default, "")
flags.DEFINE_float("aspect", Family.aspect, "")
flags.DEFINE_integer("head_width", Family.head_width, "")
flags.DEFINE_float("warmup_share", 0.1, "")
VALUED = (*TEXTS, "aspect", "head_width", "warmup_share")
# Values of the config that every row sets, and what they follow from.
DECIDED = {
    "steps": "--budgets decide it",
    "optimizer.schedule_steps": "--budgets decide it",
    "optimizer.warmup_steps": "--warmup_share decides it",
    "model.layers": "--sizes and --aspect decide it",
    "model.heads": "--sizes and --head_width decide it",
    "eval.every_steps": "the last step is evaluated, on all held-out rows",
    "eval.batches": "the last step is evaluated, on all held-out rows",
    "eval.patience": "each trains for its whole budget",
}


def main(config: ml_collections.ConfigDict, workdir: Path) -> Findings | None:
    """Lists, runs or reports a study in ``workdir``."""
    check_switches()
    for key in config_flags.get_override_values(FLAGS["config"]):
        if key in DECIDED:
            raise UserError(f"--config.{key} is not to be given, since every row of a study sets it: {DECIDED[key]}")
    # This process only counts, starts others and fits: an accelerator is for the rows.
    jax.config.update("jax_platforms", "cpu")
    if not FLAGS.workdir:
        workdir = workdir.with_name(f"{workdir.name}_study")
    count = choose(FLAGS.parameters, ("total", "non_embedding"), "--parameters")
    family = Family(FLAGS.aspect, FLAGS.head_width, FLAGS.rate_rule)
    asked = Asked.parse(FLAGS.sizes, FLAGS.budgets, FLAGS.held_out, family, FLAGS.warmup_share)
    budgets, points = _parse_predictions(FLAGS.predict)
    written = config.to_dict()
    written |= dataclasses.asdict(run_config(written, "pretext"))
    check_base(written["model"])
    if written["init"] not in ("", "scratch"):
        raise UserError(f"config.init is {written['init']!r}; the rows of a study start from random parameters")
    for width, _ in points:
        family.model(width, written["model"])  # what cannot be predicted is told before anything runs
    index = None if FLAGS.list or FLAGS.report else row_index(FLAGS.row)
    if is_remote(workdir) and index is None and not FLAGS.list and not FLAGS.report:
        raise UserError(
            f"--workdir is {workdir}, where the rows cannot write what they print; expected --row=N for each row, then "
            "--report, or a folder on a disk"
        )
    check(workdir)
    if FLAGS.report and not (workdir / "study.json").exists():
        raise UserError(f"no study in {workdir}, so there is nothing to report; expected the --workdir of one")
    if index is None and not FLAGS.report:  # a mistake that every row would make is told once
        model = written["model"] | family.model(asked.sizes[0], written["model"])
        check_run(written | {"model": model}, "pretext")
    asks = (budgets or points) and not FLAGS.report
    if asks and (short := _shortage(open_study(workdir, asked, written, write=False), count)):
        raise UserError(f"--predict={FLAGS.predict}: {short}")  # rather than after hours of rows
    study = open_study(workdir, asked, written, write=not FLAGS.list and not FLAGS.report)
    shared = shared_arguments(sys.argv[1:])
    jobs = [job(row, workdir, shared) for row in study.rows]
    if index is not None:
        become(jobs, workdir, index, "the study")
        return None
    console = Console()
    if FLAGS.list:
        console.table(f"{len(study.rows)} rows (*: held out)", grid_table(study))
        _say_notes(study, count, console)
        return None
    failures, stopped = {}, ""
    if not FLAGS.report:
        _say_notes(study, count, console)
        failures, stopped = run_jobs(jobs, workdir, console)
    if stopped:
        console.say(f"stopped on {stopped}; the same command goes on")
        return None
    sized = [(measure(written, family, [width])[0][0], budget) for width, budget in points]
    try:
        found = report(study, workdir, count, budgets=budgets, points=sized, console=console)
    except UserError as error:
        if failures:  # they are the reason for what report is missing
            raise UserError(f"{told_failures(jobs, failures, workdir)}; {error}") from error
        raise
    if failures:
        raise UserError(told_failures(jobs, failures, workdir))
    return found


def shared_arguments(arguments: Sequence[str]) -> list[str]:
    """What the study hands on to its rows: everything but its own flags."""
    return own_flags_cut(arguments, VALUED)


def _parse_predictions(text: str) -> tuple[list[Budget], list[tuple[int, Budget]]]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    budgets = [parse_budget(part) for part in parts if ":" not in part]
    for budget in budgets:
        if budget.unit != "flops":
            raise UserError(f"--predict={budget} is no FLOP budget; expected one such as 1e15flops, or SIZE:BUDGET")
    return budgets, parse_points(",".join(part for part in parts if ":" in part), "predict")


def _say_notes(study: Study, count: str, console: Console) -> None:
    if note := repetition_note(study):
        console.say(note)
    if note := _shortage(study, count):
        console.say(f"note: {note}")


def _shortage(study: Study, count: str) -> str:
    return shortage([row.size.parameters(count) for row in study.fitted], [row.tokens for row in study.fitted])


if __name__ == "__main__":
    entry.run(main)

"""Fine-tunes: ``python -m sslx.finetune --config=configs/finetune/text_classification.py --config.init=runs/bert_mlm``.

The encoder, its architecture and its tokenizer come from the run that ``config.init`` names, or from a folder of
published weights (``config.json``, ``model.safetensors`` and the tokenizer's files, as transformers writes them).
``config.init=scratch`` starts from random parameters of ``config.model``; ``config.init=scratch:RUN`` takes
architecture and tokenizer from the run and nothing else, which makes it the baseline of that run.
"""

from __future__ import annotations

import json

import ml_collections
from etils.epath import Path

from sslx import entry
from sslx.errors import UserError
from sslx.runtime import display, is_first_process
from sslx.session import Session, hosts_config, train
from sslx.storage import write_figure, write_text
from sslx.train.hosts import joined
from sslx.train.initialise import from_scratch, inherited
from sslx.train.sharding import on_mesh

FEW = 100  # rows, below which one of them is more than a point


def main(config: ml_collections.ConfigDict, workdir: Path) -> Session:
    """Fine-tunes into ``workdir``, selects on the validation rows and reports on the test rows."""
    written = config.to_dict()
    init = written.get("init", "")
    if not init and "task" in written:  # of other configs, `train` says what is wrong
        raise UserError("config.init is empty; expected a run folder (runs/bert_mlm), or 'scratch' for a baseline")
    if init.startswith("scratch") and not from_scratch(init) and not Path(init).is_dir():
        raise UserError(f"config.init is {init!r}; expected a run folder, 'scratch' or 'scratch:RUN'")
    title = f"sslx: {written.get('task', {}).get('name', '')} on {written.get('data', {}).get('source', '')}"
    with joined(hosts_config(written)):
        written, tokenizer = inherited(written, entry.given_keys())
        session = train(written, workdir, part="task", tokenizer=tokenizer, title=title)
        if not session.trained.signal:
            _report(session, workdir)
    return session


def _report(session: Session, workdir: Path) -> None:
    """Evaluates the best checkpoint on the test rows (the held-out rows if there are none) and writes what came out."""
    trainer, checkpoints, say = session.trainer, session.trained.checkpoints, session.console.say
    best = checkpoints.best_step()
    restored = checkpoints.restore(trainer.program.abstract, step=best, say=say) if best is not None else None
    state = restored[0] if restored else session.trained.state
    rows, split = (session.data.test, "test") if session.data.test is not None else (session.data.eval, "eval")
    if split == "eval":
        say("note: no config.data.test_split, so the report is on the held-out rows (eval), which chose the checkpoint")
    if len(rows) < FEW:
        say(f"note: {len(rows)} rows are few to judge by: each is {100 / len(rows):.0f} points of what is right")
    with on_mesh(trainer.program.mesh):
        metrics, predictions = session.trained.evaluator(state.params, state.state, rows)
    report = session.objective.report(predictions)
    values = {"step": int(state.step), "split": split, "init": session.written["init"]}
    values |= {f"{split}/{name}": value for name, value in metrics.items()} | report.values
    if is_first_process():
        write_text(workdir / "report.json", json.dumps(values, indent=2) + "\n")
        for name, figure in report.figures.items():
            write_figure(workdir / f"{name}.png", figure)
    say(report.text)
    summary = "  ".join(f"{split}/{name} {value:.4f}" for name, value in metrics.items())
    say(f"best checkpoint: step {int(state.step)}  {summary}")
    pictures = ", ".join(f"{display(workdir)}/{name}.png" for name in ("curves", *report.figures))
    say(f"written: {display(workdir)}/report.json, {pictures}")


if __name__ == "__main__":
    entry.run(main)

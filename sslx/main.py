"""Pretrains: ``python -m sslx.main --config=configs/bert_mlm.py --workdir=runs/bert_mlm``.

The same command resumes a run that was interrupted, and goes on with a finished one if ``--config.steps`` is raised.
"""

from __future__ import annotations

import ml_collections
from etils.epath import Path

from sslx import entry
from sslx.runtime import display
from sslx.session import Session, hosts_config, train
from sslx.train.hosts import joined
from sslx.train.initialise import inherited


def main(config: ml_collections.ConfigDict, workdir: Path) -> Session:
    """Pretrains into ``workdir`` and says what came out and what to run next."""
    written = config.to_dict()
    title = f"sslx: {written.get('pretext', {}).get('name', '')} on {written.get('data', {}).get('source', '')}"
    with joined(hosts_config(written)):
        written, tokenizer = inherited(written)
        session = train(written, workdir, part="pretext", tokenizer=tokenizer, title=title)
        if not session.trained.signal:
            _conclude(session, workdir)
    return session


def _conclude(session: Session, workdir: Path) -> None:
    say, trained, run = session.console.say, session.trained, display(workdir)
    if not trained.metrics:
        step, steps = int(trained.state.step), session.written["steps"]
        more = "--config.steps" if step >= steps else "--config.eval.patience"
        say(f"the run in {run} ended at step {step}; raise {more} to go on")
    else:
        loss, chance = trained.metrics["eval/loss"], session.objective.chance(session.data.statistics)
        beside = ""
        if chance is not None:
            away = f"{abs(chance - loss):.3f} {session.objective.unit}".strip()
            beside = f", {away} {'below' if loss < chance else 'above'} chance ({chance:.3f})"
        say(f"done: held-out loss {loss:.4f}{beside}; curves in {run}/curves.png")
    task = {"text": "text_classification", "images": "image_classification"}[session.objective.modality]
    say("next:")
    say(f"  tensorboard --logdir={run}")
    say(f"  python -m sslx.finetune --config=configs/finetune/{task}.py --config.init={run}")


if __name__ == "__main__":
    entry.run(main)

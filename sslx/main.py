"""Pretrains: ``python -m sslx.main --config=configs/bert_mlm.py --workdir=runs/bert_mlm``.

The same command resumes a run that was interrupted, and goes on with a finished one if ``--config.steps`` is raised.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

import ml_collections
from etils.epath import Path

from sslx import entry
from sslx.entry import load_config
from sslx.runtime import display
from sslx.session import Session, hosts_config, train
from sslx.train.hosts import joined
from sslx.train.initialise import inherited
from sslx.train.run_folder import has_checkpoint, read_config

FINETUNE = LocalPath(__file__).parents[1] / "configs" / "finetune"
FINETUNES = {"text": "text_classification.py", "images": "image_classification.py"}  # by modality


def main(config: ml_collections.ConfigDict, workdir: Path) -> Session:
    """Pretrains into ``workdir`` and says what came out and what to run next."""
    written = config.to_dict()
    title = f"sslx: {written.get('pretext', {}).get('name', '')} on {written.get('data', {}).get('source', '')}"
    with joined(hosts_config(written)):
        written, tokenizer = inherited(written, entry.given_keys())
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
    say("next:")
    say(f"  tensorboard --logdir={shlex.quote(run)}")
    finetune = FINETUNE / FINETUNES[session.objective.modality]
    if finetune.is_file():  # a package that was installed elsewhere has no configs beside it
        labelled = "eval_label_entropy" in session.data.statistics
        say(f"  python -m sslx.finetune {shlex.join(_finetune_flags(finetune, session.written, workdir, labelled))}")
        usual = load_config(finetune).data.source
        if not labelled and session.written["data"]["source"] != usual:
            say(f"    (on {usual}; {display(finetune)}:data=SOURCE takes labelled data of your own)")


def _finetune_flags(finetune: LocalPath, written: Mapping[str, Any], workdir: Path, labelled: bool) -> list[str]:
    """Flags with which fine-tuning from the run in ``workdir`` works as they stand, on its data if they have labels."""
    run, source, model = display(workdir), written["data"]["source"], written["model"]
    own = labelled and source != load_config(finetune).data.source and "," not in source  # which ends an argument
    argument = f"data={source}" if own else ""
    usual, usually = Path("runs") / finetune.stem, load_config(finetune, argument)
    given = [f"--config={display(finetune)}{':' * own}{argument}", f"--config.init={run}"]
    if "seq_len" in usually.data and model.get("positions") == "learned" and model["max_length"] < usually.data.seq_len:
        given.append(f"--config.data.seq_len={model['max_length']}")
    for name in ("image_size", "channels"):
        if name in written["data"] and written["data"][name] != usually.data[name]:
            given.append(f"--config.data.{name}={written['data'][name]}")
    if "drop_path" in usually.task and "drop_path" not in model:
        given.append("--config.task.drop_path=0")
    if usually.optimizer.layer_decay != 1 and "layers" not in model:  # no stack that rates could fall along
        given.append("--config.optimizer.layer_decay=1")
    if has_checkpoint(usual) and read_config(usual).get("init") != run:
        given.append(f"--workdir={usual}_{workdir.name}")
    return given


if __name__ == "__main__":
    entry.run(main)

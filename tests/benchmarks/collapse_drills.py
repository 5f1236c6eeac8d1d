"""Whether each method of joint embedding raises its alarm where it is known to collapse, and none where it is not.

Each method trains twice on scikit-learn's digits (16 x 16 pixels): as its config has it but for size, and with the one
change that its paper or arithmetic says it cannot bear. Evaluated every 20 steps; an alarm is raised by its sign in
five evaluations in succession, since good runs of clustering are near chance for some eighty steps.

    python tests/benchmarks/collapse_drills.py                       # a table; a few minutes on two cores
    python tests/benchmarks/collapse_drills.py --methods simsiam dino --steps=400
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from sslx import main as pretrain
from sslx.entry import load_config
from sslx.errors import Alarmed
from sslx.train.metrics import read_metrics

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL = {
    "data.source": "digits",
    "data.image_size": 16,
    "model.image_size": 16,
    "batch_size": 64,
    "eval.every_steps": 20,
    "alarms.evaluations": 5,
    "eval.batches": 2,
    "checkpoint.every_steps": 1000,
    "diagnostics.rows": 128,
    "optimizer.warmup_steps": 10,
}
LOCAL = {"pretext.views.local_size": 8}
NO_TEACHER = {"pretext.momentum.start": 0.0, "pretext.momentum.end": 0.0}
# By method: what keeps it running at this size, the change that it cannot bear, and the alarms that are right for that.
DRILLS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "simclr": ({}, {"pretext.temperature": 100.0}, {"no_learning"}),
    "moco_v3": ({}, {"pretext.temperature": 100.0}, {"no_learning"}),
    "byol": (
        {},
        {"pretext.predictor.layers": 0, **NO_TEACHER, "optimizer.weight_decay": 0.0},
        {"collapse", "low_rank"},
    ),
    "simsiam": ({}, {"pretext.stop_gradient": False}, {"collapse", "low_rank"}),
    "barlow_twins": ({}, {"pretext.redundancy": 0.0}, {"low_rank", "collapse"}),
    "vicreg": ({}, {"pretext.variance": 0.0}, {"collapse"}),
    "swav": (LOCAL, {"pretext.balance": False}, {"peaked", "collapse", "low_rank"}),
    "dino": (LOCAL, {"pretext.balance": "none"}, {"peaked", "uniform", "collapse"}),
    "ibot": (LOCAL, {"pretext.balance": "none"}, {"peaked", "uniform", "collapse"}),
    "ijepa": ({}, NO_TEACHER, {"collapse", "low_rank"}),
    "data2vec": ({}, NO_TEACHER, {"collapse", "low_rank"}),
    "infomax": ({}, {"optimizer.learning_rate": 1.0}, {"no_learning", "collapse", "low_rank"}),
}


def alarms_of(
    method: str, changes: dict[str, Any], steps: int, folder: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """The step at which each alarm was raised, and the last evaluation's numbers."""
    config = load_config(CONFIGS / f"{method}.py")
    with config.unlocked():
        config.update_from_flattened_dict({**SMALL, "steps": steps, **changes})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Alarmed):
        pretrain.main(config, epath.Path(folder))
    records = read_metrics(folder)
    raised: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("alarm/") and value == 1.0:
                raised.setdefault(name.removeprefix("alarm/"), record["step"])
    last = [record for record in records if "eval/loss" in record][-1]
    shown = ("eval/loss", "features/std", "features/rankme", "eval/projection_std", "eval/projection_rank")
    shown += ("eval/projection_deviation", "eval/target_std")
    return raised, {name.rpartition("/")[2]: last[name] for name in shown if name in last}


def main() -> None:
    """Runs the drills and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=DRILLS, default=list(DRILLS))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    for method in arguments.methods:
        given, bad, right = DRILLS[method]
        for kind, changes in (("good", given), ("bad", {**given, **bad})):
            with tempfile.TemporaryDirectory() as folder:
                raised, last = alarms_of(method, changes, arguments.steps, Path(folder) / "run")
            well = not raised if kind == "good" else bool(right & raised.keys())
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in last.items())
            said = ", ".join(f"{name} at step {step}" for name, step in raised.items()) or "no alarm"
            print(f"{'ok  ' if well else 'NOT '} {method:<13} {kind:<4}  {said:<40}  {numbers}", flush=True)


if __name__ == "__main__":
    main()

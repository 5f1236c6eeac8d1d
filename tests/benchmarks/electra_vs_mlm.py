"""ELECTRA and masked language modelling at equal FLOPs on ``python_docs``: what fine-tuning makes of each.

Both pretrain the encoder of ``configs/bert_mlm.py``'s default. MLM takes its steps; ELECTRA as many as cost the same
model FLOPs (`Objective.flops`: forward and backward of all players, the masked-token heads on picked positions), with
the same rows a step and kind of schedule, each at the learning rate of its own config.
``configs/finetune/text_classification.py`` then fine-tunes each, and ``none``, which has the architecture and the
tokenizer and was not pretrained. A row of the table is one seed of one method; a seed sets the pretraining, the order
of its data and the fine-tuning.

    python tests/benchmarks/electra_vs_mlm.py --workdir=runs/electra_vs_mlm
    python tests/benchmarks/electra_vs_mlm.py --workdir=/tmp/smoke --steps=20    # to see that it runs

Started again with the same workdir, it takes finished rows from ``rows.jsonl`` and goes on with the run it was in.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from sslx import finetune
from sslx import main as pretrain
from sslx.entry import load_config
from sslx.session import run_config
from sslx.train.initialise import objective_class

CONFIGS = Path(__file__).parent.parent.parent / "configs"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlm": ("bert_mlm", {}),
    "electra 1/4": ("electra", {"pretext.generator_width": 0.25}),
    "electra 1/2": ("electra", {"pretext.generator_width": 0.5}),
    "none": ("bert_mlm", {}),  # no pretraining: the architecture and tokenizer of MLM's run, random parameters
}


def config_of(method: str, steps: int, seed: int) -> ml_collections.ConfigDict:
    """The pretraining config of a method: MLM's default with another pretext task and the rate tuned for that."""
    name, changes = METHODS[method]
    config, other = load_config(CONFIGS / "bert_mlm.py"), load_config(CONFIGS / f"{name}.py")
    with config.unlocked():
        config.pretext = other.pretext
        config.optimizer.learning_rate = other.optimizer.learning_rate
        config.update_from_flattened_dict(changes | {"seed": seed, "steps": steps, "eval.examples": 0})
        _shorten(config, steps)
    return config


def _shorten(config: ml_collections.ConfigDict, steps: int) -> None:
    """Makes warm-up and evaluation fit a run of a few steps."""
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
    if steps < config.eval.every_steps:
        config.eval.every_steps = steps
        config.eval.batches = 2


def flops_of(config: ml_collections.ConfigDict) -> float:
    """Model FLOPs of one step."""
    written = config.to_dict()
    objective, row = objective_class(written).abstract(written)
    batch = run_config(written, "pretext").batch_size
    return objective.flops({name: (batch, *leaf.shape) for name, leaf in row.items()})


def equal_steps(method: str, steps: int) -> int:
    """Steps of a method that cost what ``steps`` of MLM cost."""
    return max(2, round(steps * flops_of(config_of("mlm", steps, 0)) / flops_of(config_of(method, steps, 0))))


def settings(method: str, steps: int, finetune_steps: int | None) -> list[Any]:
    """What a row was made with; a finished one is taken only where it is the same."""
    config = config_of(method, steps, 0)
    return [steps, finetune_steps, config.optimizer.learning_rate, config.pretext.get("mask_ratio")]


def one_row(method: str, seed: int, steps: int, finetune_steps: int | None, folder: Path) -> dict[str, Any]:
    """Pretrains and fine-tunes; returns the row."""
    name = f"{method.replace(' ', '_').replace('/', '_')}_{seed}"
    config = config_of(method, equal_steps(method, steps), seed)
    pretrained = folder / f"pretrain_{'mlm_' + str(seed) if method == 'none' else name}"
    session = pretrain.main(config, epath.Path(pretrained))  # of a finished run, nothing more
    if session.trained.signal:
        raise SystemExit(1)  # the same command goes on with it
    tuned = load_config(CONFIGS / "finetune" / "text_classification.py")
    tuned.init, tuned.seed = f"{'scratch:' if method == 'none' else ''}{pretrained}", seed
    if finetune_steps:
        tuned.steps = finetune_steps
        _shorten(tuned, finetune_steps)
    workdir = folder / f"finetune_{name}"
    if finetune.main(tuned, epath.Path(workdir)).trained.signal:
        raise SystemExit(1)
    report = json.loads((workdir / "report.json").read_text(encoding="utf8"))
    return {
        "method": method,
        "seed": seed,
        "steps": 0 if method == "none" else config.steps,
        "teraflops": 0.0 if method == "none" else config.steps * flops_of(config) / 1e12,
        "settings": settings(method, steps, finetune_steps),
        "macro_f1": report["test/macro_f1"],
        "accuracy": report["test/accuracy"],
    }


def table(rows: list[Mapping[str, Any]]) -> str:
    """A Markdown table of mean and standard deviation by method."""
    lines = [
        "| pretraining | steps | TFLOPs | test macro-F1 by seed | mean ± sd | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        found = [row for row in rows if row["method"] == method]
        if found:
            scores, hits = ([row[name] for row in found] for name in ("macro_f1", "accuracy"))
            each = ", ".join(f"{score:.3f}" for score in scores)
            cells = (
                method,
                f"{found[0]['steps']:,}",
                f"{found[0]['teraflops']:.1f}",
                each,
                _spread(scores),
                _spread(hits),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main() -> None:
    """Makes the rows that are missing and prints the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of MLM; default: its config's")
    parser.add_argument("--finetune-steps", type=int, help="default: its config's, or --steps where that is given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    steps = arguments.steps or load_config(CONFIGS / "bert_mlm.py").steps
    finetune_steps = arguments.finetune_steps or arguments.steps
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    file = arguments.workdir / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []
    if any(row["settings"] != settings(row["method"], steps, finetune_steps) for row in rows):
        parser.error(f"{file} holds rows of other --steps or of other configs; expected another --workdir")
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) in done:
                continue
            rows.append(one_row(method, seed, steps, finetune_steps, arguments.workdir))
            with file.open("a", encoding="utf8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
            print(table(rows), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

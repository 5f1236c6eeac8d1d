"""The README's table and growth plot, by compiling: BERT base and large on pods that are not here.

    pip install -e ".[plan]" && python tests/benchmarks/plan_table.py --out=plans

Every row is the real training and evaluation step: rows of 512 tokens, 4,096 rows a step over all chips, bfloat16.
``sslx.planning.search`` ranks the meshes and compiles the first ``--compile_at_most`` of them (and, where one does not
fit, what makes it fit); the row is the fastest by prediction. A row is written to ``--out`` when it is done and is not
made again. ``--growth`` compiles BERT small with all its state split (fsdp over all chips) for 8 to 512 chips of v5p,
16 rows a chip, and draws what a chip holds and sends. It takes a processor for minutes a row; use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from sslx.entry import load_config
from sslx.planning import search, topology
from sslx.planning.compilation import plan

CONFIG = Path(__file__).resolve().parent.parent.parent / "configs" / "bert_mlm.py"
SIZES, PODS = ("base", "large"), ("v5e-256", "v5p-128", "v6e-256")
ROWS, ROWS_A_CHIP, LENGTH = 4096, 16, 512
GROWTH = ("v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x8", "v5p:8x8x8")
# In parameter bytes (float32), on any number of chips: two gathers and a scatter of each parameter. From 128 chips of
# this model on, whose shards are four columns wide, the compiler makes all-reduces of them, which send twice as much.
BOUND = 6.0


def written(size: str, **changes: Any) -> dict[str, Any]:
    """The config of a size at 512 tokens in bfloat16."""
    config = load_config(CONFIG, size).to_dict()
    return search.changed(config, {"data.seq_len": LENGTH, "model.dtype": "bfloat16", **changes})


def kept(path: Path, make) -> dict[str, Any]:
    """What ``make`` returned before, or returns now."""
    if not path.is_file():
        path.write_text(json.dumps(make(), indent=2) + "\n", encoding="utf8")
    return json.loads(path.read_text(encoding="utf8"))


def table(folder: Path, compile_at_most: int) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | topology | mesh | remat, micro-batches | HBM a chip | sent by a chip and step | MFU, all overlapped "
        "| MFU, no overlap | bound | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for pod in PODS:
            where = topology.tpu(pod)

            def best(size: str = size, where: topology.Topology = where) -> dict[str, Any]:
                return search.search(written(size, batch_size=ROWS), where, compile_at_most=compile_at_most)[0].json()

            row = kept(folder / f"{size}_{pod}.json", best)
            mesh = " x ".join(f"{axis} {count}" for axis, count in row["mesh"].items() if count > 1)
            times, settings = row["roofline"], row["settings"]
            lines.append(
                f"| BERT {size} | {pod} ({row['chips']} chips) | {mesh} | {settings['remat']}, "
                f"{settings['micro_batches']} | {row['memory']['peak'] / 2**30:.2f} of {row['hbm_bytes'] / 2**30:.0f} "
                f"GiB | {row['ici_bytes'] / 2**20:.0f} MiB | {times['mfu']:.0%} | {times['serial_mfu']:.0%} | "
                f"{times['bound']} | {row['compile_seconds']:.0f} s |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def growth(folder: Path) -> None:
    """Compiles one config at a fixed batch a chip for ever more chips, and draws it.

    Raises:
      AssertionError: a chip sends more than the bound, or holds more state than its share.
    """
    plans = []
    for shape in GROWTH:
        where = topology.tpu(shape)
        chips = len(where.devices)
        config = written("small", batch_size=ROWS_A_CHIP * chips, **{"mesh.data": 1, "mesh.fsdp": chips})
        name = f"growth_{shape.replace(':', '_')}.json"
        one = kept(folder / name, lambda config=config, where=where: plan(config, where, evaluation=False).json())
        state = one["parameter_bytes"] + one["optimizer_bytes"]
        print(
            f"{chips:4} chips  state {state / 2**20:8.1f} MiB  peak {one['memory']['peak'] / 2**20:8.1f} MiB  "
            f"sent {one['ici_bytes'] / 2**20:8.1f} MiB, {one['ici_bytes'] / 4 / one['parameters']:.2f} x parameters",
            flush=True,
        )
        plans.append(one)
    _draw(plans, folder / "growth.png")
    for one in plans:
        assert one["ici_bytes"] <= BOUND * 4 * one["parameters"]
        # Norms and biases are whole on every chip: under 1 % of the parameters.
        assert one["parameter_bytes"] + one["optimizer_bytes"] <= 12.1 * one["parameters"] * (1 / one["chips"] + 0.01)


def _draw(plans: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chips = [one["chips"] for one in plans]
    mebi = 2**20
    figure, (held, sent) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    held.plot(chips, [one["memory"]["peak"] / mebi for one in plans], "o-", label="peak of the training step")
    state = [(one["parameter_bytes"] + one["optimizer_bytes"]) / mebi for one in plans]
    held.plot(chips, state, "s-", label="parameters and optimizer state")
    held.set(title="HBM of a chip", ylabel="MiB", ylim=(1, None), yscale="log")
    sent.plot(chips, [one["ici_bytes"] / mebi for one in plans], "o-", label="sent by a chip in a step")
    bound = [BOUND * 4 * one["parameters"] / mebi for one in plans]
    sent.plot(chips, bound, "--", color="grey", label=f"bound: {BOUND:g} x parameter bytes")
    sent.set(title="collectives", ylabel="MiB", ylim=(0, None))
    for axes in (held, sent):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [str(count) for count in chips])
        axes.set_xlabel("chips")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is sent else "lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("plans"), help="folder of the rows made so far")
    parser.add_argument("--compile_at_most", type=int, default=2, help="meshes to compile a row")
    parser.add_argument("--growth", action="store_true", help="the growth study instead of the table")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.growth:
        growth(arguments.out)
    else:
        (arguments.out / "table.md").write_text(table(arguments.out, arguments.compile_at_most) + "\n")


if __name__ == "__main__":
    main()

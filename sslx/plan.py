"""Plans without the hardware: ``python -m sslx.plan --config=configs/bert_mlm.py:base --topology=v5e:16x16``.

Compiles the real training and evaluation step for TPU slices that are not here (pip install 'sslx[plan]') and tells
memory, collectives and the time that the chips' published rates allow. Values of the experiment change as usual.

  --topology=NAME         v5e:16x16, v5p:4x4x8, v6e:8x8, or as Cloud sells them: v5e-256, v5p-128 (cores), v6e-64
  --slices=N              slices, connected by the data-centre network; default: 1
  --devices=N             simulated CPU devices instead of a topology, at most 2,048; memory and collectives only
  --search                tries meshes, micro-batches and rematerialisation; prints the flags of the best
  --compile_at_most=N     meshes that --search compiles; default: 4
  --json=FILE             writes the numbers too

Exit codes: 0 it fits, 1 it does not (the report says so) or the planning was stopped, 2 the config or a flag cannot be.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from sslx import entry
from sslx.errors import UserError
from sslx.planning import report, search, topology
from sslx.planning.compilation import Plan, plan
from sslx.train.console import plain
from sslx.train.initialise import inherited
from sslx.train.signals import end_on_signals

MOST_SIMULATED = 2048  # beyond it, XLA takes the devices of a CPU for those of another process


def main(config: ml_collections.ConfigDict, workdir: Path) -> list[Plan]:
    """Plans as the flags say, prints, and returns the plans, best first."""
    given = flags.FLAGS
    if bool(given.topology) == (given.devices is not None):
        raise UserError("give one of --topology=v5e-256 and --devices=8")
    if given.devices is not None and given.devices < 1:
        raise UserError(f"--devices is {given.devices}; expected at least 1")
    if given.devices and given.devices > MOST_SIMULATED:
        raise UserError(
            f"--devices is {given.devices}; expected at most {MOST_SIMULATED} simulated devices, or a --topology"
        )
    if given.devices and given.slices != 1:
        raise UserError("--slices is for a --topology; simulated CPU devices are one slice")
    if flags.FLAGS["compile_at_most"].present and not given.search:
        raise UserError("--compile_at_most is for --search, which is not given")
    target = Path(given.json) if given.json else None
    if target and not target.parent.is_dir():
        raise UserError(f"cannot write {target}: no folder {target.parent}")
    if target and target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder; expected a file, such as {target / 'plan.json'}")
    where = topology.tpu(given.topology, given.slices) if given.topology else _simulated(given.devices)
    end_on_signals()  # once the compiler is loaded, which takes the signals to itself
    written, _ = inherited(config.to_dict(), entry.given_keys())
    console = plain(highlight=False)
    if given.search:
        plans = search.search(
            written,
            where,
            compile_at_most=given.compile_at_most,
            say=lambda line: console.print(line, soft_wrap=True),
        )
        written = search.as_planned(written, plans[0])
    else:
        plans = [plan(written, where)]
    report.show(plans[0], where, written, console, searched=given.search)
    if given.search:
        report.ranking(plans, console)
    if target:
        values: Any = [one.json() for one in plans] if given.search else plans[0].json()
        target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
    return plans


def _simulated(count: int) -> topology.Topology:
    # JAX takes the number from one place only, and before its first device is made.
    given = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.pop("XLA_FLAGS", "")).strip()
    if given:  # of blanks alone XLA makes the name of a file
        os.environ["XLA_FLAGS"] = given
    jax.config.update("jax_num_cpu_devices", count)
    return topology.simulated(count)


def _main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    best = main(config, workdir)[0]
    if not best.fits or best.eval_memory is None:
        sys.exit(1)


def _define_flags() -> None:
    flags.DEFINE_string("topology", "", "TPU slice to plan for")
    flags.DEFINE_integer("slices", 1, "Slices, connected by the data-centre network", lower_bound=1)
    flags.DEFINE_integer("devices", None, "Simulated CPU devices")
    flags.DEFINE_boolean("search", False, "Try meshes, micro-batches and rematerialisation")
    flags.DEFINE_integer("compile_at_most", 4, "Meshes that --search compiles", lower_bound=1)
    flags.DEFINE_string("json", "", "File to write the numbers to")


if __name__ == "__main__":
    # What is compiled for a TPU that is not there is written to the cache and cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    # Compiling for a TPU needs none, and looking for one would take time or someone else's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    _define_flags()
    entry.run(_main, needs_workdir=False)

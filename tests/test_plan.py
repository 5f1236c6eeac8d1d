"""The command line of ``sslx.plan``: one line for what cannot be, a report and JSON for what can."""

from __future__ import annotations

import functools
import json
import signal
import time

import pytest
from entries import until

CONFIG = """
import sys
from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig

if "{hidden}":
    sys.modules["{hidden}"] = None

def get_config():
    config = experiment(
        data=TextConfig(source="jsonl:not_read.jsonl", seq_len=16, vocab_size=200),
        model=BertConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=32),
        pretext=MaskedLanguageModelConfig(),
    )
    config.steps, config.batch_size, config.optimizer.warmup_steps = 4, 8, 1
    return config
"""

# A chip with less memory than any step needs.
SMALL_CHIP = """
import dataclasses
from sslx.train.chips import CHIPS

CHIPS["TPU v5 lite"] = dataclasses.replace(CHIPS["TPU v5 lite"], hbm_bytes=1 << 17)
"""

OUTSIDE = """
from sslx.objective import Objective
from sslx.pretext.mlm import MaskedLanguageModel

class Unplanned(MaskedLanguageModel):
    abstract = classmethod(Objective.abstract.__func__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    (folder / "pretrain.py").write_text(CONFIG.format(hidden=""))
    (folder / "no_compiler.py").write_text(CONFIG.format(hidden="libtpu"))
    (folder / "small_chip.py").write_text(SMALL_CHIP + CONFIG.format(hidden=""))
    (folder / "outside.py").write_text(OUTSIDE)
    return folder


@pytest.fixture(scope="module")
def run(entries, folder):
    """Runs ``python -m sslx.plan`` with these arguments."""
    return functools.partial(entries.run, "plan", folder=folder)


def test_what_cannot_be_planned_is_said_in_one_line(run, folder):
    cases = {
        "": "give one of --topology=v5e-256 and --devices=8",
        "--topology=v5e-4 --devices=8": "give one of --topology=v5e-256 and --devices=8",
        "--topology=v5e:16x15": "unknown topology 'v5e:16x15'; did you mean 'v5e:16x16'?",
        "--devices=4 --slices=2": "--slices is for a --topology",
        "--devices=-1": "--devices is -1; expected at least 1",
        "--devices=0": "--devices is 0; expected at least 1",
        "--devices=100000": "--devices is 100000; expected at most 2048 simulated devices, or a --topology",
        "--topology=v5e-5": "unknown topology 'v5e-5'; did you mean 'v5e-4'?",
        "--devices=8 --config.mesh.data=3": "config.mesh is data=3",
        "--devices=8 --config.batch_size=12": "12 does not divide over 8 devices",
        "--devices=8 --config.data.seq_len=64": "seq_len 64 is longer than config.model.max_length 32",
        "--devices=8 --search": "expected a --topology",
        "--devices=8 --compile_at_most=2": "--compile_at_most is for --search",
        "--devices=8 --json=.": "cannot write .: it is a folder; expected a file, such as plan.json",
        "--devices=8 --json=nowhere/plan.json": "cannot write nowhere/plan.json: no folder nowhere",
        "--devices=8 --config.pretext.name=outside:Unplanned": "Unplanned cannot be planned",
        "--devices=8 --config.pretext.name=mlmm": "did you mean 'mlm'?",
    }
    failures = []
    for arguments, expected in cases.items():
        code, _, said = run("--config=pretrain.py", *arguments.split())
        if code != 2 or said.count("\n") != 1 or not said.startswith("error: ") or expected not in said:
            failures.append(f"{arguments}\n  exit {code}: {said}\n  expected: {expected}")
    assert not failures, "\n".join(failures)
    assert not (folder / "nowhere").exists()


def test_a_missing_compiler_names_its_extra(run):
    code, _, said = run("--config=no_compiler.py", "--topology=v5e-4")
    assert code == 2
    assert said == "error: planning for a TPU needs its compiler, libtpu; pip install 'sslx[plan]'\n"


def test_a_plan_for_simulated_devices_is_printed_and_written(run, folder):
    code, said, errors = run("--config=pretrain.py", "--devices=4", "--config.mesh.fsdp=2", "--json=plan.json")
    assert code == 0, errors
    assert "4 simulated CPU devices" in said
    assert "mesh data=2 x fsdp=2 x sequence=1 x tensor=1; batch_size=8, micro_batches=1, remat=none" in said  # one line
    assert "collectives of one training step" in said
    assert "sent between devices" in said
    assert "ICI" not in said
    assert "DCN" not in said
    values = json.loads((folder / "plan.json").read_text())
    assert values["chips"] == 4
    assert values["mesh"]["fsdp"] == 2
    assert values["ici_bytes"] > 0


def test_a_plan_that_does_not_fit_is_written_and_ends_with_1(run, folder):
    code, said, errors = run("--config=small_chip.py", "--topology=v5e-4", "--json=refused.json")
    assert (code, errors) == (1, "")
    assert "does not fit" in said
    assert json.loads((folder / "refused.json").read_text())["fits"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_search_with_a_line_while_it_compiles(entries, folder, number):
    wide = [f"--config.model.{name}={size}" for name, size in {"layers": 8, "width": 512, "mlp_width": 2048}.items()]
    process = entries.start(
        "plan", "--config=pretrain.py", "--topology=v5e-4", "--search", "--compile_at_most=2", *wide, folder=folder
    )
    until(lambda: "candidate 1 of 2: data=" in process.stdout, process)
    time.sleep(0.5)
    process.signal(number)
    assert process.wait() == 1
    assert process.stderr == f"stopped on {number.name}\n"


def test_help_tells_the_flags(run):
    code, said, _ = run("--help")
    assert code == 0
    for flag in ("--topology=", "--slices=", "--devices=", "--search", "--json="):
        assert flag in said

"""Scaling studies from the command line, in real processes: killed, gone on with, failing in part, as a job array."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sslx.study import shared_arguments

REPOSITORY = Path(__file__).resolve().parent.parent

CONFIG = """
from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig

def get_config():
    config = experiment(
        data=TextConfig(source="jsonl:corpus.jsonl", seq_len=16, vocab_size=200),
        model=BertConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=32),
        pretext=MaskedLanguageModelConfig(),
    )
    config.batch_size, config.eval.examples, config.log.every_steps, config.checkpoint.every_steps = 8, 0, 1, 20
    return config
"""
GRID = ("--config=tiny.py", "--sizes=8,16", "--budgets=2k,40k", "--head_width=8", "--workdir=study")

HANGS = 900  # seconds after which a process has surely hung


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config and a corpus."""
    folder = tmp_path_factory.mktemp("study")
    words, draw = [f"word{i}" for i in range(60)], random.Random(0)
    texts = [" ".join(draw.choices(words, k=60)) + "." for _ in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def environment():
    one_device = "--xla_force_host_platform_device_count=1"
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": one_device, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def start(folder, environment):
    """Starts ``python -m sslx.study`` as a process of its own group."""

    def start(*arguments: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "sslx.study", *arguments],
            cwd=folder,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="module")
def ended(start):
    """Runs it to its end; returns exit code, stdout and stderr."""

    def run(*arguments: str, **more: str) -> tuple[int, str, str]:
        process = start(*arguments, **more)
        out, err = process.communicate(timeout=HANGS)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def entry(folder, environment, tmp_path_factory):
    """Runs the entry in a fork of `entry_server`: for what ends before a row starts."""
    command = [sys.executable, str(Path(__file__).with_name("entry_server.py"))]
    output = tmp_path_factory.mktemp("output") / "process"

    def run(*arguments: str, **more: str) -> tuple[int, str, str]:
        job = {"module": "sslx.study", "arguments": arguments, "folder": str(folder), "output": str(output)}
        server.stdin.write(json.dumps(job | {"environment": more}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, *(Path(f"{output}.{stream}").read_text() for stream in ("stdout", "stderr"))

    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield run


@pytest.fixture(scope="module")
def killed(start, folder):
    """The study after everything was killed in the middle of its second row, which has a checkpoint."""
    process = start(*GRID)
    checkpoints, deadline = folder / "study" / "w8_40k" / "checkpoints", time.monotonic() + HANGS
    try:
        while not any(path.name.isdecimal() for path in checkpoints.glob("*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return (folder / "study" / "w8_2k" / "metrics.jsonl").stat()


@pytest.fixture(scope="module")
def gone_on(killed, ended, folder):
    """The same command again, with a file in the way of the third row."""
    (folder / "study" / "w16_2k").write_text("in the way")
    return ended(*GRID)


def losses(folder: Path) -> dict[str, str]:
    with open(folder / "study" / "study_results.csv", encoding="utf8") as file:
        return {row["name"]: row["loss"] for row in csv.DictReader(file)}


def test_a_finished_row_is_not_run_again_and_an_interrupted_one_resumes(killed, gone_on, folder):
    _, said, _ = gone_on
    assert "row 0" not in said
    finished = (folder / "study" / "w8_2k" / "metrics.jsonl").stat()
    assert (finished.st_ino, finished.st_mtime_ns) == (killed.st_ino, killed.st_mtime_ns)
    assert "row 1 w8_40k: goes on" in said
    assert "resumed at step" in (folder / "study" / "logs" / "w8_40k.txt").read_text()


def test_a_row_that_fails_loses_no_other_and_is_told_with_how_to_go_on(gone_on, folder):
    code, said, error = gone_on
    assert code == 2
    assert "row 2 w16_2k: failed: cannot" in said
    assert error.startswith("error: 1 of 4 rows failed: w16_2k; the others are reported")
    assert "the same command tries them again" in error
    assert error.count("\n") == 1
    assert "3 of 4 rows finished" in said
    found = losses(folder)
    assert found.pop("w16_2k") == ""
    assert all(1.0 < float(loss) < 7.0 for loss in found.values())


def test_a_job_array_runs_its_row_alone_as_the_run_itself(gone_on, entry, folder):
    (folder / "study" / "w16_2k").unlink(missing_ok=True)
    code, said, error = entry(*GRID, SLURM_ARRAY_TASK_ID="2")
    assert (code, error) == (0, "")
    assert said.startswith("row 2 w16_2k\n")
    assert "done: held-out loss" in said
    code, said, _ = entry(*GRID, JOB_COMPLETION_INDEX="2")
    assert code == 0
    assert said.startswith("row 2 w16_2k is finished: held-out loss")
    code, said, _ = entry(*GRID, "--report", SLURM_ARRAY_TASK_ID="2")
    assert code == 0
    assert "4 of 4 rows finished" in said
    assert "too few finished rows to fit: 4 with 2 sizes and 2 token counts" in said
    assert (folder / "study" / "study.png").is_file()


def test_rows_are_what_the_grid_says(gone_on, folder):
    study = json.loads((folder / "study" / "study.json").read_text())
    for row in study["rows"]:
        if (folder / "study" / row["name"]).is_dir():
            config = json.loads((folder / "study" / row["name"] / "config.json").read_text())
            assert config["steps"] == config["optimizer"]["schedule_steps"] == row["steps"]
            assert config["model"]["width"] == row["size"]["width"]
            assert config["optimizer"]["learning_rate"] == row["learning_rate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes=8,24",), "study holds another study: --sizes was 8,16, now 8,24; give another --workdir"),
        (("--row=4",), "no row 4; the study has rows 0 to 3"),
        (("--row=one",), "--row"),
        (("--sizes=8,base",), "unknown size 'base'"),
        (("--sizes=12",), "size 12 is no multiple of --head_width=8; the nearest sizes are 8, 16"),
        (("--budgets=2k,lots",), "unknown budget 'lots'; expected tokens, such as 500k or 1e9, or FLOPs"),
        (("--budgets=50", "--workdir=new"), "budget 50 is less than one batch at size 8"),
        (("--budgets=400", "--workdir=new"), "too few for a warm-up of --warmup_share=0.1: expected"),
        (("--predict=1M",), "--predict=1M is no FLOP budget"),
        (("--rate_rule=sqr",), "unknown --rate_rule 'sqr'; did you mean 'sqrt'?"),
        (("--parameters=all",), "unknown --parameters 'all'"),
        (("--report", "--predict=1e12flops"), "nothing can be predicted: too few finished rows to fit"),
        (("--sises=8",), "sises"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(gone_on, entry, folder, arguments, message):
    before = (folder / "study" / "study.json").read_bytes()
    code, _, error = entry(*GRID, *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert (folder / "study" / "study.json").read_bytes() == before
    assert not (folder / "new").exists()


def test_list_prints_the_grid_and_writes_nothing(entry, folder):
    code, said, _ = entry(*GRID, "--workdir=listed", "--held_out=24:60k", "--list")
    assert code == 0
    for part in ("5 rows (*: held out)", "w8_2k", "w16_40k", "w24_60k*", "N-emb", "FLOPs", "steps"):
        assert part in said
    assert "rows see the corpus more than once" in said
    assert "2 sizes x 2 budgets are too few to fit" in said
    assert not (folder / "listed").exists()


def test_a_study_hands_everything_but_its_own_flags_to_its_rows():
    given = "--config=a.py:base --sizes 8,16 --budgets=1k --workdir w --config.seed=3 -row=1 --list --noconfig.x.glu"
    assert shared_arguments(given.split()) == ["--config=a.py:base", "--config.seed=3", "--noconfig.x.glu"]

"""Scaling studies from the command line, in real processes: killed, gone on with, failing in part, as a job array."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
from entries import until
from etils.epath import Path

from sslx.study import shared_arguments

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_up_texts):
    """A folder with a config and a corpus."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made_up_texts))
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def study(entries, folder):
    """Runs ``python -m sslx.study`` with these arguments; the rest is its environment."""
    return lambda *arguments, **more: entries.run("study", *arguments, folder=folder, environment=more)


@pytest.fixture(scope="module")
def killed(entries, folder):
    """The study after everything was killed in the middle of its second row, which has a checkpoint."""
    process = entries.start("study", *GRID, folder=folder)
    checkpoints = folder / "study" / "w8_40k" / "checkpoints"
    until(lambda: any(path.name.isdecimal() for path in checkpoints.glob("*")), process)
    os.killpg(process.pid, signal.SIGKILL)  # with the row, which is a process of its own
    process.wait()
    return (folder / "study" / "w8_2k" / "metrics.jsonl").stat()


@pytest.fixture(scope="module")
def gone_on(killed, study, folder):
    """The same command again, with a file in the way of the third row."""
    (folder / "study" / "w16_2k").write_text("in the way")
    return study(*GRID)


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
    assert "row 2 w16_2k: failed: --workdir=study/w16_2k is a file, expected a folder" in said
    assert error.startswith("error: 1 of 4 rows failed: w16_2k; the others are reported")
    assert "the same command tries them again" in error
    assert error.count("\n") == 1
    assert "3 of 4 rows finished" in said
    found = losses(folder)
    assert found.pop("w16_2k") == ""
    assert all(1.0 < float(loss) < 7.0 for loss in found.values())


def test_a_job_array_runs_its_row_alone_as_the_run_itself(gone_on, study, folder):
    (folder / "study" / "w16_2k").unlink(missing_ok=True)
    code, said, error = study(*GRID, SLURM_ARRAY_TASK_ID="2")
    assert (code, error) == (0, "")
    assert said.startswith("row 2 w16_2k\n")
    assert "done: held-out loss" in said
    code, said, _ = study(*GRID, JOB_COMPLETION_INDEX="2")
    assert code == 0
    assert said.startswith("row 2 w16_2k is finished: held-out loss")
    code, said, _ = study(*GRID, "--report", SLURM_ARRAY_TASK_ID="2")
    assert code == 0
    assert "4 of 4 rows finished" in said
    assert "too few finished rows to fit: 4 with 2 sizes and 2 token counts" in said
    assert (folder / "study" / "study.png").is_file()


def test_rows_are_what_the_grid_says(gone_on, folder):
    for row in json.loads((folder / "study" / "study.json").read_text())["rows"]:
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
        (("--sizes=4",), "size 4 is no multiple of --head_width=8; the nearest size is 8"),
        (("--sizes=12",), "size 12 is no multiple of --head_width=8; the nearest sizes are 8, 16"),
        (("--budgets=2k,lots",), "unknown budget 'lots'; expected tokens, such as 500k or 1e9, or FLOPs"),
        (("--budgets=50", "--workdir=new"), "budget 50 is less than one batch at size 8"),
        (("--budgets=400", "--workdir=new"), "too few for a warm-up of --warmup_share=0.1: expected"),
        (("--predict=1M",), "--predict=1M is no FLOP budget"),
        (("--predict=100:4M", "--workdir=new"), "size 100 is no multiple of --head_width=8; the nearest sizes are 96"),
        (("--workdir=gs://bucket/study",), "expected --row=N for each row, then --report, or a folder on a disk"),
        (("--rate_rule=sqr",), "unknown --rate_rule 'sqr'; did you mean 'sqrt'?"),
        (("--parameters=all",), "unknown --parameters 'all'"),
        (("--predict=1e12flops", "--workdir=new"), "--predict=1e12flops: too few rows to fit: 4 with 2 sizes and 2"),
        (("--report", "--predict=1e12flops"), "nothing can be predicted: too few finished rows to fit"),
        (("--report", "--workdir=new"), "no study in new, so there is nothing to report"),
        (("--sises=8",), "sises"),
        (
            ("--config.steps=50",),
            "--config.steps is not to be given, since every row of a study sets it: --budgets",
        ),
        (("--config.model.heads", "4", "--list"), "--config.model.heads is not to be given"),
        (("--config.init=runs/x",), "config.init is 'runs/x'; the rows of a study start from random parameters"),
        (("--list", "--report"), "--list and --report are given; expected one of --list, --report and --row"),
        (("--list", "--row=0"), "--list and --row are given"),
        # What only training looks at is told before its first row.
        (("--config.optimizer.name=adamm", "--workdir=new"), "did you mean 'adamw'?"),
        (("--config.checkpoint.best_metric=eval/los", "--workdir=new"), "did you mean 'eval/loss'?"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(gone_on, study, folder, arguments, message):
    before = (folder / "study" / "study.json").read_bytes()
    code, _, error = study(*GRID, *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert (folder / "study" / "study.json").read_bytes() == before
    assert not (folder / "new").exists()


def test_two_rows_with_the_same_mistake_are_enough(study, folder):
    changes = ("--config.mesh.data=3", "--config.mesh.fsdp=1", "--workdir=mistaken")  # for other devices than these
    larger = ("--sizes=8,16,24", "--budgets=2k,4k,40k", "--predict=1e12flops")
    code, said, error = study(*GRID, *changes, *larger)
    assert code == 2
    assert said.count(": failed: config.mesh is data=3 x") == 2
    assert "two rows end with the same mistake, so the others are not tried" in said
    assert error.startswith("error: 2 of 9 rows failed: w8_2k, w8_4k; 7 more were not tried; what each printed is in ")
    assert error.endswith(
        "the same command tries them again; nothing can be predicted: too few finished rows to fit: 0 with 0 sizes and "
        "0 token counts; expected at least 6 with 3 different sizes and 3 different token counts\n"
    )


def test_list_prints_the_grid_and_writes_nothing(study, folder):
    code, said, _ = study(*GRID, "--workdir=listed", "--held_out=24:60k", "--list")
    assert code == 0
    for part in ("5 rows (*: held out)", "w8_2k", "w16_40k", "w24_60k*", "N-emb", "FLOPs", "steps"):
        assert part in said
    assert "rows see the corpus more than once" in said
    assert "note: too few rows to fit: 4 with 2 sizes and 2 token counts; expected at least 6 with 3 different" in said
    assert not (folder / "listed").exists()


def test_a_grid_that_can_be_fitted_is_listed_without_a_note_and_one_that_cannot_with_one(study):
    listed = (*GRID[:1], "--head_width=8", "--workdir=listed", "--list")
    code, said, error = study(*listed, "--sizes=8,16,24,32", "--budgets=2e10flops,4e10flops")
    assert code == 0, error
    assert "to fit" not in said
    code, said, error = study(*listed, "--sizes=8,16,24,32,40,48,56", "--budgets=4e10flops")
    assert code == 0, error
    assert "note: the rows cannot be fitted: each size has one token count" in " ".join(said.split())


def test_rows_run_one_by_one_into_a_study_on_gs(bucket, study):
    there = Path(f"{bucket}/study")
    arguments = (*GRID[:2], "--budgets=2k", *GRID[3:4], f"--workdir={there}")
    emulator = {name: os.environ[name] for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")}
    for row, name in enumerate(("w8_2k", "w16_2k")):
        code, said, error = study(*arguments, f"--row={row}", **emulator)
        assert code == 0, error
        assert said.startswith(f"row {row} {name}\n")
        assert (there / name / "metrics.jsonl").exists()
    code, said, _ = study(*arguments, "--row=1", **emulator)
    assert code == 0
    assert said.startswith("row 1 w16_2k is finished: held-out loss")
    code, said, error = study(*arguments, "--report", **emulator)
    assert code == 0, error
    assert "2 of 2 rows finished" in said
    assert {path.name for path in there.glob("study*")} == {
        "study.json",
        "study.png",
        "study_results.csv",
        "study_results.json",
    }


def test_a_study_hands_everything_but_its_own_flags_to_its_rows():
    given = "--config=a.py:base --sizes 8,16 --budgets=1k --workdir w --config.seed=3 -row=1 --list --noconfig.x.glu"
    assert shared_arguments(given.split()) == ["--config=a.py:base", "--config.seed=3", "--noconfig.x.glu"]

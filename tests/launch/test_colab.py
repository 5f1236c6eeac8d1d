"""`launch/colab.ipynb`: its real cells run from top to bottom on this machine, on a tiny text of their own.

The settings cell reads SSLX_* variables; here they point it at this checkout and make the models tiny.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from entries import simulated

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "launch" / "colab.ipynb"
COLOURS = ("red", "blue")


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def execute(notebook, tmp_path):
    """Executes the notebook up to a cell, in an environment of its own; returns the outputs by cell."""

    def run(last: str, **environment: str) -> dict[str, list]:
        names = [cell.id for cell in notebook.cells]
        notebook.cells = notebook.cells[: names.index(last) + 1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SSLX_") or "CACHE" in name}
        environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "TMPDIR": str(tmp_path),
            **simulated(1),
            **environment,
        }
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env=environment, cwd=tmp_path)
        return {cell.id: cell.get("outputs", []) for cell in notebook.cells}

    return run


def said(outputs: list) -> str:
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_it_pretrains_and_fine_tunes_from_top_to_bottom(execute, notebook, tmp_path):
    texts = [
        {"text": f"the {COLOURS[i % 2]} word number {i % 17} stands in sentence {i}.", "label": COLOURS[i % 2]}
        for i in range(300)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(text) + "\n" for text in texts))
    steps = (
        f"{corpus} --config.steps=4 --config.batch_size=8 --config.optimizer.warmup_steps=1 --config.data.seq_len=16"
    )
    tiny = "--config.data.vocab_size=200 --config.model.layers=1 --config.model.width=16 --config.model.heads=2"
    outputs = execute(
        "results",
        SSLX_REPOSITORY=str(REPOSITORY),
        SSLX_RUNS=str(tmp_path / "runs"),
        SSLX_PRETRAIN=f"--config=configs/bert_mlm.py:data=jsonl:{steps} {tiny} --config.eval.examples=0",
        SSLX_FINETUNE=f"--config=configs/finetune/text_classification.py:data=jsonl:{steps}",
    )
    runs = tmp_path / "runs"
    assert "this machine has a" in said(outputs["hardware"])
    assert f"the runs are in {runs}" in said(outputs["drive"])
    assert "done: held-out loss" in said(outputs["pretrain"])
    assert "best checkpoint: step" in said(outputs["finetune"])
    assert json.loads((runs / "finetune" / "report.json").read_text())["init"] == str(runs / "pretrain")
    assert sum("image/png" in output.get("data", {}) for output in outputs["results"]) == 2
    assert any("text/html" in output.get("data", {}) for output in outputs["tensorboard"])
    for run in ("pretrain", "finetune"):
        assert list((runs / run).glob("events.out.tfevents.*"))


def test_with_drive_the_runs_are_on_it(execute, tmp_path):
    colab = tmp_path / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "drive.py").write_text(
        "import os\ndef mount(at):\n    os.makedirs(f'{at}/MyDrive')\n    print('mounted')\n"
    )
    outputs = execute(
        "drive",
        SSLX_REPOSITORY=str(REPOSITORY),
        SSLX_DRIVE=str(tmp_path / "drive"),
        SSLX_RUNS="my-runs",
        PYTHONPATH=str(tmp_path),
    )
    assert said(outputs["drive"]) == f"mounted\nthe runs are in {tmp_path}/drive/MyDrive/my-runs\n"
    assert (tmp_path / "drive" / "MyDrive" / "my-runs").is_dir()


def test_a_repository_that_is_not_set_ends_it_in_one_line(execute):
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        execute("results")
    assert error.value.ename == "SystemExit"
    assert error.value.evalue == "REPOSITORY is not set; expected a git URL or a folder in the cell above"

"""Runs on ``gs://``: a Google Cloud Storage emulator, its real HTTP protocol, and the libraries that users have."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from etils.epath import Path

from sslx import finetune, main, storage
from sslx.errors import UserError
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.metrics import read_metrics


def test_a_run_on_gs_resumes_as_on_disk_and_is_fine_tuned_from_there(bucket, tiny_config, corpus_file, tmp_path):
    written = {"optimizer.schedule_steps": 6, "checkpoint.every_steps": 2}
    here, there = tmp_path / "run", Path(f"{bucket}/pretraining/run")
    for folder in (here, there):
        main.main(tiny_config(changes={"steps": 4, **written}), Path(folder))
        main.main(tiny_config(changes={"steps": 6, **written}), Path(folder))
    assert saved_steps(there / "checkpoints") == saved_steps(here / "checkpoints")
    assert json.loads((there / "config.json").read_text())["steps"] == 6
    for name in ("curves.png", "tokenizer/tokenizer.json", "versions.json"):
        assert (there / name).exists()
    assert list(there.glob("events.out.tfevents.*"))
    loss = lambda run: {r["step"]: r["train/loss"] for r in read_metrics(run) if "train/loss" in r}  # noqa: E731
    assert loss(there) == loss(here)
    assert sorted(loss(there)) == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, read_variables(there), read_variables(here))

    changes = {"init": str(there), "data.source": f"jsonl:{corpus_file}", "steps": 4}
    tuned = Path(f"{bucket}/tuned")
    finetune.main(tiny_config("finetune/text_classification", changes), tuned)
    assert "eval/macro_f1" in json.loads((tuned / "report.json").read_text())
    assert (tuned / "confusion_matrix.png").exists()
    with pytest.raises(UserError, match=r"gs://bucket/pretraining/runs.*did you mean 'gs://bucket/pretraining/run'"):
        main.main(tiny_config(changes={"init": f"{bucket}/pretraining/runs"}), tmp_path / "other")


def test_a_damaged_checkpoint_on_gs_is_passed_over(bucket, tiny_config, capsys):
    run = Path(f"{bucket}/run")
    written = {"optimizer.schedule_steps": 6, "checkpoint.every_steps": 2}
    main.main(tiny_config(changes={"steps": 4, **written}), run)
    for file in (run / "checkpoints" / "4" / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(b"x")
    session = main.main(tiny_config(changes={"steps": 4, **written}), run)
    assert "checkpoint 4 cannot be read" in capsys.readouterr().out
    assert int(session.trained.state.step) == 4
    assert (run / "checkpoints" / "4.damaged").exists()


def test_storage_that_cannot_be_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"s4://bucket/run is on storage of an unknown kind, s4://; expected"):
        storage.check("s4://bucket/run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gcsfs, which is not installed: pip install 'sslx\[gcs\]'"):
        storage.check("gs://bucket/run")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    storage.write_text(tmp_path / "a", "one")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        storage.write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

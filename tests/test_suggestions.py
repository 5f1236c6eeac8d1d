"""What is suggested works: commands that pretraining prints at its end, and runs that a wrong name is near to."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from etils import epath

import sslx
from sslx import main
from sslx.errors import UserError
from sslx.main import FINETUNE, _finetune_flags
from sslx.models.convnext import ConvnextConfig
from sslx.models.resnet import ResnetConfig
from sslx.models.vit import VitConfig
from sslx.train.initialise import open_start
from sslx.train.run_folder import read_config


def test_the_commands_at_the_end_of_pretraining_run_as_they_stand(entries, tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A name that a shell would split, rows shorter than those of the suggested config, and its folder taken.
    run = Path("runs/my run")
    written = {"steps": 2, "optimizer.warmup_steps": 1, "eval.batches": 1, "model.positions": "learned"}
    config = tiny_config("bert_mlm", written | {"model.max_length": 32})
    other = Path("runs/text_classification")
    (other / "checkpoints" / "1").mkdir(parents=True)
    (other / "config.json").write_text('{"init": "runs/another"}')
    main.main(config, run)
    said = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in said]
    assert commands[0] == ["tensorboard", "--logdir=runs/my run"]
    assert commands[1][:3] == ["python", "-m", "sslx.finetune"]
    assert "(on python_docs; " in said[2]  # what was learned from has no labels
    assert len(commands) == 3
    flags = commands[1][3:]
    source = config.data.source
    small = [f"--config.data.source={source}", "--config.data.train_split=train[:90%]"]
    small += ["--config.data.eval_split=train[90%:]", "--config.data.test_split=", "--config.steps=2"]
    ended = entries.run("finetune", *flags, *small, "--config.optimizer.warmup_steps=1", folder=tmp_path)
    assert ended.code == 0, ended.stderr
    made = read_config(Path("runs/text_classification_my run"))
    assert (made["init"], made["data"]["seq_len"]) == ("runs/my run", 32)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (ResnetConfig(), ["--config.task.drop_path=0", "--config.optimizer.layer_decay=1"]),
        (ConvnextConfig(), ["--config.optimizer.layer_decay=1"]),
        (VitConfig(), []),
    ],
)
def test_what_a_model_of_pictures_has_not_is_switched_off(model, flags):
    written = {"model": dataclasses.asdict(model), "data": {"source": "digits", "image_size": 32, "channels": 1}}
    found = _finetune_flags(FINETUNE / "image_classification.py", written, epath.Path("runs/rotation"), False)
    assert found[2:] == flags
    assert found[0].endswith("image_classification.py")
    labelled = _finetune_flags(FINETUNE / "image_classification.py", written, epath.Path("runs/rotation"), True)
    assert labelled[0].endswith("image_classification.py:data=digits")


def test_a_run_is_found_one_level_up_or_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/bert a")
    (run / "checkpoints" / "8").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for given in ("checkpoints", "checkpoints/8", "config.json", "chekpoints"):
        for path, root in ((run / given, run), (tmp_path / run / given, tmp_path / run)):
            with pytest.raises(UserError, match=rf"; did you mean '{root}'\?$"):
                read_config(path)
    with pytest.raises(UserError, match=r"^no run in 'runs': .*; did you mean 'runs/bert a'\?$"):
        read_config(Path("runs"))
    for name in ("gpt", "mae"):
        (Path("runs") / name / "checkpoints" / "8").mkdir(parents=True)
        (Path("runs") / name / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^no run in 'runs': .*; valid: runs/bert a, runs/gpt, runs/mae$"):
        read_config(Path("runs"))
    with pytest.raises(UserError, match=r"^no run in 'nowhere/a': .* checkpoints$"):
        read_config(Path("nowhere/a"))
    with pytest.raises(UserError, match=r"^run is ''; expected the folder of a run"):
        sslx.load("")


def test_runs_without_a_checkpoint_are_not_suggested(tmp_path):
    for name, file in {"bert_a": "checkpoints/8/x", "bert_b": "checkpoints/8.damaged/x", "bert_c": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if file:
            (tmp_path / name / file).mkdir(parents=True)
    (tmp_path / "bert-base").mkdir()
    (tmp_path / "bert-base" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert-base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=rf"no run in .*; did you mean '{tmp_path}/bert_a'\? \(valid: \S+/bert_a\)$"):
        read_config(tmp_path / "bert_x")
    # As a start published weights do as well.
    with pytest.raises(UserError, match=rf"\(valid: {tmp_path}/bert-base, {tmp_path}/bert_a\)$"):
        open_start(tmp_path / "bert_x")
    (tmp_path / "bert_a" / "checkpoints" / "8").rename(tmp_path / "bert_a" / "checkpoints" / "8.damaged")
    with pytest.raises(UserError, match=r"config.json and checkpoints$"):
        read_config(tmp_path / "bert_x")

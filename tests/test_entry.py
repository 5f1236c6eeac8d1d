"""What entries make of a command line before anything else: which keys were given, and a warm-up that fits."""

from __future__ import annotations

import ml_collections
import pytest

from sslx import entry


@pytest.fixture
def command(monkeypatch):
    """Makes a command line this process's own."""
    return lambda *arguments: monkeypatch.setattr("sys.argv", ["main.py", *arguments])


def test_the_keys_that_were_given(command):
    command("--config=a.py", "--config.steps=3", "-config.model.layers", "2", "--noconfig.eval.x", "--workdir=config.y")
    assert entry.given_keys() == ["steps", "model.layers", "eval.x"]


@pytest.mark.parametrize(
    ("arguments", "steps", "schedule_steps", "warmup"),
    [
        (["--config.steps=20"], 20, None, 2),
        (["--config.steps=5"], 5, None, 0),
        (["--config.steps=100"], 100, None, 10),
        (["--config.steps=199"], 199, None, 19),
        (["--config.steps=200"], 200, None, 100),  # as it is written
        (["--config.steps=20"], 20, 500, 100),  # the schedule goes on beyond the run
        (["--config.steps=20", "--config.optimizer.warmup_steps=100"], 20, None, 100),  # which is refused
        ([], 20, None, 100),  # a mistake in the config file, which is refused
    ],
)
def test_a_short_trial_has_a_shorter_warmup(command, capsys, arguments, steps, schedule_steps, warmup):
    command("--config=a.py", *arguments)
    optimizer = {"warmup_steps": 100, "schedule_steps": schedule_steps}
    config = ml_collections.ConfigDict({"steps": steps, "optimizer": optimizer}, convert_dict=True)
    entry.fit_warmup(config)
    assert config.optimizer.warmup_steps == warmup
    said = capsys.readouterr().out
    assert said == (
        "" if warmup == 100 else f"note: the warm-up of 100 steps is shortened to {warmup}, a tenth of config.steps\n"
    )

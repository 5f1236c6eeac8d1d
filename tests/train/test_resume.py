"""Real processes, killed: what they leave is resumed to the bit.

Each test runs ``python -m sslx.main`` on a tiny config with dropout, kills it at moments found by watching its folder,
starts it again, and compares the last checkpoint and ``metrics.jsonl`` with an unbroken run's.
"""

from __future__ import annotations

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from entries import simulated, until
from etils import epath

from sslx import main
from sslx.data.row_writer import write_rows
from sslx.data.token_shards import Workers
from sslx.errors import UserError
from sslx.prepare import prepare
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.metrics import read_metrics

STEPS = 40
MESHES = {1: {}, 8: {"mesh.fsdp": 2}}


@pytest.fixture
def start(tmp_path, entries, write_tiny_config):
    """Starts the run in a folder on ``devices`` simulated devices."""

    def start(run, devices=1, *, steps=STEPS, **changes):
        settings = {
            "model.dropout": 0.1,
            "model.attention_dropout": 0.1,
            "eval.every_steps": 10,
            "eval.batches": 2,
            "checkpoint.every_steps": 6,
            "checkpoint.keep": 3,
        }
        config = tmp_path / "config.py"
        write_tiny_config(config, changes=settings | MESHES[devices] | changes)
        arguments = [f"--config={config}", f"--workdir={run}", f"--config.steps={steps}"]
        return entries.start("main", *arguments, environment=simulated(devices))

    return start


def ended(process):
    """Exit code and output of a process, once it ends."""
    return process.wait(), process.stdout + process.stderr


@pytest.fixture
def finish(start):
    """Runs to the end; returns exit code and output."""
    return lambda *arguments, **changes: ended(start(*arguments, **changes))


@pytest.fixture
def interrupt(start):
    """Starts a run and signals it as soon as ``moment(run)`` holds; returns exit code and output."""

    def interrupt(run, moment, devices=1, number=signal.SIGKILL):
        process = start(run, devices)
        until(lambda: moment(run), process)
        process.signal(number)
        return ended(process)

    return interrupt


def logged(step):
    """The moment when the metrics of a step are on disk."""
    return lambda run: any(record["step"] >= step for record in read_metrics(run))


def writing(after):
    """The moment when a checkpoint beyond step ``after`` is half written."""

    def moment(run):
        steps = [int(path.name.partition(".")[0]) for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
        return any(step > after for step in steps)

    return moment


def losses(run):
    """``{step: {name: loss}}`` of every line in metrics.jsonl; a step's lines must not repeat a name."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in {"train/loss", "eval/loss"} & set(record):
            assert name not in found.setdefault(record["step"], {}), f"{name} twice at step {record['step']}"
            found[record["step"]][name] = record[name]
    return found


def assert_same_run(run, other, step=STEPS):
    assert losses(run) == losses(other)
    assert saved_steps(run / "checkpoints")[-1] == saved_steps(other / "checkpoints")[-1] == step
    assert_same_parameters(run, other, step)


def assert_same_parameters(run, other, step):
    ours, theirs = read_variables(run, step), read_variables(other, step)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, array in jax.tree_util.tree_leaves_with_path(ours):
        same = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        assert array.tobytes() == same.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Folders of finished runs, which several tests read."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def unbroken(keep, finish):
    """The folder of an unbroken run on a number of devices; trained once, not to be changed."""

    def get(devices):
        run = keep / str(devices)
        if not run.exists():
            code, output = finish(run, devices)
            assert code == 0, output
        return run

    return get


@pytest.mark.parametrize("devices", MESHES)
def test_resume_is_bit_exact_after_kills(unbroken, interrupt, finish, tmp_path, devices):
    run = tmp_path / "run"
    moments = [logged(2), logged(15), writing(18)]  # before the first checkpoint, between two, while one is written
    if devices == 1:
        moments.append(logged(STEPS - 1))
    for moment in moments:
        code, output = interrupt(run, moment, devices)
        assert code == -signal.SIGKILL, output
        if saved_steps(run / "checkpoints"):
            read_variables(run)  # a folder with a bare number is complete, whenever the kill came
    resumed_from = saved_steps(run / "checkpoints")[-1]
    code, output = finish(run, devices)
    assert code == 0, output
    assert f"resumed at step {resumed_from} of {STEPS}" in output
    assert not list((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    assert_same_run(run, unbroken(devices))


def test_sigterm_saves_and_the_same_command_resumes(unbroken, interrupt, finish, tmp_path):
    run = tmp_path / "run"
    code, output = interrupt(run, logged(9), number=signal.SIGTERM)
    assert code == 0, output
    saved = int(re.search(r"saved at step (\d+) on SIGTERM; the same command resumes", output).group(1))
    assert 9 <= saved < STEPS
    assert saved_steps(run / "checkpoints")[-1] == saved
    code, output = finish(run)
    assert code == 0, output
    assert f"resumed at step {saved} of {STEPS}" in output
    assert_same_run(run, unbroken(1))


def test_raising_the_steps_of_a_finished_run_goes_on_along_its_schedule(unbroken, finish, tmp_path):
    # 24 steps of a schedule of 40, then on to 40, are the run that went to 40 at once.
    run = tmp_path / "run"
    schedule = {"optimizer.schedule_steps": STEPS}
    code, output = finish(run, steps=24, **schedule)
    assert code == 0, output
    code, output = finish(run)  # schedule_steps is not given again and stays
    assert code == 0, output
    assert json.loads((run / "config.json").read_text())["optimizer"]["schedule_steps"] == STEPS
    expected, found = losses(unbroken(1)), losses(run)
    found[24].pop("eval/loss")  # the last step is always evaluated
    assert found == expected
    assert_same_parameters(run, unbroken(1), STEPS)


def test_another_config_is_refused_with_the_keys_that_differ(unbroken, finish):
    run = unbroken(1)
    before = (run / "config.json").read_bytes()
    code, output = finish(run, seed=3, **{"optimizer.learning_rate": 0.5, "log.every_steps": 3})
    assert code == 2
    assert "config.seed: 0 there, 3 now" in output
    assert "config.optimizer.learning_rate: 0.001 there, 0.5 now" in output
    assert "log.every_steps" not in output.partition("holds a run with another config")[2]
    assert "Traceback" not in output
    assert (run / "config.json").read_bytes() == before


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = biggest_file(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder):
    path = biggest_file(folder / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(unbroken, finish, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(unbroken(1), run)
    before, last = saved_steps(run / "checkpoints")[-2:]
    damage(run / "checkpoints" / str(last))
    code, output = finish(run)
    assert code == 0, output
    assert f"checkpoint {last} cannot be read" in output
    assert f"resumed at step {before} of {STEPS}" in output
    assert (run / "checkpoints" / f"{last}.damaged").is_dir()
    assert_same_run(run, unbroken(1))


def test_a_run_resumes_on_another_number_of_devices(unbroken, finish, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken(1), run)
    for step in saved_steps(run / "checkpoints")[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    (first,) = saved_steps(run / "checkpoints")
    code, output = finish(run, 8)
    assert code == 0, output
    assert f"resumed at step {first} of {STEPS}" in output
    # Sums over the batch are in another order, so equal to float32 tolerance and no more.
    for step, values in losses(unbroken(1)).items():
        for name, value in values.items():
            assert losses(run)[step][name] == pytest.approx(value, rel=1e-4)
    ours, theirs = read_variables(run)["params"], read_variables(unbroken(1))["params"]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_run_on_prepared_rows_goes_on_from_a_copy_of_them(tiny_config, tmp_path):
    """Bit-equal to a run whose rows never moved; rows in another order are refused."""
    settings = {
        "model.dropout": 0.1,
        "model.attention_dropout": 0.1,
        "optimizer.schedule_steps": 8,
        "eval.every_steps": 4,
    }

    def run(folder, rows, steps):
        main.main(tiny_config(changes={**settings, "steps": steps, "data.source": f"rows:{rows}"}), folder)

    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    written = prepare(tiny_config().to_dict(), workers=Workers(1), rows=str(here))
    write_rows(written, other, block_rows=64)
    unbroken, moved = epath.Path(tmp_path / "unbroken"), epath.Path(tmp_path / "moved")
    run(unbroken, here, 8)
    run(moved, here, 4)
    shutil.copytree(here, there)
    shutil.rmtree(here)
    with pytest.raises(UserError, match="the training data has changed since this run was started"):
        run(moved, other, 8)
    run(moved, there, 8)
    assert_same_run(moved, unbroken, 8)
    assert f"rows:{there}" in (moved / "config.json").read_text()
    with pytest.raises(UserError, match=r"config.data.source: 'rows:.*there, 'text:"):
        main.main(tiny_config(changes={**settings, "steps": 9, "data.source": "text:elsewhere"}), moved)

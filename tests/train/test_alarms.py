"""Alarms: which numbers raise which, when, with which remedies; through a kill, and to a run's end."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest

from sslx.errors import Alarmed
from sslx.session import train
from sslx.settings import AlarmsConfig
from sslx.train.alarms import MEANINGS, REMEDIES, Alarms
from sslx.train.loop import beside_chance
from sslx.train.metrics import read_metrics

WELL = {"eval/loss": 1.0, "features/std": 0.8, "features/rankme": 20.0}


def objective(entropies=None, remedies=None, spreads=(), ranks=(), balanced=False):
    watched = {"spreads": spreads, "ranks": ranks, "balanced": balanced}
    return types.SimpleNamespace(entropies=lambda: entropies or {}, remedies=remedies or {}, **watched)


def judged(evaluations, config=None, chance=3.0, of=None):
    """The names of the alarms that each evaluation raises; progress goes through JSON between them, as on resuming."""
    config, alarms, raised = config or AlarmsConfig(), Alarms(), []
    for metrics in evaluations:
        alarms = Alarms.of(json.loads(json.dumps(dataclasses.asdict(alarms))))
        raised.append(list(alarms.judge({**WELL, **metrics}, of or objective(), chance, config)))
    return raised


def test_a_good_run_raises_nothing():
    improving = [{"eval/loss": 2.9 * 0.9**n, "features/std": 0.3 + 0.02 * n} for n in range(10)]
    assert judged(improving) == [[]] * 10


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("no_learning", {"eval/loss": 2.95}),
        ("no_learning", {"eval/loss": 3.05}),  # on either side
        ("collapse", {"features/std": 0.005}),
        ("low_rank", {"features/rankme": 1.2}),
    ],
)
def test_an_alarm_is_raised_once_by_its_sign_in_three_evaluations_in_succession(name, sign):
    assert judged([sign, sign, {}, sign, sign, sign, sign]) == [[], [], [], [], [], [name], []]
    assert judged([sign] * 3 + [{}] + [sign] * 3)[-1] == [name]  # again, once it has been over
    assert judged([sign], AlarmsConfig(evaluations=1)) == [[name]]


def test_a_spread_that_has_fallen_to_a_tenth_is_a_collapse_and_a_small_one_from_the_start_is_none():
    fallen = [{"features/std": std} for std in (0.9, 0.08, 0.08, 0.08)]
    assert judged(fallen) == [[], [], [], ["collapse"]]
    assert judged([{"features/std": 0.08}] * 6) == [[]] * 6


def test_a_collapse_of_what_the_objective_watches_beside_the_features_is_one():
    of, config = objective(spreads=("projection_std",)), AlarmsConfig(evaluations=1)
    assert judged([{"eval/projection_std": 0.9}, {"eval/projection_std": 0.05}], config, of=of) == [[], ["collapse"]]
    line = Alarms().judge({**WELL, "eval/projection_std": 0.005}, of, None, config)["collapse"]
    assert line.startswith("alarm: collapse (projection_std 0.005, was 0.005): ")


def test_few_directions_of_what_the_objective_watches_are_a_low_rank():
    of, config = objective(ranks=("projection_rank",)), AlarmsConfig(evaluations=1)
    assert judged([{"eval/projection_rank": 1.3}, {"eval/projection_rank": 1.1}], config, of=of) == [[], ["low_rank"]]
    line = Alarms().judge({**WELL, "eval/projection_rank": 1.1}, of, None, config)["low_rank"]
    assert line.startswith("alarm: low_rank (projection_rank 1.10): ")


def test_a_chance_of_0_has_a_band_of_its_own_and_an_unknown_one_none():
    near, far = {"eval/loss": -0.01}, {"eval/loss": -0.5}
    assert judged([near], AlarmsConfig(evaluations=1), chance=0.0) == [["no_learning"]]
    assert judged([far], AlarmsConfig(evaluations=1), chance=0.0) == [[]]
    assert judged([near] * 5, chance=None) == [[]] * 5


@pytest.mark.parametrize(
    ("entropy", "divergence", "name"),
    [(0.01, 0.001, ["peaked"]), (math.log(64) - 0.01, 0.001, ["uniform"]), (0.01, 0.5, []), (2.0, 0.001, [])],
)
def test_a_teacher_that_says_the_same_of_all_rows_is_named_by_what_it_says(entropy, divergence, name):
    metrics = {"eval/teacher_entropy": entropy, "eval/teacher_kl": divergence}
    of = objective({"teacher_entropy": (math.log(64), "teacher_kl")})
    assert judged([metrics] * 3, of=of)[-1] == name
    # Of what is shared out evenly, certain answers are good ones.
    balanced = objective({"teacher_entropy": (math.log(64), "teacher_kl")}, balanced=True)
    assert judged([metrics] * 3, of=balanced)[-1] == [one for one in name if one != "peaked"]


def test_a_line_has_the_numbers_the_meaning_and_the_objective_s_own_remedy():
    config = AlarmsConfig(evaluations=1)
    alarms, metrics = Alarms(largest={"features/std": 0.81}), {**WELL, "features/std": 0.004}
    line = alarms.judge(metrics, objective(), None, config)["collapse"]
    assert line == (
        f"alarm: collapse (feature spread 0.004, was 0.81): {MEANINGS['collapse']}; try {REMEDIES['collapse']}"
    )
    alarms = Alarms()
    line = alarms.judge(metrics, objective(remedies={"collapse": "a predictor"}), None, config)["collapse"]
    assert line.endswith("; try a predictor")


def test_a_loss_is_told_beside_its_chance_value():
    assert beside_chance(1.5, 2.0) == " (0.500 below chance)"
    assert beside_chance(2.5, 2.0) == " (0.500 above chance)"
    assert beside_chance(2.5, None) == ""


@pytest.fixture
def run(tiny_config, tmp_path):
    """Trains a model that learns nothing at a learning rate of 1e-12, evaluated every other step."""

    def start(folder="run", **changes):
        still = {"steps": 12, "optimizer.learning_rate": 1e-12, "eval.every_steps": 2, "eval.batches": 2}
        still |= {"checkpoint.every_steps": 5, "diagnostics.rows": 32, "alarms.chance_band": 0.5}
        written = tiny_config(changes={**still, **changes}).to_dict()
        return train(written, tmp_path / folder, part="pretext", tokenizer=None, title="test")

    return start


def test_a_model_that_does_not_learn_raises_its_alarm_after_the_warm_up_and_resuming_changes_nothing(
    run, tmp_path, capsys
):
    run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm:")]
    assert len(said) == 1
    assert said[0].startswith("alarm: no_learning (loss ")
    records = read_metrics(tmp_path / "run")
    # Evaluated at 2 (still warming up), 4, 6 and 8.
    assert [(r["step"], r["diagnosis"]) for r in records if r.get("alarm/no_learning") == 1.0] == [(8, said[0])]
    assert [r["step"] for r in records if "features/std" in r] == [2, 4, 6, 8, 10, 12]
    schedule = {"optimizer.schedule_steps": 12}
    run("twice", steps=6, **schedule)  # of the three signs, two come before
    run("twice", **schedule)

    def kept(run):
        return [record for record in read_metrics(tmp_path / run) if "train/loss" not in record]

    assert kept("twice") == kept("run")


def test_an_alarm_stops_the_run_if_asked_and_the_same_command_says_so_again(run, tmp_path):
    stopping = {"alarms.stop": True, "alarms.evaluations": 2}
    with pytest.raises(Alarmed, match=r"^the run was stopped by its alarm no_learning at step 6, which is saved$"):
        run(**stopping)
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
    assert (tmp_path / "run" / "curves.png").is_file()
    with pytest.raises(Alarmed, match=r"at step 6; --config.alarms.stop=False goes on$"):
        run(**stopping)
    assert int(run(**{**stopping, "alarms.stop": False}).trained.state.step) == 12


def test_an_alarm_ends_the_process_with_3_and_a_line(entries, write_tiny_config, tmp_path):
    write_tiny_config(
        tmp_path / "still.py",
        changes={
            "optimizer.learning_rate": 1e-12,
            "eval.every_steps": 2,
            "eval.batches": 1,
            "alarms.chance_band": 0.5,
            "alarms.evaluations": 1,
            "alarms.stop": True,
        },
    )
    ended = entries.run("main", "--config=still.py", "--workdir=run", folder=tmp_path)
    assert ended.stderr == "error: the run was stopped by its alarm no_learning at step 4, which is saved\n"
    assert ended.code == 3

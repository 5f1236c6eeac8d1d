"""The inner loop on a clock of the tests' own; medians; operations' own times; their lines; what is not compared."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.settings import MeshConfig
from sslx.timing import clock, report
from sslx.timing.clock import Spread, TimedSteps, time_steps
from sslx.timing.result import comparable, read
from sslx.timing.trace import own_times, source_lines
from sslx.train.sharding import make_mesh

INPUT, HOST, DEVICE = 3.0, 2.0, 50.0


def test_the_parts_of_a_step_are_told_apart_and_add_up_to_it(monkeypatch):
    now = SimpleNamespace(seconds=0.0)

    def passes(seconds):
        now.seconds += seconds

    def stream(start, stop):
        for step in range(start, stop):
            passes(INPUT + (100 if step == 7 else 0))  # one batch is late
            yield {"row": np.array([step])}

    def train_step(state, batch, votes, held):
        passes(HOST)
        seen.append(int(batch["row"][0]))
        return state + 1, {"votes": votes, "held": held}

    def waits(values):
        passes(DEVICE)
        return values

    seen = []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(jax, "device_get", waits)
    program = SimpleNamespace(mesh=make_mesh(MeshConfig()), nothing_held=lambda: False, train_step=train_step)
    steps = TimedSteps(SimpleNamespace(program=program, batches=SimpleNamespace(stream=stream)), 0)
    laps = time_steps(steps, 0, 6, 4)
    assert (seen, steps.state) == (list(range(10)), 10)
    assert [lap.input for lap in laps] == [INPUT, INPUT, INPUT, INPUT + 100, INPUT, INPUT]
    assert {(lap.host, lap.device) for lap in laps} == {(HOST, DEVICE)}
    assert [lap.total for lap in laps] == [lap.input + HOST + DEVICE for lap in laps]
    assert steps.finite
    # Of the first steps, none waits: as many as may be in flight are sent before one is read.
    assert [lap.device for lap in steps.laps[:3]] == [0, 0, DEVICE]


def test_a_step_that_is_not_finite_is_noticed():
    steps = TimedSteps.__new__(TimedSteps)
    steps.finite = True
    for held in (False, True, False):
        steps.landed(1, None, held, {})
    assert not steps.finite


def test_ratios_have_the_range_of_the_quartiles():
    old, new = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]), Spread.of([2.0, 4.0, 6.0, 8.0, 10.0])
    assert old == Spread(3.0, 2.0, 4.0, 5)
    assert report.ratio(new, old) == (2.0, 1.0, 4.0)


def test_an_operation_has_the_time_that_nothing_inside_it_has():
    events = [(0, 100, "while"), (10, 30, "dot"), (12, 20, "copy"), (40, 90, "dot"), (100, 110, "add")]
    found = dict.fromkeys(("while", "dot", "copy", "add"), 0.0)
    for name, seconds in own_times(events):
        found[name] += seconds
    assert found == pytest.approx({"while": 30e-9, "dot": 62e-9, "copy": 8e-9, "add": 10e-9})


def test_lines_of_the_source_come_from_the_compilers_tables():
    def doubled(x):
        return x + x

    text = jax.jit(lambda x: jax.nn.relu(doubled(x))).lower(np.ones(3)).compile().as_text()
    first = doubled.__code__.co_firstlineno + 1
    places = set(source_lines(text).values())
    assert f"tests/timing/test_clock.py:{first}" in places
    # jax's own lines are passed over for the one that called it.
    assert f"tests/timing/test_clock.py:{first + 2}" in places
    assert not any("/jax/" in place for place in places)


def test_results_of_other_work_are_not_compared_and_other_settings_are_named(tmp_path):
    config = {"pretext": {"name": "mlm"}, "model": {"attention": "xla", "heads": 2}, "log": {"every_steps": 5}}
    batch, device = {"tokens": (8, 16)}, jax.devices()[0].device_kind
    there = {"config": config, "batch": {"tokens": [8, 16]}, "device": device, "devices": jax.device_count()}
    here = config | {"model": {"attention": "auto", "heads": 2}, "log": {"every_steps": 6}}
    file = tmp_path / "old.json"
    assert comparable(here, batch, there, file) == ["config.model.attention: 'xla' there, 'auto' here"]
    for change, said in (
        ({"batch": {"tokens": [8, 32]}}, "its batch is tokens 8x32, here it is tokens 8x16"),
        ({"device": "TPU v9"}, "its devices is '8 x TPU v9', here it is '8 x"),
        ({"config": {"pretext": {"name": "clm"}}}, "its objective is 'clm', here it is 'mlm'"),
    ):
        with pytest.raises(UserError, match=f"cannot compare with {file}") as refusal:
            comparable(here, batch, there | change, file)
        assert said in str(refusal.value)
    for content, said in (("{", "is no JSON"), ("[]", "is no result of sslx.bench")):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            read(file)

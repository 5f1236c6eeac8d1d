"""``metrics.jsonl`` and TensorBoard hold the same numbers, and what a resumed run does again is cut away."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sslx.train.metrics import MetricsWriter, draw_curves, markdown, read_metrics


def events(run):
    """All TensorBoard events of a run: TFRecord is length, its checksum, bytes, their checksum."""
    found = []
    for file in sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def scalars(run):
    return {(event.step, value.tag): value.simple_value for event in events(run) for value in event.summary.value}


def test_numbers_arrive_in_both_places(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"train/loss": 0.1 + 0.2, "train/rate": 1e-30})
    writer.scalars(2, {"eval/loss": 3.5})
    writer.table(2, "eval/examples", [{"text": "a | b", "guess": "c\nd"}])
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 0.1 + 0.2, "train/rate": 1e-30},
        {"step": 2, "eval/loss": 3.5},
    ]
    found = scalars(tmp_path)
    assert found[1, "train/loss"] == pytest.approx(0.3)
    assert found[1, "train/rate"] == pytest.approx(1e-30)
    assert found[2, "eval/loss"] == 3.5
    texts = [v.tensor.string_val[0].decode() for e in events(tmp_path) for v in e.summary.value if "examples" in v.tag]
    assert texts == ["| text | guess |\n| --- | --- |\n| a \\| b | c d |"]


def test_an_alarm_is_a_number_with_its_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.alarm(4, "collapse", "alarm: collapse")
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 4, "alarm/collapse": 1.0, "diagnosis": "alarm: collapse"}]
    assert scalars(tmp_path)[4, "alarm/collapse"] == 1.0
    texts = [v.tensor.string_val[0].decode() for e in events(tmp_path) for v in e.summary.value if v.tensor.string_val]
    assert texts == ["alarm: collapse"]


@pytest.mark.parametrize("resumed_from", [0, 3])
def test_steps_that_run_again_are_cut_away(tmp_path, resumed_from):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 7):
        writer.scalars(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # the process was killed here
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]

    writer = MetricsWriter(tmp_path, resumed_from)
    writer.scalars(resumed_from + 1, {"train/loss": 10.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, resumed_from + 2))
    assert lines[-1]["train/loss"] == 10.0
    # TensorBoard drops what is at or beyond the step of the last session's start.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts[-1] == resumed_from + 1


def test_lines_that_are_no_records_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 2}\n\xff\xfe\n[1]\n7\n{"a": 1}\n\n{"step": 2}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "a": 2}, {"step": 2}]
    assert read_metrics(tmp_path / "nothing") == []


def test_markdown_is_a_table():
    assert markdown([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_curves_show_how_features_spread_and_where_an_alarm_was_raised(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"train/loss": 2.0, "train/learning_rate": 0.1})
    writer.close()
    plain = Image.open(draw_curves(tmp_path, 5.0)).size
    writer = MetricsWriter(tmp_path, 1)
    writer.scalars(2, {"eval/loss": 1.0, "features/std": 0.5, "features/rankme": 9.0})
    writer.alarm(2, "collapse", "alarm: collapse")
    writer.close()
    wide = Image.open(draw_curves(tmp_path, 5.0))
    assert wide.size[0] == 2 * plain[0]  # four panels instead of two
    red = np.asarray(wide.convert("RGB")).astype(int)
    assert ((red[..., 0] > 150) & (red[..., 1:].max(-1) < 70)).any()


def test_curves_are_drawn_where_there_is_a_loss(tmp_path):
    assert draw_curves(tmp_path, 5.0) is None
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 4):
        writer.scalars(step, {"train/loss": 3.0 / step, "train/learning_rate": 0.1})
    writer.scalars(3, {"eval/loss": 1.5, "eval/accuracy": 0.5})
    writer.close()
    assert draw_curves(tmp_path, 5.0).read_bytes().startswith(b"\x89PNG")

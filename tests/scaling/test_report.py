"""The report, on run folders whose losses follow a known law: table, files, picture, predictions and refusals."""

import csv
import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from sslx.errors import UserError
from sslx.scaling import report as reporting
from sslx.scaling.family import Size
from sslx.scaling.fit import fit_law
from sslx.scaling.grid import Row, Study, parse_budget, short
from sslx.scaling.report import repetition_note, report
from sslx.train.console import Console


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(reporting, "fit_law", lambda n, d, y: fit_law(n, d, y, draws=15))


def size(width):
    n = 30 * width**2
    return Size(width, width // 32, width // 32, 2 * width, n + 2048 * width, n, 6.0 * (n + 2048 * width))


def loss(row):
    return 1.8 + 60 / row.size.total**0.33 + 300 / row.tokens**0.38


def make_study(unit="tokens", budgets=("400k", "800k", "1.6M", "3.2M"), sizes=(32, 64, 96, 128)):
    points = [(width, budget, False) for width in sizes for budget in budgets]
    points.append((192, "6M" if unit == "tokens" else "6e13flops", True))
    rows = []
    for index, (width, budget, held_out) in enumerate(points):
        model, amount = size(width), parse_budget(budget).amount
        tokens = amount / (model.flops_per_token if unit == "flops" else 1)
        flops, steps = tokens * model.flops_per_token, round(tokens / 1000)
        name = f"w{width}_{budget}"
        rows.append(Row(index, name, model, budget, held_out, steps, 1, 1e-3, tokens, flops, tokens / 4e6))
    statistics = {"rows": 1, "tokens_per_row": 1.0, "fingerprint": ""}
    return Study(rows, [size(width) for width in (32, 64, 128, 256, 512)], statistics, unit)


def finish(study, workdir, *, but=(), noise=0.002):
    rng = np.random.default_rng(0)
    for row in study.rows:
        if row.name not in but:
            (workdir / row.name).mkdir()
            last = {"step": row.steps, "eval/loss": loss(row) * np.exp(noise * rng.normal())}
            lines = [{"step": 1, "eval/loss": 99.0}, last, {"step": row.steps, "train/loss": 1.0}]
            (workdir / row.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(study, workdir, budgets=(), points=()):
    return report(study, workdir, "total", budgets=budgets, points=points, console=Console())


def test_a_finished_study_is_fitted_written_drawn_and_told(tmp_path, capsys):
    study = make_study()
    finish(study, tmp_path)
    found = run(study, tmp_path, [parse_budget("1e15flops")], [(size(256), parse_budget("10M"))])
    held_out = study.rows[-1]
    assert len(found.fit.losses) == 16  # without the held-out row
    value, low, high = found.held_out[held_out.name]
    assert low < loss(held_out) < high
    assert value == pytest.approx(loss(held_out), rel=0.02)
    told = capsys.readouterr().out
    for part in ("17 of 17 rows finished", "alpha", "frontier", "inside the interval", "best use of 1e+15 FLOPs"):
        assert part in told
    assert "size 256 on 10M tokens" in told
    with open(tmp_path / "study_results.csv", encoding="utf8") as file:
        written = list(csv.DictReader(file))
    assert [row["name"] for row in written] == [row.name for row in study.rows]
    assert float(written[3]["loss"]) == found.losses["w32_3.2M"]
    assert written[-1]["held_out"] == "True"
    results = json.loads((tmp_path / "study_results.json").read_text())
    assert results["fit"]["constants"]["alpha"] == list(found.fit.constants()["alpha"])
    assert results["held_out"][held_out.name]["measured"] == found.losses[held_out.name]
    assert results["optima"][0]["flops"] == 1e15
    picture = matplotlib.image.imread(tmp_path / "study.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.05


def test_an_optimum_that_the_sizes_looked_at_cut_off_is_told_as_a_bound(tmp_path, capsys):
    study = make_study()
    finish(study, tmp_path)
    cut = dataclasses.replace(study, ladder=study.ladder[:2])
    run(study, tmp_path, [parse_budget("1e13flops")])
    assert "≥" not in capsys.readouterr().out
    run(cut, tmp_path, [parse_budget("1e15flops")])
    told = " ".join(capsys.readouterr().out.split())
    greatest = short(size(64).total)
    assert f"N ≥ {greatest} (≥ {greatest} to ≥ {greatest}), tokens ≤ " in told
    assert f"the best may lie beyond the sizes that were looked at, N {short(size(32).total)} to {greatest}" in told


def test_a_held_out_loss_far_from_the_prediction_is_called_outside(tmp_path, capsys):
    study = make_study()
    finish(study, tmp_path)
    record = {"step": study.rows[-1].steps, "eval/loss": 9.9}
    (tmp_path / study.rows[-1].name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run(study, tmp_path)
    assert "it was 9.9000, OUTSIDE the interval" in capsys.readouterr().out


def test_rows_that_are_missing_are_left_out_and_told(tmp_path, capsys):
    study = make_study()
    finish(study, tmp_path, but=("w64_800k", "w192_6M"))
    found = run(study, tmp_path)
    assert len(found.fit.losses) == 15
    told = capsys.readouterr().out
    assert "15 of 17 rows finished" in told
    assert "not finished yet" in told


def test_a_frontier_at_the_edge_of_its_own_interval_is_said_to_say_little(tmp_path, monkeypatch):
    study = make_study(budgets=("400k", "800k"), sizes=(32, 64, 96))
    finish(study, tmp_path)
    noted = []
    for k in ((0.1, 0.05, 0.2), (0.1, 0.05, 0.1)):
        monkeypatch.setattr(reporting, "fit_frontier", lambda c, y, k=k: {"c": (1.5, 1.0, 2.0), "k": k})
        noted.append([note for note in run(study, tmp_path).notes if "at the edge of its interval" in note])
    assert noted[0] == []
    (note,) = noted[1]
    assert note.startswith("6 rows, ")


def test_a_row_that_was_interrupted_after_an_evaluation_is_not_finished(tmp_path):
    study = make_study()
    finish(study, tmp_path)
    (tmp_path / "w32_400k" / "metrics.jsonl").write_text('{"step": 399, "eval/loss": 2.0}\n')
    assert "w32_400k" not in run(study, tmp_path).losses


def test_flop_budgets_have_parabolas(tmp_path, capsys):
    study = make_study("flops", ("1e12flops", "4e12flops", "1.6e13flops"), (32, 64, 96, 128, 192))
    study = dataclasses.replace(study, rows=study.rows[:-1])
    finish(study, tmp_path, noise=0.0)
    found = run(study, tmp_path)
    assert "1.6e13flops" in found.minima
    assert size(32).total < found.minima["1.6e13flops"][0] < size(192).total
    assert "iso-FLOP parabola of 1.6e13flops" in capsys.readouterr().out


def test_too_few_rows_give_a_table_a_note_and_no_prediction(tmp_path, capsys):
    study = make_study(budgets=("400k", "800k"), sizes=(32, 64))
    finish(study, tmp_path)
    found = run(study, tmp_path)
    assert (found.fit, found.frontier) == (None, None)
    told = capsys.readouterr().out
    assert "note: too few finished rows to fit: 4 with 2 sizes and 2 token counts" in told
    assert "note: no compute frontier: too few finished rows (4; 6 needed)" in told
    assert "C^-k" not in told
    assert json.loads((tmp_path / "study_results.json").read_text())["frontier"] is None
    assert (tmp_path / "study.png").is_file()
    with pytest.raises(UserError, match=r"nothing can be predicted: too few finished rows to fit: 4"):
        run(study, tmp_path, [parse_budget("1e15flops")])


def test_a_flop_budget_with_two_finished_rows_has_no_parabola(tmp_path, capsys):
    study = make_study("flops", ("1e12flops", "4e12flops", "1.6e13flops"))
    finish(study, tmp_path, but=("w64_4e12flops", "w96_4e12flops"), noise=0.0)
    assert "4e12flops" not in run(study, tmp_path).minima
    assert "note: no iso-FLOP parabola of 4e12flops: too few rows (2; 3 needed)" in capsys.readouterr().out


def test_a_study_without_a_finished_row_is_told_as_such(tmp_path, capsys):
    found = run(make_study(), tmp_path)
    assert found.losses == {}
    assert "0 of 17 rows finished" in capsys.readouterr().out
    assert not (tmp_path / "study.png").exists()


def test_rows_that_repeat_the_corpus_are_named():
    study = make_study()
    assert "1 of 17 rows see the corpus more than once (up to 1.5 times: w192_6M)" in repetition_note(study)
    assert repetition_note(dataclasses.replace(study, rows=study.fitted)) == ""

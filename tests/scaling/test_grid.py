"""The grid: budgets become steps, every row has a schedule of its own, and a folder keeps to one study."""

import dataclasses
import json

import pytest

from sslx.config import build
from sslx.errors import UserError
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.scaling import grid
from sslx.scaling.family import Family, measure
from sslx.scaling.grid import Asked, Budget, open_study, parse_budget, parse_points, plan
from sslx.session import run_config

FAMILY = Family(head_width=16)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Counting a size is a trace of the model; no test here asks for the same one twice."""
    sizes, of_data = {}, {}

    def remembered(written, family, widths):
        key = json.dumps([written["data"], written["model"], written["batch_size"], dataclasses.asdict(family)])
        missing = [width for width in widths if (key, width) not in sizes]
        if missing:
            found, of_data[key] = measure(written, family, missing)
            sizes.update({(key, size.width): size for size in found})
        return [sizes[key, width] for width in widths], of_data[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "measure", remembered)
        yield


@pytest.fixture(scope="module")
def written(tiny_config):
    """Makes a base config as plain dicts."""

    def make(**changes):
        config = tiny_config("bert_mlm", changes).to_dict()
        return config | dataclasses.asdict(run_config(config, "pretext"))

    return make


def asked(sizes="16,32", budgets="10k,20k", held_out="", warmup=0.1, family=FAMILY):
    return Asked.parse(sizes, budgets, held_out, family, warmup)


@pytest.mark.parametrize(
    ("text", "amount", "unit", "told"),
    [
        ("500k", 5e5, "tokens", "500k"),
        ("1.5M", 1.5e6, "tokens", "1.5M"),
        ("2e6", 2e6, "tokens", "2M"),
        ("3Btokens", 3e9, "tokens", "3B"),
        ("1e13flops", 1e13, "flops", "1e13flops"),
        ("2.5e15FLOPs", 2.5e15, "flops", "2.5e15flops"),
        ("1e+15flops", 1e15, "flops", "1e15flops"),
    ],
)
def test_budgets_are_tokens_or_flops(text, amount, unit, told):
    assert parse_budget(text) == Budget(pytest.approx(amount), unit)
    assert str(parse_budget(text)) == told


@pytest.mark.parametrize("text", ["", "many", "-5k", "0", "1e13flip", "k", "1.2.3M"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError, match=r"unknown budget .*expected tokens, such as 500k"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(budgets=""), "no budgets given"),
        (dict(budgets="1M,1e13flops"), "mixes tokens and FLOPs"),
        (dict(budgets="1M,1000k"), "has a budget twice"),
        (dict(held_out="64"), "'64' is no SIZE:BUDGET; expected one such as 256:4M"),
        (dict(held_out="x:4M"), "'x:4M' is no SIZE:BUDGET"),
        (dict(warmup=1.0), "--warmup_share is 1.0; expected 0 or a share below 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        asked(**changes)


def test_points_are_sizes_with_budgets():
    assert parse_points("64:1M, 128:2e13flops", "predict") == [
        (64, Budget(1e6, "tokens")),
        (128, Budget(2e13, "flops")),
    ]


def test_the_grid_is_every_size_with_every_budget_and_then_what_is_held_out(written):
    study = plan(asked(held_out="48:40k"), written())
    names = ["w16_10k", "w16_20k", "w32_10k", "w32_20k", "w48_40k"]
    assert [row.name for row in study.rows] == names
    assert [row.held_out for row in study.rows] == [False] * 4 + [True]
    assert [row.name for row in study.fitted] == names[:4]
    assert [row.index for row in study.rows] == list(range(5))


def test_every_row_has_a_schedule_of_its_own_length_and_one_full_evaluation(written):
    base = written(**{"eval.batches": 1, "eval.patience": 3, "optimizer.schedule_steps": 7})
    for row in plan(asked(), base).rows:
        config = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
        for key, value in row.overrides().items():
            part, _, name = key.rpartition(".")
            (config[part] if part else config)[name] = value
        run = run_config(config, "pretext")
        assert run.optimizer.schedule_steps == run.steps == run.eval.every_steps == row.steps
        assert run.optimizer.warmup_steps == round(0.1 * row.steps) > 0
        assert (run.eval.batches, run.eval.patience) == (None, None)


def test_token_budgets_are_met_to_the_nearest_step(written):
    base = written()
    for row in plan(asked(), base).rows:
        per_step = base["batch_size"] * 32  # rows are 32 long, hardly padded
        assert row.tokens == pytest.approx({"10k": 1e4, "20k": 2e4}[row.budget], abs=0.51 * per_step)
        assert row.flops == pytest.approx(row.tokens * row.size.flops_per_token)


def test_flop_budgets_give_larger_models_fewer_steps_with_the_same_flops(written):
    base = written()
    for row in plan(asked(budgets="2e9flops,4e9flops"), base).rows:
        config = base | {"model": base["model"] | FAMILY.model(row.size.width, base["model"])}
        objective, _ = MaskedLanguageModel.prepare(config)
        step = objective.flops({"tokens": (base["batch_size"], base["data"]["seq_len"])})
        amount = parse_budget(row.budget).amount
        assert row.steps == round(amount / step)
        assert row.flops == pytest.approx(row.steps * step)
    small, large = (plan(asked(sizes=size, budgets="4e9flops"), base).rows[0] for size in ("16", "32"))
    assert small.steps > large.steps


def test_a_budget_below_one_batch_or_its_warm_up_is_refused_with_one_that_would_do(written):
    with pytest.raises(UserError, match=r"budget 100 is less than one batch at size 16 .*expected at least (\S+)"):
        plan(asked(budgets="100"), written())
    with pytest.raises(UserError, match=r"budget 1k is 2 steps at size 16, too few for a warm-up") as refusal:
        plan(asked(budgets="1k"), written())
    enough = str(refusal.value).rpartition(" ")[2]
    assert plan(asked(budgets=enough), written()).rows[0].warmup_steps == 1
    with pytest.raises(UserError, match="budget 1e06flops is less than one batch"):
        plan(asked(budgets="1e6flops"), written())


def test_a_point_both_fitted_and_held_out_is_refused(written):
    with pytest.raises(UserError, match="w16_10k is in the grid and in --held_out"):
        plan(asked(held_out="16:10k"), written())


def test_a_study_that_is_opened_again_is_the_one_that_was_written(tmp_path, written):
    first = open_study(tmp_path, asked(held_out="48:40k"), written(), write=True)
    assert open_study(tmp_path, asked(held_out="48:40k"), written(), write=True) == first
    assert [size.width for size in first.ladder][-1] >= 4 * 48


def test_listing_writes_nothing(tmp_path, written):
    open_study(tmp_path, asked(), written(), write=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("request_changes", "config_changes", "message"),
    [
        (dict(sizes="16,48"), {}, r"holds another study: --sizes was 16,32, now 16,48; give another --workdir"),
        (dict(budgets="10k,30k"), {}, r"--budgets was 10k,20k, now 10k,30k"),
        (dict(warmup=0.2), {}, r"--warmup_share was 0.1, now 0.2"),
        (dict(family=Family(head_width=16, rate_rule="inverse")), {}, r"rate_rule was sqrt, now inverse"),
        ({}, {"batch_size": 8}, r"config.batch_size was 16, now 8"),
        ({}, {"optimizer.learning_rate": 2e-3}, r"config.optimizer.learning_rate was 0.001, now 0.002"),
        ({}, {"model.activation": "relu"}, r"config.model.activation was gelu, now relu"),
    ],
)
def test_another_study_in_the_same_folder_is_refused_in_one_line(
    tmp_path, written, request_changes, config_changes, message
):
    open_study(tmp_path, asked(), written(), write=True)
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(UserError, match=message) as refusal:
        open_study(tmp_path, asked(**request_changes), written(**config_changes), write=True)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "study.json").read_bytes() == before


def test_what_rows_decide_or_resuming_allows_may_change(tmp_path, written):
    first = open_study(tmp_path, asked(), written(), write=True)
    changed = written(steps=99, **{"model.layers": 5, "optimizer.warmup_steps": 3, "log.every_steps": 7})
    assert open_study(tmp_path, asked(), changed, write=True) == first


def test_other_data_under_the_same_name_is_refused(tmp_path, written):
    open_study(tmp_path, asked(), written(), write=True)
    document = json.loads((tmp_path / "study.json").read_text())
    document["statistics"]["fingerprint"] = "of another day"
    (tmp_path / "study.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="the training data has changed since the study"):
        open_study(tmp_path, asked(), written(), write=True)


def test_a_runs_folder_and_a_damaged_study_are_refused(tmp_path, written):
    (tmp_path / "study.json").write_text('{"asked": ')
    with pytest.raises(UserError, match=r"study.json is damaged"):
        open_study(tmp_path, asked(), written(), write=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the folder of a run; give the study another --workdir"):
        open_study(tmp_path, asked(), written(), write=True)


def test_the_base_configs_model_stays_what_the_family_does_not_decide(written):
    base = written(**{"model.glu": True})
    row = plan(asked(), base).rows[0]
    model = {key.removeprefix("model."): value for key, value in row.overrides().items() if key.startswith("model.")}
    objective, _ = MaskedLanguageModel.prepare(base | {"model": base["model"] | model})
    assert objective.model == build(type(objective.model), base["model"] | FAMILY.model(16, base["model"]))
    assert objective.model.glu

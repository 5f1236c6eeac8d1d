"""Measures of features against closed forms and plain loops, and which rows they are of."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sslx.data.batches import SomeRows
from sslx.errors import UserError
from sslx.pretext.clm import CausalLanguageModel
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.probing.diagnostics import alignment, effective_rank, lidar, measured, rank_me, spread, uniformity
from sslx.session import run_config
from sslx.train.loop import Trainer
from sslx.train.sharding import on_mesh

RNG = np.random.default_rng(0)


def test_the_spread_of_directions_that_are_all_alike_is_1_and_of_one_direction_0():
    assert spread(RNG.normal(size=(4000, 16)) * RNG.uniform(1, 100, (4000, 1))) == pytest.approx(1.0, abs=0.02)
    assert spread(np.outer(RNG.uniform(1, 5, 50), RNG.normal(size=8))) == pytest.approx(0.0, abs=1e-12)
    # Half of the rows at one end of an axis, half at the other: deviation 1 in one of four directions.
    assert spread(np.repeat([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], 5, axis=0)) == pytest.approx(2.0 / 4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_their_number(rank):
    left, _ = np.linalg.qr(RNG.normal(size=(40, 8)))
    right, _ = np.linalg.qr(RNG.normal(size=(8, 8)))
    assert rank_me(5.0 * left[:, :rank] @ right[:rank]) == pytest.approx(rank, rel=1e-4)


def test_rankme_is_exp_of_the_entropy_of_singular_values():
    x = RNG.normal(size=(30, 5)) * [9.0, 3.0, 1.0, 0.1, 0.01]
    values = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    shares = values / values.sum()
    assert rank_me(x) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)
    assert rank_me(1e-20 * x) == pytest.approx(rank_me(x), rel=1e-6)  # of any scale


def test_features_of_nothing_have_rank_1():
    assert effective_rank(np.zeros(4)) == 1.0


def test_alignment_and_uniformity_are_those_of_plain_loops():
    one, other = RNG.normal(size=(2, 7, 3))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))
    assert alignment(one, other) == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(u, v, strict=True)]))
    pairs = [np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i in range(7) for j in range(i)]
    assert uniformity(one) == pytest.approx(np.log(np.mean(pairs)))
    assert uniformity(np.ones((5, 4))) == pytest.approx(0.0)


def test_lidar_counts_the_directions_that_tell_rows_apart_and_not_those_of_the_views():
    rows = np.zeros((300, 1, 6))
    rows[:, 0, :3] = RNG.choice([-1.0, 1.0], (300, 3))  # three directions, as wide as each other
    noise = np.zeros((300, 4, 6))
    noise[..., 3:] = RNG.normal(size=(300, 4, 3))
    assert rank_me((rows + noise).reshape(-1, 6)) > 5  # which takes the views' own for directions of features
    assert lidar(rows + noise) == pytest.approx(3.0, abs=0.1)


def test_lidar_is_that_of_the_paper_written_out():
    views = RNG.normal(size=(20, 3, 4)) + 2 * RNG.normal(size=(20, 1, 4)) * [3.0, 1.0, 0.3, 0.1]
    means, centre = views.mean(1), views.mean((0, 1))
    between = sum(np.outer(m - centre, m - centre) for m in means) / 20
    within = sum(np.outer(v - means[r], v - means[r]) for r in range(20) for v in views[r]) / (20 * 2) + 1e-4 * np.eye(
        4
    )
    values = np.linalg.eigvals(np.linalg.solve(within, between)).real
    shares = values / values.sum()
    assert lidar(views) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)


def test_alignment_and_lidar_need_views_and_all_need_two_rows():
    x = RNG.normal(size=(6, 4))
    assert set(measured(x, np.zeros((6, 0, 4)))) == {"features/std", "features/rankme", "features/uniformity"}
    more = set(measured(x, RNG.normal(size=(6, 2, 4)))) - set(measured(x, np.zeros((6, 0, 4))))
    assert more == {"features/alignment", "features/lidar"}
    assert measured(x[:1], np.zeros((1, 0, 4))) == {}
    assert measured(np.full((3, 4), np.inf), np.zeros((3, 0, 4))) == {}


@pytest.fixture
def trainer(tiny_config):
    def make(name="bert_mlm", **changes):
        written = tiny_config(name, changes).to_dict()
        kind = {"bert_mlm": MaskedLanguageModel, "gpt_clm": CausalLanguageModel}[name]
        objective, data = kind.prepare(written)
        return Trainer(run_config(written, "pretext"), objective, data)

    return make


def test_rows_that_only_fill_up_the_last_batch_do_not_count(trainer, monkeypatch):
    settings = {"diagnostics.rows": 21, "diagnostics.views": 2}  # of batches of 16
    made = trainer(**settings)
    seen = {}
    monkeypatch.setattr(
        "sslx.train.evaluation.measured", lambda x, views: seen.update(x=x, views=views) or measured(x, views)
    )
    state, evaluator = made.program.fresh(), made.evaluator
    with on_mesh(made.program.mesh):
        found = evaluator.diagnose(state.params, state.state, made.data.eval)
        assert found == evaluator.diagnose(state.params, state.state, made.data.eval)  # always the same rows and views
    held = SomeRows(made.data.eval, 21, made.config.seed).fetch(np.arange(21))
    encoded = made.objective.encode(made.objective.encoder(jax.device_get(state.params), {}), held)
    assert (seen["x"].shape, seen["views"].shape) == ((21, 32), (21, 2, 32))
    np.testing.assert_allclose(seen["x"], encoded, atol=1e-5)
    assert not np.allclose(seen["views"][:, 0], seen["views"][:, 1])  # masked at random
    assert found["features/rankme"] == pytest.approx(rank_me(encoded), rel=1e-4)
    assert found["features/alignment"] > 0


def test_views_of_an_objective_that_draws_none_are_refused(trainer):
    with pytest.raises(UserError, match=r"^config.diagnostics.views is 2; CausalLanguageModel draws no random views"):
        trainer("gpt_clm", **{"diagnostics.views": 2})

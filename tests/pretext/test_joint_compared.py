"""How methods of joint embedding put their losses together, from what was seen, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import TINY_VIT

from sslx.models.heads import HeadConfig
from sslx.pretext.barlow_twins import BarlowTwins, BarlowTwinsConfig, barlow_loss
from sslx.pretext.ibot import Ibot, IbotConfig
from sslx.pretext.infomax import Infomax, InfomaxConfig
from sslx.pretext.joint import Given
from sslx.pretext.joint_network import Seen
from sslx.pretext.moco_v3 import MocoV3, MocoV3Config
from sslx.pretext.picture_views import PictureViews
from sslx.pretext.swav import Swav, SwavConfig
from sslx.pretext.vicreg import Vicreg, VicregConfig

ROWS, WIDTH, PROTOTYPES, HIDDEN, PLACES = 6, 4, 5, 3, 2
HEAD = HeadConfig(layers=2, hidden=8, out=WIDTH)


def seen(number):
    """One view's, unlike any other's."""
    draw = np.random.default_rng(number)
    shapes = {
        "features": (ROWS, 8),
        "projection": (ROWS, WIDTH),
        "prediction": (ROWS, WIDTH),
        "scores": (ROWS, PROTOTYPES),
        "patches": (ROWS, HIDDEN, PROTOTYPES),
    }
    return Seen(**{name: jnp.float32(draw.uniform(-1, 1, shape)) for name, shape in shapes.items()})


def terms(cls, pretext, student, teacher=None, *, params=None, state=None, weights=None, step=0):
    """The terms of a loss, each as it counts: its coefficient times the sum over its entries, over their weights."""
    objective = cls(pretext, PictureViews(TINY_VIT, pretext.views), ROWS, 10)
    everyone = {name: jnp.ones(ROWS) for name in objective.terms} | (weights or {})
    given = Given(params or {}, state or {}, everyone, everyone[objective.terms[0]], jnp.int32(step))
    out = objective.compared(student, teacher, given)
    return {name: float(term.coef * term.sum / everyone[name].sum()) for name, term in out.terms.items()}


def units(x):
    x = np.float64(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
    x = np.float64(x)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("filled", [0, 4, 8])
def test_moco_sums_both_directions_times_twice_the_temperature_and_the_queue_is_among_the_negatives(filled):
    tau, students, teachers = 0.3, [seen(0), seen(1)], [seen(2), seen(3)]
    queue = units(np.random.default_rng(9).normal(size=(8, WIDTH)))
    expected = 0.0
    for one, other in ((0, 1), (1, 0)):
        query, key = units(students[one].prediction), units(teachers[other].projection)
        scores = np.concatenate([query @ key.T, query @ queue[:filled].T], axis=1) / tau
        expected -= 2 * tau * np.diag(log_softmax(scores)).mean()
    pretext = MocoV3Config(temperature=tau, queue=8, projector=HEAD, predictor=HEAD)
    state = {"queue": jnp.float32(queue), "filled": jnp.int32(filled)}
    assert terms(MocoV3, pretext, students, teachers, state=state) == pytest.approx({"contrast": expected}, rel=1e-5)


def test_vicreg_weighs_its_terms_25_25_and_1():
    first, second = seen(0), seen(1)
    x, y = np.float64(first.projection), np.float64(second.projection)
    covariances = [np.cov(z.T) for z in (x, y)]
    hinges = [np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean() for c in covariances]
    others = [(c[~np.eye(WIDTH, dtype=bool)] ** 2).sum() / WIDTH for c in covariances]
    expected = {
        "invariance": 25 * ((x - y) ** 2).mean(),
        "variance": 25 * sum(hinges) / 2,
        "covariance": sum(others),
    }
    assert terms(Vicreg, VicregConfig(projector=HEAD), [first, second]) == pytest.approx(expected, rel=1e-5)


def balanced(scores, epsilon):
    """Sinkhorn-Knopp by its definition: rows and prototypes take turns at being shared evenly."""
    shares = np.exp(np.float64(scores) / epsilon)
    for _ in range(3):
        shares = shares / shares.sum(0, keepdims=True) / shares.shape[1]
        shares = shares / shares.sum(1, keepdims=True) / shares.shape[0]
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize(("filled", "step"), [(8, 3), (8, 2), (4, 3)])
def test_swav_balances_each_large_crop_with_the_queue_of_that_crop_once_it_is_full(filled, step):
    views = [seen(number) for number in range(3)]  # two large crops and a small one
    draw = np.random.default_rng(9)
    queue, kernel = units(draw.normal(size=(8, 2, WIDTH))), draw.normal(size=(WIDTH, PROTOTYPES))
    directions = kernel / np.linalg.norm(kernel, axis=0, keepdims=True)
    expected = 0.0
    for large in range(2):
        scores = np.float64(views[large].scores)
        if (filled, step) == (8, 3):
            scores = np.concatenate([scores, queue[:, large] @ directions])
        targets = balanced(scores, 0.5)[:ROWS]
        for other in range(3):
            if other != large:
                expected -= (targets * log_softmax(views[other].scores / 0.2)).sum(1).mean() / 4
    pretext = SwavConfig(prototypes=PROTOTYPES, temperature=0.2, epsilon=0.5, queue=8, queue_start=3, projector=HEAD)
    state = {"queue": jnp.float32(queue), "filled": jnp.int32(filled)}
    params = {"prototypes": {"kernel": jnp.float32(kernel)}}
    found = terms(Swav, pretext, views, params=params, state=state, step=step)
    assert found == pytest.approx({"swapped": expected}, rel=1e-4)


def test_ibot_compares_a_hidden_patch_with_the_same_patch_of_the_same_view():
    students, teachers = [seen(0), seen(1), seen(4)], [seen(2), seen(3)]
    weights = np.float32(np.random.default_rng(9).dirichlet(np.ones(HIDDEN), (ROWS, 2)))
    weights[1, 0], weights[2] = 0, 0  # crops of which nothing is hidden
    centre = np.random.default_rng(8).normal(size=PROTOTYPES)
    expected = 0.0
    for view in range(2):
        targets = np.exp(log_softmax((np.float64(teachers[view].patches) - centre) / 0.05))
        losses = -(targets * log_softmax(students[view].patches / 0.1)).sum(-1)
        expected += (weights[:, view] * losses).sum()
    expected *= 0.5 / weights.sum()
    pretext = IbotConfig(
        prototypes=PROTOTYPES, projector=HEAD, patch_weight=0.5, student_temperature=0.1, teacher_temperature=0.05
    )
    state = {"centre": jnp.zeros(PROTOTYPES), "patch_centre": jnp.float32(centre)}
    found = terms(Ibot, pretext, students, teachers, state=state, weights={"patches": jnp.float32(weights)}, step=10)
    assert found["patches"] == pytest.approx(expected, rel=1e-4)


def test_infomax_scores_the_summary_of_a_view_with_the_places_of_the_other():
    draw = np.random.default_rng(9)
    views = [seen(n).replace(prediction=jnp.float32(draw.normal(size=(ROWS, PLACES, WIDTH)))) for n in (0, 1)]
    expected = 0.0
    for one, other in ((0, 1), (1, 0)):
        summaries, places = np.float64(views[one].projection), np.float64(views[other].prediction)
        scores = np.einsum("id,jpd->ijp", summaries, places) / WIDTH**0.5
        for place in range(PLACES):  # which picture's summary is it, and which picture's place
            expected -= 0.5 * np.diag(log_softmax(scores[..., place].T)).mean() / PLACES
    pretext = InfomaxConfig(projector=HEAD, place_head=HEAD)
    assert terms(Infomax, pretext, views) == pytest.approx({"information": expected}, rel=1e-4)


def test_guessing_costs_barlow_twins_what_unrelated_views_correlate_by_accident():
    objective = BarlowTwins(BarlowTwinsConfig(projector=HEAD), PictureViews(TINY_VIT, BarlowTwinsConfig().views), 8, 10)
    drawn = np.float32(np.random.default_rng(0).normal(size=(2, 4000, 8, WIDTH)))
    losses, _ = jax.vmap(lambda a, b: barlow_loss(a, b, jnp.ones(8), 0.0051))(*drawn)
    assert objective.chance({}) == pytest.approx(float(losses.mean()), rel=0.01)

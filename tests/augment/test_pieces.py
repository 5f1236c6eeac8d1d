"""A picture cut in nine: where the pieces come from, and permutations that are far apart."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sslx.augment.pieces import cut_pieces, distant_permutations


def test_pieces_lie_in_their_cells_in_reading_order():
    y, x = jnp.mgrid[:36, :36] / 36.0
    images = jnp.broadcast_to(jnp.stack([y, x, 0 * x], axis=-1), (50, 36, 36, 3))
    keys = jax.random.split(jax.random.key(0), 50)
    pieces = np.asarray(jax.jit(lambda i, k: cut_pieces(i, k, size=8, share=0.75))(images, keys))
    assert pieces.shape == (50, 9, 8, 8, 3)
    # A ramp's mean tells where the middle of a piece was; a pixel's own middle is half of one from its edge.
    middles = pieces.mean(axis=(2, 3))[..., :2] * 36 + 0.5
    corners = middles - 4.5
    cells = np.stack(np.divmod(np.arange(9), 3), axis=-1) * 12
    jitter = corners - cells
    assert jitter.min() >= -0.1
    assert jitter.max() <= 3.1
    assert np.abs(jitter.mean(axis=(0, 1)) - 1.5).max() < 0.2  # anywhere in the cell
    assert jitter.std(axis=0).min() > 0.5  # each by itself
    steps = np.diff(pieces[..., 4, :, 1], axis=-1) * 36
    np.testing.assert_allclose(steps[:, :, 2:5], 9 / 8, atol=0.02)  # 9 pixels became 8


def test_permutations_are_far_from_each_other():
    found = distant_permutations(60)
    assert found.shape == (60, 9)
    assert found.dtype == np.int32
    assert all(sorted(permutation) == list(range(9)) for permutation in found.tolist())
    distances = [(one != other).sum() for one, other in itertools.combinations(found, 2)]
    random = np.random.default_rng(0).permuted(np.tile(np.arange(9), (60, 1)), axis=1)
    by_chance = [(one != other).sum() for one, other in itertools.combinations(random, 2)]
    assert min(distances) >= 6 > min(by_chance)
    assert np.mean(distances) > np.mean(by_chance)
    np.testing.assert_array_equal(found[:20], distant_permutations(20))


def test_a_thousand_permutations_are_all_different():
    assert len(np.unique(distant_permutations(1000), axis=0)) == 1000

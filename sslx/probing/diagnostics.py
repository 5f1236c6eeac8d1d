"""How features spread: what tells a representation that has collapsed from one that has not, whatever the loss says.

In: features of some held-out rows, float[rows, dim], on the host, and where the objective draws views of a row,
float[rows, views, dim]. Out: numbers, named ``features/...`` in the logs. All of it is NumPy in float64: in single
precision, singular values would end where those of a collapsing encoder begin.

- ``std``: the deviation of unit vectors in each direction, times the root of the width: 1 where they point everywhere
  alike, 0 where all are the same (SimSiam's measure, arXiv 2011.10566).
- ``rankme``: the effective rank, arXiv 2210.02885.
- ``uniformity`` and, of two views, ``alignment``: arXiv 2005.10242.
- ``lidar``: the effective rank of what tells rows apart beside what tells views of a row apart, arXiv 2312.04000.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

EPS = 1e-7  # of RankMe and LiDAR: added to each share
WITHIN = 1e-4  # of LiDAR: added to the covariance of views of a row, in each direction


def measured(features: Float[np.ndarray, "rows dim"], views: Float[np.ndarray, "rows views dim"]) -> dict[str, float]:
    """All that can be said of features, and of the views (there may be none of a row).

    Nothing is said of fewer than two rows, and of features that are not finite: then the loss tells.
    """
    if len(features) < 2 or not (np.isfinite(features).all() and np.isfinite(views).all()):
        return {}
    found = {"std": spread(features), "rankme": rank_me(features), "uniformity": uniformity(features)}
    if views.shape[1] > 1:
        found |= {"alignment": alignment(views[:, 0], views[:, 1]), "lidar": lidar(views)}
    return {f"features/{name}": value for name, value in found.items()}


def spread(features: Float[np.ndarray, "rows dim"]) -> float:
    """The mean over directions of the deviation of unit vectors, times the root of the width."""
    x = unit_rows(features)
    return float(x.std(axis=0).mean() * x.shape[1] ** 0.5)


def rank_me(features: Float[np.ndarray, "rows dim"]) -> float:
    """``exp`` of the entropy of the singular values as shares of their sum; from 1 to the width."""
    return effective_rank(np.linalg.svd(np.asarray(features, np.float64), compute_uv=False))


def lidar(views: Float[np.ndarray, "rows views dim"]) -> float:
    """The effective rank of linear discriminant analysis in which each row is a class and its views are samples."""
    views = np.asarray(views, np.float64)
    rows, count, dim = views.shape
    means = views.mean(axis=1)
    between = np.cov(means, rowvar=False, bias=True).reshape(dim, dim)
    apart = (views - means[:, None]).reshape(rows * count, dim)
    within = apart.T @ apart / (rows * (count - 1)) + WITHIN * np.eye(dim)
    values, vectors = np.linalg.eigh(within)
    whitened = vectors / np.sqrt(values)
    return effective_rank(np.linalg.eigvalsh(whitened.T @ between @ whitened).clip(min=0.0))


def effective_rank(values: Float[np.ndarray, " values"]) -> float:
    """``exp`` of the entropy of values as shares of their sum; 1 where all are 0."""
    total = values.sum()
    if not total > 0:
        return 1.0
    shares = values / total + EPS
    return float(np.exp(-np.sum(shares * np.log(shares))))


def alignment(one: Float[np.ndarray, "rows dim"], other: Float[np.ndarray, "rows dim"]) -> float:
    """The mean squared distance of unit vectors of two views of a row; 0 is best."""
    return float(np.mean(np.sum((unit_rows(one) - unit_rows(other)) ** 2, axis=1)))


def uniformity(features: Float[np.ndarray, "rows dim"]) -> float:
    """``log`` of the mean of ``exp(-2 d²)`` over pairs of rows, d their distance as unit vectors; 0 if all are one."""
    x = unit_rows(features)
    one, other = np.triu_indices(len(x), 1)
    squared = np.clip(2.0 - 2.0 * (x @ x.T)[one, other], 0.0, None)
    return float(np.log(np.mean(np.exp(-2.0 * squared))))


def unit_rows(features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
    """Rows of length 1; one of zeros stays."""
    x = np.asarray(features, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

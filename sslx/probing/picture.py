"""A picture of features in two dimensions, coloured by label: by t-SNE, or on the directions of most variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

TSNE_ROWS = 2000  # beyond these it takes minutes
SHOWN = 20  # labels with a colour of their own; the others are grey


def project(features: Float[np.ndarray, "rows dim"]) -> tuple[Float[np.ndarray, "rows 2"], Float[np.ndarray, "2"]]:
    """Principal components of features, and the shares of the variance that they hold."""
    centred = np.asarray(features, np.float64) - features.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    share = values[::-1][:2] / max(values.sum(), 1e-12)
    return centred @ directions[:, ::-1][:, :2], share


def neighbourhoods(features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows 2"]:
    """t-SNE (van der Maaten and Hinton 2008): rows that are near each other stay so; distances beyond mean nothing."""
    if len(features) < 4:
        return project(features)[0]
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(np.asarray(features, np.float64))


def draw_projections(
    features: Mapping[str, Float[np.ndarray, "rows dim"]],
    labels: Int[np.ndarray, " rows"],
    names: Sequence[str],
    kind: str = "pca",
) -> Figure:
    """One panel a set of features of the same rows; of many rows, a sample for ``kind="tsne"``."""
    if kind == "tsne" and len(labels) > TSNE_ROWS:
        some = np.sort(np.random.default_rng(0).permutation(len(labels))[:TSNE_ROWS])
        features, labels = {title: x[some] for title, x in features.items()}, labels[some]
    figure = Figure(figsize=(5.5 * len(features) + 2, 5.5), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    present, counts = np.unique(labels, return_counts=True)
    shown = present[np.argsort(-counts, kind="stable")][:SHOWN]
    colours = matplotlib.colormaps["tab20"].colors
    for axes, (title, x) in zip(panels, features.items(), strict=True):
        points, share = (neighbourhoods(x), None) if kind == "tsne" else project(x)
        rest = ~np.isin(labels, shown)
        axes.scatter(*points[rest].T, s=6, color="0.8", label="others" if rest.any() else None)
        for colour, label in zip(colours, shown, strict=False):
            axes.scatter(*points[labels == label].T, s=6, color=colour, label=names[label])
        axes.set_title(title)
        if share is None:
            axes.set(xticks=[], yticks=[], xlabel="t-SNE")
            continue
        axes.set_xlabel(f"component 1 ({share[0]:.0%} of the variance)")
        axes.set_ylabel(f"component 2 ({share[1]:.0%})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, markerscale=2)
    return figure

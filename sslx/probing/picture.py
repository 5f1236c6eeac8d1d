"""A picture of features: their projection on the two directions of most variance, coloured by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

SHOWN = 20  # labels with a colour of their own; the others are grey


def project(features: Float[np.ndarray, "rows dim"]) -> tuple[Float[np.ndarray, "rows 2"], Float[np.ndarray, "2"]]:
    """Principal components of features, and the shares of the variance that they hold."""
    centred = np.asarray(features, np.float64) - features.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    share = values[::-1][:2] / max(values.sum(), 1e-12)
    return centred @ directions[:, ::-1][:, :2], share


def draw_projections(
    features: Mapping[str, Float[np.ndarray, "rows dim"]], labels: Int[np.ndarray, " rows"], names: Sequence[str]
) -> Figure:
    """One panel a set of features of the same rows."""
    figure = Figure(figsize=(5.5 * len(features) + 2, 5.5), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    present, counts = np.unique(labels, return_counts=True)
    shown = present[np.argsort(-counts, kind="stable")][:SHOWN]
    colours = matplotlib.colormaps["tab20"].colors
    for axes, (title, x) in zip(panels, features.items(), strict=True):
        points, share = project(x)
        rest = ~np.isin(labels, shown)
        axes.scatter(*points[rest].T, s=6, color="0.8", label="others" if rest.any() else None)
        for colour, label in zip(colours, shown, strict=False):
            axes.scatter(*points[labels == label].T, s=6, color=colour, label=names[label])
        axes.set_title(title)
        axes.set_xlabel(f"component 1 ({share[0]:.0%} of the variance)")
        axes.set_ylabel(f"component 2 ({share[1]:.0%})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, markerscale=2)
    return figure

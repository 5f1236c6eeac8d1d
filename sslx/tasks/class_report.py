"""What is said of guessed classes at the end of a task: macro-F1, a table by class, and who is taken for whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix, f1_score

from sslx.objective import Report


def class_scores(labels: Int[np.ndarray, " rows"], guesses: Int[np.ndarray, " rows"]) -> dict[str, float]:
    """``macro_f1``: the mean over the classes that occur in either."""
    present = np.union1d(labels, guesses)
    return {"macro_f1": float(f1_score(labels, guesses, labels=present, average="macro", zero_division=0))}


def class_report(
    labels: Int[np.ndarray, " rows"], guesses: Int[np.ndarray, " rows"], label_names: Sequence[str]
) -> Report:
    """Precision, recall and F1 by class, and the confusion matrix as numbers and as a figure."""
    present = np.union1d(labels, guesses)
    names = [label_names[label] for label in present]
    options = dict(labels=present, target_names=names, zero_division=0)
    matrix = confusion_matrix(labels, guesses, labels=present)
    values = {
        "classification_report": classification_report(labels, guesses, output_dict=True, **options),
        "labels": names,
        "confusion_matrix": matrix.tolist(),
    }
    text = classification_report(labels, guesses, digits=3, **options)
    return Report(text, values, {"confusion_matrix": draw_confusion(matrix, names)})


def draw_confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """Shares of each true label's rows, with the counts written in."""
    size = min(3.5 + 0.45 * len(names), 24)
    figure = Figure(figsize=(size, size * 0.9), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 30:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
    return figure

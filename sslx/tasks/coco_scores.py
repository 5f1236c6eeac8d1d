"""COCO's mean average precision, as its own code computes it (``pycocotools``).

In: by picture, the true boxes and the guessed ones, in the picture's own pixels. Out: ``map`` (over IoU 0.50 to 0.95),
``map50``, ``map75``, and what else COCO's table has.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sslx.errors import UserError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# COCOeval.stats, in its order.
STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large"),
)


def require_pycocotools() -> None:
    """Refuses to go on without ``pycocotools``.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("object detection is scored by pycocotools, which is not installed; pip install pycocotools")


def coco_scores(
    truth: Sequence[dict[str, np.ndarray]], guesses: Sequence[dict[str, np.ndarray]], classes: int
) -> tuple[dict[str, float], list[float]]:
    """Scores of all pictures.

    Args:
      truth: By picture, ``boxes`` float[n, 4] (left, top, right, bottom), ``classes`` int[n], ``crowd`` bool[n] and
        ``area`` float[n].
      guesses: By picture, ``boxes``, ``classes`` and ``scores`` float[n].
      classes: How many there are.

    Returns:
      `STATS`, NaN for sizes of which there is no object; and ``map`` of each class, NaN likewise.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_dataset(truth, classes), _dataset(guesses, classes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"]  # [IoU, recall, class, size, most guesses]; -1: no such object
    of_class = [_mean(precision[:, :, kind, 0, -1]) for kind in range(classes)]
    return {name: _known(value) for name, value in zip(STATS, evaluation.stats, strict=True)}, of_class


def _dataset(pictures: Sequence[dict[str, np.ndarray]], classes: int) -> COCO:
    """Boxes of all pictures as COCO's code holds them, true ones and guessed ones alike."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for picture, of in enumerate(pictures):
        corner, extent = of["boxes"][:, :2], of["boxes"][:, 2:] - of["boxes"][:, :2]
        nothing = np.zeros(len(corner))
        columns = (of.get("area", extent.prod(axis=1)), of.get("crowd", nothing), of.get("scores", nothing))
        rows = zip(np.concatenate([corner, extent], axis=1), of["classes"], *columns, strict=True)
        for box, kind, area, crowd, score in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would count as no match
                    "image_id": picture,
                    "category_id": int(kind),
                    "bbox": [float(value) for value in box],  # left, top, width, height
                    "area": float(area),
                    "iscrowd": int(crowd),
                    "score": float(score),
                }
            )
    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": picture} for picture in range(len(pictures))],
        "annotations": annotations,
        "categories": [{"id": kind} for kind in range(classes)],
    }
    dataset.createIndex()
    return dataset


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values[values > -1])) if (values > -1).any() else float("nan")


def _known(value: float) -> float:
    return float(value) if value > -1 else float("nan")

"""Mean teacher (arXiv 1703.01780): a classifier from few labels, which says of all pictures what its average says.

In: pictures, of which ``labels_per_class`` of each class keep their labels. Views: two random ones of each, so that
student and teacher see different crops. Out: the term ``classification``, the cross-entropy of the student on labelled
rows; and ``consistency``, the mean square between what student and teacher make of a picture, as shares of the
classes, over all rows. Its weight rises as exp(-5 (1 - t)²) over the first ``ramp_steps`` updates, while the teacher
knows nothing yet. Weights are of means: the authors' code divides the sum over labelled rows by the whole batch, so
that its weight of 100 is 100 / ``labelled_share`` here.

The teacher is the moving average that `sslx.tasks.image_classification` keeps (``ema``): it takes no gradient,
normalises by its own batch statistics, and is what is evaluated and exported. Batches are mixed as the authors' are, by
repeating labelled rows until they are ``labelled_share`` of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.data.images import ImageRows, of_each_class
from sslx.data.prepared import PreparedPictures
from sslx.data.sources import HIDDEN
from sslx.errors import UserError
from sslx.models.statistics import NAME as STATISTICS
from sslx.models.statistics import apply_with_statistics
from sslx.models.teacher import followed
from sslx.objective import Batch, Out, Term
from sslx.tasks.image_classification import ImageClassification, ImageClassificationConfig

TEACHER_STATISTICS = "teacher_statistics"  # of what an update has seen


@dataclasses.dataclass(frozen=True)
class MeanTeacherConfig(ImageClassificationConfig):
    """``config.task`` of ``name="mean_teacher"``."""

    name: str = "mean_teacher"
    ema: float = 0.99  # the teacher's momentum
    labels_per_class: int = 100  # that keep their labels, drawn by the run's seed
    labelled_share: float = 0.25  # of the rows of a batch, on average
    consistency: float = 100.0  # weight of the term, at the end of its rise; with 0 only labels teach
    ramp_steps: int = 200  # 0: it has all its weight from the start

    def __post_init__(self):
        super().__post_init__()
        if not self.ema:
            raise UserError("config.task.ema is 0, and a mean teacher is the moving average; expected a share below 1")
        if self.labels_per_class < 1:
            raise UserError(f"config.task.labels_per_class is {self.labels_per_class}; expected at least 1")
        if not 0 < self.labelled_share < 1:
            raise UserError(f"config.task.labelled_share is {self.labelled_share}; expected a share between 0 and 1")
        if min(self.consistency, self.ramp_steps) < 0:
            raise UserError(
                f"config.task.consistency is {self.consistency} after {self.ramp_steps} ramp_steps; expected at least "
                "0 of both"
            )
        if self.mixup or self.cutmix or self.probe:
            raise UserError(
                "config.task.mixup, cutmix and probe do not go with a mean teacher: it would see other pictures than "
                "its student, or teach a head alone"
            )


class SomeLabels(ImageRows):
    """All rows without labels, then those with labels as often as gives them their share."""

    def __init__(self, rows: ImageRows, labelled: np.ndarray, share: float):
        times = max(1, round(share / (1 - share) * len(rows) / len(labelled)))
        self._rows, self._places = rows, np.concatenate([np.arange(len(rows)), np.tile(labelled, times)])
        labels = np.full(len(self._places), HIDDEN, np.int32)
        labels[len(rows) :] = rows.labels[self._places[len(rows) :]]
        super().__init__(labels)

    def __len__(self) -> int:
        return len(self._places)

    def _images(self, ids: np.ndarray, draws: list[np.random.SeedSequence] | None) -> np.ndarray:
        return self._rows._images(self._places[ids], draws)


def ramp(step: Array, steps: int) -> Float[Array, ""]:
    """From exp(-5) at step 0 to 1 at ``steps`` and after."""
    done = jnp.clip(step / max(steps, 1), 0.0, 1.0) if steps else 1.0
    return jnp.exp(-5.0 * jnp.square(1.0 - jnp.asarray(done, jnp.float32)))


def consistency(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """The mean square between the shares of the classes that two rows of logits give."""
    return jnp.mean((jax.nn.softmax(student) - jax.nn.softmax(teacher)) ** 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class MeanTeacher(ImageClassification):
    """The objective of ``config.task.name = "mean_teacher"``."""

    task_config = MeanTeacherConfig

    task: MeanTeacherConfig

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[MeanTeacher, PreparedPictures]:
        """Builds objective and data from the written config.

        Raises:
          UserError: as of image classification, or a class has too few rows.
        """
        objective, data = super().prepare(config, tokenizer)
        task = objective.task
        labelled = of_each_class(
            data.train.labels, task.labels_per_class, config["seed"], data.label_names, "train", "task"
        )
        train = SomeLabels(data.train, labelled, task.labelled_share)
        statistics = data.statistics | {"train_labelled": len(labelled)}
        return objective, dataclasses.replace(data, train=train, statistics=statistics)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        student_key, teacher_key = jax.random.split(key)
        viewed = super().views(batch, student_key, step, train=train)
        labelled = (batch["label"] >= 0).astype(jnp.float32)
        weights = {"classification": labelled * viewed["weights"]["classification"]}
        if not train:
            return viewed | {"weights": weights}
        other = super().views(batch, teacher_key, step, train=train)["image"]
        return viewed | {"other": other, "weights": weights | {"consistency": jnp.ones_like(labelled)}}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        if not train:
            return super().loss(params, state, batch, key, step, train=False)
        student_key, teacher_key = jax.random.split(key)
        logits, stats = apply_with_statistics(self.module, params, state, batch, student_key, train=True)
        own = jax.lax.stop_gradient(state["ema"])
        taught, moved = apply_with_statistics(
            self.module, own["params"], own, batch | {"image": batch["other"]}, teacher_key, train=True
        )
        out = self.classified(logits, batch)
        each = ramp(step, self.task.ramp_steps) * consistency(logits, jax.lax.stop_gradient(taught))
        term = Term(jnp.sum(batch["weights"]["consistency"] * each), self.task.consistency)
        stats |= {TEACHER_STATISTICS: moved[STATISTICS]} if moved else {}
        return out.replace(terms=out.terms | {"consistency": term}, stats=stats)

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        """Moves the teacher; its running averages are those of its own passes."""
        after = super().after_update(params, state, stats, key, step)
        if TEACHER_STATISTICS not in stats:
            return after
        passes = followed(stats[TEACHER_STATISTICS].value, after[STATISTICS], jnp.float32(1.0), step)
        return {**after, "ema": after["ema"] | {STATISTICS: passes}}

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        return super().flops(batch_shapes) + batch_shapes["image"][0] * self.model.features_flops()

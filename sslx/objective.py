"""The contract between a method and the loop: pure functions over ``(params, state, batch, key, step)``.

A pretext task or a downstream task is a frozen dataclass that derives from ``Objective``. The loop, the step, sharding,
checkpoints, logging and evaluation know nothing of any method beyond this file.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, Any]
Variables = dict[str, Any]


@flax.struct.dataclass
class Term:
    """One named part of a loss, as a weighted sum that has not been divided yet.

    The weights are in ``batch["weights"][name]``, put there by ``views``. They depend on the views alone, so the step
    can total them over the whole batch before it splits the batch in micro-batches, and divide once, globally.

    Attributes:
      sum: float32[], the sum of weight · value over the rows at hand.
      coef: The term's coefficient in the total loss.
    """

    sum: Float[Array, ""]
    coef: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class Mean:
    """A metric that adds up over micro-batches and evaluation batches: float32[] ``sum`` over float32[] ``weight``."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]


@flax.struct.dataclass
class Sum:
    """A statistic for ``after_update`` that adds up over micro-batches (a centre, codebook counts)."""

    value: Any


@flax.struct.dataclass
class Rows:
    """A statistic for ``after_update`` with one entry a row, put back in row order over micro-batches (a queue)."""

    value: Any


@flax.struct.dataclass
class Out:
    """What ``Objective.loss`` returns."""

    terms: dict[str, Term]
    metrics: dict[str, Mean] = flax.struct.field(default_factory=dict)
    stats: dict[str, Sum | Rows] = flax.struct.field(default_factory=dict)


class Objective(abc.ABC):
    """A pretext or downstream task. Every method is pure; subclasses are frozen dataclasses."""

    # "batch": a value depends on the whole batch; "representations": only through what ``represent`` gives of each row.
    scope: ClassVar[Literal["row", "batch", "representations"]] = "row"
    scored: ClassVar[bool] = False  # evaluation collects predictions of all held-out rows for ``score``
    modality: ClassVar[str] = "text"  # what its rows are of: text | images
    unit: ClassVar[str] = "nats"  # of its loss; "" where it has none
    # Rows of the training data that evaluation compares held-out rows with, and how many of these; 0: none.
    bank_rows: ClassVar[int] = 0
    compared_rows: ClassVar[int] = 0
    # What usually helps against an alarm, by the alarm's name, where it is something else than in general.
    remedies: ClassVar[Mapping[str, str]] = {}
    # Metrics that are spreads, 1 if all is well and 0 at a collapse, which alarms watch beside the features' own.
    spreads: ClassVar[tuple[str, ...]] = ()
    # Metrics that count directions, 1 at a collapse, which alarms watch beside the features' effective rank.
    ranks: ClassVar[tuple[str, ...]] = ()
    # Answers are shared out evenly over all rows, so that one that is certain is no sign of all being the same.
    balanced: bool = False
    # What each output of ``params["head"]`` is about, if there is one; export asks, as its shape does not tell.
    head_reads: ClassVar[Literal["rows", "tokens", "spans"]] = "rows"

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        """Returns ``{"params", "state"}``, both boxed with logical axis names."""

    @abc.abstractmethod
    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        """Draws masks, crops, noise; adds ``weights``, a dict of float32[batch, ...] with one entry a term.

        Randomness comes from ``key`` folded with ``batch["row"]``, so that a row's view does not depend on the mesh.
        """

    @abc.abstractmethod
    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        """The terms of the loss, metrics and statistics on one (micro-)batch that ``views`` has been through."""

    def represent(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Any:
        """Arrays with an entry a row, from which ``compare_rows`` makes the loss; of ``scope = "representations"``."""
        raise NotImplementedError

    def compare_rows(self, represented: Any, params: Any, state: Any, batch: Batch, step: Array) -> Out:
        """What ``loss`` returns, from what ``represent`` made of the rows, and no gradient but through that."""
        raise NotImplementedError

    @classmethod
    @abc.abstractmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Objective, Any]:
        """Builds the objective and its data from the whole written config.

        Args:
          config: The config, with ``data``, ``model`` and the objective's own part.
          tokenizer: Folder of the tokenizer of the run that is resumed or started from; None: as configured.

        Returns:
          The objective, and data with row sets ``train``, ``eval`` and ``test`` (or None), a dict ``statistics``
          and ``save(folder)``, which writes what ``restored`` and other later readers need (a tokenizer, labels).
        """

    @classmethod
    def restored(cls, config: Mapping[str, Any], run: Path) -> Objective:
        """The objective of a trained run from its config and what ``save`` wrote into its folder, without its data.

        Raises:
          UserError: the folder lacks something.
        """
        raise UserError(f"{cls.__name__} cannot be used without its data: it has no restored(config, run)")

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct]]:
        """The objective and the shapes of one row (no batch axis) from the config alone, for planning without data.

        What only the data knows (the true vocabulary, the number of classes) is taken as configured or guessed.
        """
        raise UserError(f"{cls.__name__} cannot be planned: it has no abstract(config)")

    @classmethod
    def modality_of(cls, config: Mapping[str, Any]) -> str:
        """The ``modality`` of a run with this whole written config, before anything of it is built."""
        return cls.modality

    @classmethod
    @abc.abstractmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        """What fine-tuning, probes and export reload: ``{"params": ...}`` of the encoder (or the teacher).

        An objective that starts from such an encoder keeps it as ``params["encoder"]``.
        """

    def parts(self, params: Any, state: Any) -> dict[str, Any]:
        """Parameters as they are exported: ``encoder``, as `encoder` gives it, and the heads beside it by name."""
        return {**params, "encoder": self.encoder(params, state)["params"]}

    @abc.abstractmethod
    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        """Features of rows, float32, from what ``encoder`` returned."""

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Forward FLOPs of ``encode`` on one row of a batch of these shapes, of objectives whose rows have labels."""
        raise NotImplementedError

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch | None:
        """A random view of each row, as ``encode`` takes rows, that features should hardly depend on; None: has none.

        Diagnostics compare several of them; training asks ``views``.
        """
        return None

    @abc.abstractmethod
    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Model FLOPs of one training step (forward and backward, no recomputation) on a batch of these shapes."""

    def after_update(self, params: Any, state: Any, stats: dict, key: PRNGKeyArray, step: Array) -> Any:
        """The next ``state``: EMA teacher, centre, codebook, queue. Runs once an update, not once a micro-batch."""
        return state

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The loss of a guessing or collapsed model, from corpus statistics; None where nothing is known."""
        return None

    def entropies(self) -> Mapping[str, tuple[float, str]]:
        """Metrics that are entropies of answers, with the most that each can be and the metric of the divergence that
        is 0 where all rows have the same answers: a teacher's, which alarms watch."""
        return {}

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Evaluation metrics that follow from others, such as perplexity; on the host."""
        return {}

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        """Per-row arrays for ``score`` and ``show``, made on device from a batch that ``views`` has been through."""
        return {}

    def remember(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        """What ``compare`` needs of training rows that have been through no ``views``, an entry a row; on device."""
        return {}

    def compare(self, params: Any, state: Any, batch: Batch, bank: Mapping[str, Array]) -> dict[str, Mean]:
        """Metrics of held-out rows, through no ``views``, beside what ``remember`` made of ``bank_rows`` others."""
        return {}

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch ..."] | None:
        """What the head says of rows that have been through no ``views``, float32, for export; None: it has no head."""
        return None

    def score(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics that do not add up over batches (F1, mAP, R@k), from ``predict`` of all held-out rows; on the host.

        Evaluation collects predictions only where ``scored`` is True.
        """
        return {}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        """Rows of a table that let a person judge the model, from ``predict`` of a few held-out rows; [] shows none."""
        return []

    def pictures(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sheets by name, uint8[height, width, 3], from ``predict`` of a few held-out rows; {} draws none."""
        return {}

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        """What the model will see of each row: from a batch before and after ``views``, both on the host."""
        return [
            {name: str(np.asarray(array)[row]) for name, array in batch.items()} for row in range(len(batch["row"]))
        ]

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Sheets of what the model will see, as `pictures`, from what ``preview`` takes."""
        return {}

    def report(self, predictions: Mapping[str, np.ndarray]) -> Report:
        """The final report of a downstream task on its test rows."""
        return Report("", {}, {})


@dataclasses.dataclass(frozen=True)
class Report:
    """What a task says at its end: text for the console, JSON values, and figures by file name."""

    text: str
    values: dict[str, Any]
    figures: dict[str, Figure]


def rows_compared(batch_size: int, statistics: Mapping[str, float]) -> int:
    """How many rows a held-out loss compares: a batch of them, or all that are held out if they are fewer."""
    return max(2, min(batch_size, int(statistics.get("eval_rows", batch_size))))


def row_keys(key: PRNGKeyArray, rows: Array) -> PRNGKeyArray:
    """One key a row, from the row's global id: the same whatever device, host or micro-batch the row is on."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

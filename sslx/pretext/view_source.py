"""What joint embedding asks of a modality: several views of each row, and an encoder of them.

`picture_views.PictureViews` and `sentence_views.SentenceViews` have it; a method's file knows of neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.objective import Batch, Variables


class ViewSource(Protocol):
    """Rows of one modality as a source of views; frozen."""

    modality: ClassVar[str]  # as `Objective.modality`
    models: ClassVar[tuple[str, ...]]  # whose name in ``config.model`` means this modality
    # Of a row, which no one looks at after its views were made; all have the rows' axis.
    fields: ClassVar[tuple[str, ...]]

    model: Any  # the encoder's config, with ``batch_norm`` and ``features_width``
    config: Any  # of the views

    @property
    def varied(self) -> bool:
        """Whether views are other arrays than the row; else all that tells them apart is drawn inside the encoder."""
        ...

    @classmethod
    def built(
        cls, config: Mapping[str, Any], views: Mapping[str, Any] | None, usual: Any, models: tuple[str, ...]
    ) -> tuple[Self, Any]:
        """From a written config, as far as that is known without data.

        Args:
          config: All of it.
          views: Its ``config.pretext.views``; None: there is none.
          usual: The views that the method has where nothing is said, perhaps of another modality.
          models: Those that the method can train.

        Returns:
          The source, and the config of the data.

        Raises:
          UserError: parts of it cannot be, or not together.
        """
        ...

    def prepare(self, data: Any, seed: int, tokenizer: str | None) -> tuple[Self, Any]:
        """The source as it is with its data, and the data of a run, as `Objective.prepare` gives them."""
        ...

    def restored(self, run: Path) -> Self:
        """The source as a run's folder has it, without data."""
        ...

    @staticmethod
    def abstract_row(data: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a row."""
        ...

    def undropped(self) -> Self:
        """The source for a teacher, whose encoder has no dropout."""
        ...

    def views(self, batch: Batch, key: PRNGKeyArray) -> list[Batch]:
        """The views of all rows, each a batch for the encoder; the two whole ones come first."""
        ...

    def encoder(self) -> nn.Module:
        """The Linen module."""
        ...

    def features(self, encoder: nn.Module, view: Batch, *, deterministic: bool) -> Float[Array, "batch width"]:
        """What the encoder makes of a view; ``deterministic`` normalises by running averages."""
        ...

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch width"]:
        """Features of rows as they are, float32."""
        ...

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> list[float]:
        """Forward FLOPs of the features of each view of a row."""
        ...

    def features_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Forward FLOPs of the features of a row as it is."""
        ...

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> list[dict[str, str]]:
        """What a person is told of each row and its views, as `Objective.preview`."""
        ...

    def preview_pictures(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Sheets of rows and views, as `Objective.preview_pictures`."""
        ...

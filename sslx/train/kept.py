"""What a run goes on with beside its arrays: the best so far, patience, skipped steps, alarms; JSON in a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from sslx.errors import UserError
from sslx.settings import RunConfig
from sslx.train.alarms import Alarms


@dataclasses.dataclass
class Progress:
    """What resuming needs beside the arrays; saved with every checkpoint as JSON."""

    metric: str = ""  # what ``best`` is a value of, and which way is better: "eval/loss min"
    best: float | None = None
    best_step: int | None = None
    failures: int = 0  # evaluations since the best
    data: str = ""  # fingerprint of the prepared data
    skipped: int = 0  # steps whose update was left out
    last_skipped: int = 0  # the latest of them, counted from 1
    in_succession: int = 0  # how many they are, with those directly before it
    alarms: dict[str, Any] = dataclasses.field(default_factory=lambda: dataclasses.asdict(Alarms()))

    def exhausted(self, patience: int | None) -> bool:
        """Whether the run has failed to improve for too long; asked anew on resuming, since patience may be raised."""
        return patience is not None and self.failures >= patience

    def skip(self, step: int) -> None:
        """Counts a step whose update was left out."""
        self.in_succession = self.in_succession + 1 if self.last_skipped == step - 1 else 1
        self.skipped, self.last_skipped = self.skipped + 1, step

    @classmethod
    def resumed(cls, saved: dict[str, Any], config: RunConfig, fingerprint: str) -> Progress:
        """What was saved, as this config goes on with it: another metric to select by starts a new search.

        Raises:
          UserError: the data is not that of the run.
        """
        kept = cls(**{name: value for name, value in saved.items() if name in cls.__dataclass_fields__})
        metric = f"{config.checkpoint.best_metric} {config.checkpoint.best_mode}"
        if saved and kept.metric != metric:
            kept = dataclasses.replace(kept, best=None, best_step=None, failures=0)
        kept.metric = metric
        if kept.data and kept.data != fingerprint:
            raise UserError(
                "the training data has changed since this run was started (files, splits or package versions), so its "
                "rows would not be the same; restore the data or give another --workdir"
            )
        kept.data = fingerprint
        return kept

"""Alarms: what is going wrong, by name and with the usual remedies, from the numbers of each evaluation.

In: an evaluation's metrics and what earlier ones have left (`Alarms`, JSON in the checkpoint, so that a resumed run
raises the same alarms at the same steps). Out: lines. Nothing is judged during the warm-up, and an alarm is raised when
its sign has been there for ``config.alarms.evaluations`` in succession:

- ``no_learning``: the held-out loss is within ``chance_band`` of its chance value (`Objective.chance`).
- ``collapse``: the spread of features, or one that the objective watches (`Objective.spreads`, such as that of
  projections), is under ``std_floor``, or under ``std_share`` of the most that it was.
- ``low_rank``: their effective rank is under ``rank_floor``, or a number of directions that the objective watches
  (`Objective.ranks`) under ``directions_floor``.
- ``peaked`` and ``uniform``: an entropy of the objective's (`Objective.entropies`, such as a teacher's) is within
  ``entropy_band`` of 0 or of the most that it can be, and the divergence beside it of 0: all rows have one answer, or
  all answers alike. Where answers are balanced, certain ones are what is wanted, and none is ``peaked``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sslx.objective import Objective
from sslx.settings import AlarmsConfig

# What each means, and what helps where an objective does not know better (`Objective.remedies`).
MEANINGS = {
    "no_learning": "the model does no better than a guess",
    "collapse": "the features of all rows become one",
    "low_rank": "the features fill a few directions only",
    "peaked": "the same answer is given to every row",
    "uniform": "all answers are given alike to every row",
}
REMEDIES = {
    "no_learning": "a learning rate ten times higher or lower, a longer warm-up, more steps; python -m sslx.preview "
    "shows whether what is asked can be answered",
    "collapse": "a lower learning rate, a longer warm-up, views that differ more",
    "low_rank": "a lower learning rate, views that differ more, less weight decay",
    "peaked": "a higher temperature of the teacher, or stronger balancing (centring, Sinkhorn)",
    "uniform": "a lower temperature of the teacher, or weaker balancing",
}


@dataclasses.dataclass
class Alarms:
    """What earlier evaluations have left."""

    in_succession: dict[str, int] = dataclasses.field(default_factory=dict)  # evaluations with each sign
    raised: list[str] = dataclasses.field(default_factory=list)  # alarms that go on
    largest: dict[str, float] = dataclasses.field(default_factory=dict)  # each spread at its most

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Alarms:
        """From what was saved with a checkpoint; {} of a new run."""
        return cls(**saved)

    def judge(
        self, metrics: Mapping[str, float], objective: Objective, chance: float | None, config: AlarmsConfig
    ) -> dict[str, str]:
        """Counts the signs in an evaluation after the warm-up; returns the lines of alarms that it raises, by name."""
        lines = {}
        for name in ("features/std", *_evaluated(objective.spreads)):
            if name in metrics:
                self.largest[name] = max(self.largest.get(name, 0.0), metrics[name])
        found = signs(metrics, objective, chance, self.largest, config)
        for name, (here, what) in found.items():
            self.in_succession[name] = self.in_succession.get(name, 0) + 1 if here else 0
            if self.in_succession[name] >= config.evaluations and name not in self.raised:
                self.raised.append(name)
                remedy = {**REMEDIES, **objective.remedies}[name]
                lines[name] = f"alarm: {name} ({what}): {MEANINGS[name]}; try {remedy}"
            elif not here and name in self.raised:
                self.raised.remove(name)
        return lines


def signs(
    metrics: Mapping[str, float],
    objective: Objective,
    chance: float | None,
    largest: Mapping[str, float],
    config: AlarmsConfig,
) -> dict[str, tuple[bool, str]]:
    """For each alarm that the metrics can tell of: whether its sign is there, and the numbers that say so."""
    found: dict[str, tuple[bool, str]] = {}
    if chance is not None:
        loss = metrics["eval/loss"]
        near = abs(loss - chance) <= config.chance_band * (abs(chance) or 1.0)
        found["no_learning"] = (near, f"loss {loss:.4f}, {chance:.4f} by chance")
    gone = {
        name: metrics[name] < max(config.std_floor, config.std_share * most)
        for name, most in largest.items()
        if name in metrics
    }
    if gone:
        worst = next((name for name, here in gone.items() if here), next(iter(gone)))
        what = "feature spread" if worst == "features/std" else worst.removeprefix("eval/")
        found["collapse"] = (gone[worst], f"{what} {metrics[worst]:.2g}, was {largest[worst]:.2g}")
    floors = {"features/rankme": config.rank_floor} | dict.fromkeys(
        _evaluated(objective.ranks), config.directions_floor
    )
    floors = {name: floor for name, floor in floors.items() if name in metrics}
    if floors:
        worst = min(floors, key=lambda name: metrics[name] / max(floors[name], 1e-6))
        what = "effective rank" if worst == "features/rankme" else worst.removeprefix("eval/")
        found["low_rank"] = (metrics[worst] < floors[worst], f"{what} {metrics[worst]:.2f}")
    for name, (most, divergence) in objective.entropies().items():
        entropy, apart = metrics[f"eval/{name}"], metrics[f"eval/{divergence}"]
        band, alike = config.entropy_band * most, apart <= config.entropy_band * most
        said = f"{name} {entropy:.3f} of 0 to {most:.3f}, {divergence} {apart:.3f}"
        if not objective.balanced:
            found["peaked"] = (alike and entropy <= band, said)
        found["uniform"] = (alike and entropy >= most - band, said)
    return found


def _evaluated(names: tuple[str, ...]) -> list[str]:
    return [f"eval/{name}" for name in names]

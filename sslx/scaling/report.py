"""Collects a study's finished rows, fits them, and says and writes what came out.

In: a study and its folder. Out: ``study_results.csv`` (a line a row), ``study_results.json`` (fit, intervals,
predictions) and ``study.png``.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from sslx.errors import UserError
from sslx.runtime import display
from sslx.scaling.family import Size
from sslx.scaling.fit import CONFIDENCE, MIN_LEVELS, Fit, fit_frontier, fit_law
from sslx.scaling.fit import frontier as on_frontier
from sslx.scaling.grid import Budget, Row, Study, short
from sslx.scaling.optimum import Interval, Optimum, find_optimum, parabola_minimum
from sslx.scaling.picture import draw_study
from sslx.scaling.runs import final_loss
from sslx.storage import write_text
from sslx.train.console import Console


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the finished rows say."""

    losses: dict[str, float]  # by row name
    fit: Fit | None
    frontier: dict[str, Interval] | None  # c and k of L = c C^-k
    held_out: dict[str, Interval]  # predicted, by row name
    minima: dict[str, tuple[float, float]]  # N and loss of each FLOP budget's parabola
    notes: list[str]


def grid_table(study: Study, losses: Mapping[str, float] | None = None) -> list[dict[str, str]]:
    """The grid for `Console.table`: as it will run or, given losses, as it has run; a star marks held-out rows."""
    rows = []
    for row in study.rows:
        told = {
            "row": str(row.index),
            "name": row.name + ("*" if row.held_out else ""),
            "model": f"{row.size.layers}x{row.size.width}",
            "N": short(row.size.total, 3),
            "N-emb": short(row.size.non_embedding, 3),
            "tokens": short(row.tokens, 3),
            "FLOPs": f"{row.flops:.2g}".replace("e+", "e"),
        }
        if losses is None:
            told |= {"steps": f"{row.steps:,}", "rate": f"{row.learning_rate:.2g}"}
        else:
            told["loss"] = f"{losses[row.name]:.4f}" if row.name in losses else "-"
        rows.append(told)
    return rows


def repetition_note(study: Study) -> str:
    """Which rows see the corpus more than once, or ""."""
    repeated = [row for row in study.rows if row.epochs > 1]
    if not repeated:
        return ""
    most = max(row.epochs for row in repeated)
    names = ", ".join(row.name for row in repeated[:6]) + (", ..." if len(repeated) > 6 else "")
    return (
        f"note: {len(repeated)} of {len(study.rows)} rows see the corpus more than once (up to {most:.1f} times: "
        f"{names}); repeated tokens teach less than new ones, which the law does not know"
    )


def find(study: Study, workdir: Path, count: str) -> Findings:
    """Collects and fits; what cannot be fitted is told in the notes."""
    losses = {row.name: loss for row in study.rows if (loss := final_loss(workdir, row)) is not None}
    rows = [row for row in study.fitted if row.name in losses]
    n, d, c = (np.array(values, float) for values in _columns(rows, count))
    y = np.array([losses[row.name] for row in rows])
    fit, notes = None, []
    try:
        fit = fit_law(n, d, y)
        notes += [f"not identified: {weakness}" for weakness in fit.weaknesses()]
    except UserError as error:
        notes.append(str(error))
    held_out = {}
    if fit is not None:
        held_out = {row.name: fit.predict(row.size.parameters(count), row.tokens) for row in study.rows if row.held_out}
    minima = {}
    if study.unit == "flops":
        for budget in dict.fromkeys(row.budget for row in rows):
            chosen = [row.budget == budget for row in rows]
            lowest = parabola_minimum(n[chosen], y[chosen])
            if sum(chosen) < MIN_LEVELS:
                notes.append(f"no iso-FLOP parabola of {budget}: too few rows ({sum(chosen)}; {MIN_LEVELS} needed)")
            elif lowest is None:
                notes.append(f"the rows of {budget} have no lowest point inside the sizes of the grid")
            else:
                minima[budget] = lowest
    frontier = None
    if rows:
        try:
            frontier = fit_frontier(c, y)
            if any(np.isclose(value, (low, high), rtol=1e-3).any() for value, low, high in frontier.values()):
                notes.append(
                    f"{len(rows)} rows, {len(on_frontier(c, y))} of them on the compute frontier, are few: its value "
                    "lies at the edge of its interval, which says little"
                )
        except UserError as error:
            notes.append(str(error))
    return Findings(losses, fit, frontier, held_out, minima, notes)


def _columns(rows: Sequence[Row], count: str) -> tuple[list[float], list[float], list[float]]:
    return [row.size.parameters(count) for row in rows], [row.tokens for row in rows], [row.flops for row in rows]


def report(
    study: Study,
    workdir: Path,
    count: str,
    *,
    budgets: Sequence[Budget],
    points: Sequence[tuple[Size, Budget]],
    console: Console,
) -> Findings:
    """Prints the table, the fit and the predictions, and writes the results.

    Args:
      study: The study.
      workdir: Its folder.
      count: What N is: ``total`` or ``non_embedding``.
      budgets: FLOPs to find the best size for.
      points: Sizes and budgets to predict the loss of.
      console: Where to print.

    Raises:
      UserError: a prediction is asked for, and there are too few rows to fit; everything else is written.
    """
    found = find(study, workdir, count)
    fit = found.fit
    optima = [] if fit is None else [find_optimum(fit, study.ladder, count, budget.amount) for budget in budgets]
    predicted = [] if fit is None else [_predicted(fit, count, size, budget) for size, budget in points]
    write_text(Path(workdir) / "study_results.csv", _csv(study, found))
    write_text(Path(workdir) / "study_results.json", _json(study, count, found, optima, predicted))
    drawn = draw_study(study, found, count, Path(workdir) / "study.png")
    _say(study, count, found, optima, predicted, console)
    written = "study_results.csv, study_results.json" + (", study.png" if drawn else "")
    console.say(f"written to {display(workdir)}: {written}")
    if fit is None and (budgets or points):
        raise UserError(f"nothing can be predicted: {found.notes[0]}")
    return found


def _predicted(fit: Fit, count: str, size: Size, budget: Budget) -> dict[str, Any]:
    tokens = budget.amount / (size.flops_per_token if budget.unit == "flops" else 1.0)
    return {
        "size": size.width,
        "parameters": size.parameters(count),
        "tokens": tokens,
        "flops": tokens * size.flops_per_token,
        "loss": fit.predict(size.parameters(count), tokens),
    }


def _say(
    study: Study,
    count: str,
    found: Findings,
    optima: Sequence[Optimum],
    predicted: Sequence[Mapping[str, Any]],
    console: Console,
) -> None:
    done = f"{len(found.losses)} of {len(study.rows)} rows finished (*: held out)"
    console.table(done, grid_table(study, found.losses))
    share = f"{CONFIDENCE:.0%}"
    if found.fit is not None:
        rows = [
            {"constant": name, "value": f"{value:.4g}", f"{share} interval": f"{low:.4g} to {high:.4g}"}
            for name, (value, low, high) in found.fit.constants().items()
        ]
        console.table("L = E + A/N^alpha + B/D^beta", rows)
        what = "all parameters" if count == "total" else "the parameters without embeddings"
        misfit = f"{found.fit.misfit():.2%} from it (root mean square)"
        console.say(f"fitted to {len(found.fit.losses)} rows, which lie {misfit}; N is {what}")
    if found.frontier is not None:
        told = ", ".join(f"{name} = {_told(value, '.4g')}" for name, value in found.frontier.items())
        console.say(f"compute frontier: L = c C^-k, {told}")
    for budget, (n, loss) in found.minima.items():
        console.say(f"iso-FLOP parabola of {budget}: best N {short(n)}, loss {loss:.4f}")
    for name, prediction in found.held_out.items():
        verdict = "not finished yet"
        if name in found.losses:
            inside = prediction[1] <= found.losses[name] <= prediction[2]
            verdict = f"it was {found.losses[name]:.4f}, {'inside' if inside else 'OUTSIDE'} the interval"
        console.say(f"held out {name}: predicted {_told(prediction, '.4f')}; {verdict}")
    for optimum in optima:
        signs, edge = _signs(optimum), ""
        if optimum.at_edge:
            least, greatest = (short(n) for n in optimum.searched)
            edge = (
                f"; where ≤ or ≥ stands, the best may lie beyond the sizes that were looked at, N {least} to {greatest}"
            )
        console.say(
            f"best use of {optimum.flops:.3g} FLOPs: N {_told(optimum.parameters, short, signs)}, tokens "
            f"{_told(optimum.tokens, short, _of_tokens(signs))}, loss {_told(optimum.loss, '.4f')}; nearest size "
            f"{optimum.size.layers} x {optimum.size.width}{edge}"
        )
    for point in predicted:
        console.say(
            f"size {point['size']} on {short(point['tokens'])} tokens ({point['flops']:.3g} FLOPs): loss "
            f"{_told(point['loss'], '.4f')}"
        )
    for note in found.notes:
        console.say(f"note: {note}")


def _told(value: Interval, form: str | Callable[[float], str], signs: tuple[str, ...] = ("", "", "")) -> str:
    told = [
        sign + (form(part) if callable(form) else format(part, form)) for part, sign in zip(value, signs, strict=True)
    ]
    return f"{told[0]} ({told[1]} to {told[2]})"


def _signs(optimum: Optimum) -> tuple[str, ...]:
    """What stands before N and the ends of its interval where they are no more than where the search ended."""
    least, greatest = optimum.searched
    return tuple("≤ " if n <= least else "≥ " if n >= greatest else "" for n in optimum.parameters)


def _of_tokens(signs: tuple[str, ...]) -> tuple[str, ...]:
    """The same of D, of which there is less where N is greater."""
    turned = {"≤ ": "≥ ", "≥ ": "≤ ", "": ""}
    value, low, high = (turned[sign] for sign in signs)
    return value, high, low


def _csv(study: Study, found: Findings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["row", "name", "held_out", *(field.name for field in dataclasses.fields(Size)), "budget"]
    names += ["steps", "warmup_steps", "learning_rate", "tokens", "epochs", "flops", "loss"]
    writer.writerow(names)
    for row in study.rows:
        values = {"row": row.index, "loss": found.losses.get(row.name, "")}
        values |= dataclasses.asdict(row.size) | {k: v for k, v in dataclasses.asdict(row).items() if k != "size"}
        writer.writerow([values[name] for name in names])
    return text.getvalue()


def _json(
    study: Study, count: str, found: Findings, optima: Sequence[Optimum], predicted: Sequence[Mapping[str, Any]]
) -> str:
    results: dict[str, Any] = {"parameters": count, "confidence": CONFIDENCE, "rows": len(study.rows)}
    results["losses"], results["notes"] = found.losses, found.notes
    if found.fit is not None:
        results["fit"] = {
            "rows": len(found.fit.losses),
            "misfit": found.fit.misfit(),
            "constants": found.fit.constants(),
        }
    results["frontier"], results["isoflop_minima"] = found.frontier, found.minima
    results["held_out"] = {
        name: {"predicted": prediction, "measured": found.losses.get(name)}
        for name, prediction in found.held_out.items()
    }
    results["optima"], results["predictions"] = [dataclasses.asdict(optimum) for optimum in optima], list(predicted)
    return json.dumps(results, indent=2) + "\n"

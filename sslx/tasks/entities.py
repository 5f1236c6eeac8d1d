"""Named entities as spans of tags, and how many of them are found: CoNLL's own definition (Sang and De Meulder 2003).

In: tags by sentence, ``O`` or ``PREFIX-TYPE`` with prefixes B and I (E and S, where a scheme marks the ends too). Out:
spans, and precision, recall and F1 by type. An entity counts only if its type and both of its ends are right. An ``I``
behind an ``O`` or behind another type begins an entity too, as CoNLL's script has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PREFIXES = ("B", "I", "E", "S")


class Span(NamedTuple):
    """An entity: words ``start`` to ``stop - 1``."""

    kind: str
    start: int
    stop: int


def are_entities(names: Iterable[str]) -> bool:
    """Whether tags of these names mark entities, rather than parts of speech."""
    names = set(names)
    marked = [name for name in names if name != "O"]
    return bool(marked) and all(name[:1] in PREFIXES and name[1:2] == "-" and len(name) > 2 for name in marked)


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence, in order."""
    found: list[Span] = []
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, new = ("O", "", "") if tag == "O" else tag.partition("-")
        if kind and (new != kind or prefix in ("B", "S")):
            found.append(Span(kind, start, place))
            kind = ""
        if new and not kind:
            kind, start = new, place
        if kind and prefix in ("E", "S"):
            found.append(Span(kind, start, place + 1))
            kind = ""
    return found


def entity_scores(gold: Iterable[Sequence[str]], guessed: Iterable[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each type, and of all together under ``all`` (a micro average).

    Args:
      gold: Tags by sentence.
      guessed: As many.
    """
    right, there, said = Counter(), Counter(), Counter()
    for true, guess in zip(gold, guessed, strict=True):
        true, guess = set(spans(true)), set(spans(guess))
        for counter, these in ((right, true & guess), (there, true), (said, guess)):
            counter.update(span.kind for span in these)
    scores = {kind: _scores(right[kind], there[kind], said[kind]) for kind in sorted({*there, *said})}
    return scores | {"all": _scores(right.total(), there.total(), said.total())}


def _scores(right: int, there: int, said: int) -> dict[str, float]:
    precision, recall = right / max(said, 1), right / max(there, 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * right / max(there + said, 1),
        "support": there,
    }

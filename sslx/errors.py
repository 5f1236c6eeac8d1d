"""Mistakes a user can make, as one clear line: what was given, what was expected, what is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 20  # names in one message; a folder may hold thousands
QUOTED = 60  # characters of a text in one message


class UserError(Exception):
    """A mistake in what the user gave. Entries print it as one line, without a traceback, and exit with 2."""


class MissingField(UserError):
    """A source has no field of the name that ``key`` of the config gives; ``said`` is the line without the key."""

    def __init__(self, said: str, key: str):
        super().__init__(said, key)  # both, since pickle makes an exception of another process from these
        self.said = said
        self.key = key

    def __str__(self) -> str:
        return f"{self.said}; --{self.key}=NAME reads another"


class Alarmed(Exception):
    """An alarm has ended the run, as its config asks; entries print it as one line and exit with 3."""


class Unavailable(RuntimeError):
    """Something outside the run is gone that may come back, a host or a store: the same command may succeed later."""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in one line of bounded length."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def quoted(text: str) -> str:
    """A text of the user's as an error line has it: in quotes, and of a long one the beginning alone."""
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}…")


def nearest(given: str, valid: Iterable[str]) -> str:
    """Ends an error line: the valid names, closest first, e.g. ``did you mean 'adamw'? (valid: adamw, lamb)``."""
    names = sorted(str(name) for name in valid)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listing = ", ".join(name or "''" for name in names[:LISTED]) + more if names else "none"
    return f"did you mean {close[0]!r}? (valid: {listing})" if close else f"valid: {listing}"


def choose(given: str, valid: Iterable[str], what: str) -> str:
    """Returns ``given`` if it is one of ``valid``.

    Raises:
      UserError: it is not; names the nearest.
    """
    valid = tuple(valid)
    if given not in valid:
        raise UserError(f"unknown {what} {given!r}; {nearest(str(given), valid)}")
    return given

"""Who is alive and how far: each host writes a heartbeat with its progress and reads the others'.

The store is that of jax's coordination service. A host that is silent for ``timeout_seconds``, or a run that does not
move for it, ends this process with a line that names the host which holds it up; the main thread may hang in a
collective and could not do it. Nor could the thread that talks to the store, since a call to a host 0 that is frozen
never comes back: so one thread beats and another judges. A phase that may take long has ``prepare_seconds`` instead,
and a line on stderr each ``timeout_seconds`` tells until then whom it waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from sslx.errors import LISTED, first_line
from sslx.settings import HostsConfig
from sslx.train.rendezvous import Membership


class Store:
    """The key-value store that all hosts share, under the name ``sslx/``."""

    def __init__(self):
        # jax has no public way to it; Orbax takes the same one.
        from jax._src import distributed

        self._client = distributed.global_state.client

    def put(self, key: str, value: str) -> None:
        """Writes or overwrites a value."""
        self._client.key_value_set(f"sslx/{key}", value, allow_overwrite=True)

    def under(self, folder: str) -> dict[str, str]:
        """The values in a folder, by the last part of their keys."""
        found = self._client.key_value_dir_get(f"sslx/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}


def within(seconds: float, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call of the store answers; such calls have no deadline of their own.

    Raises:
      TimeoutError: it has not come back in time; its thread is left behind.
    """
    answer: Future = Future()

    def run() -> None:
        try:
            answer.set_result(call(*arguments))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer for {seconds:.0f} s") from None


@dataclass(frozen=True)
class _Place:
    """Where this host is; replaced as a whole, since two threads look at it."""

    phase: str
    step: int | None = None
    moves: int = 0  # all hosts go through the same phases and steps: who has made fewer moves is behind
    limited: bool = False
    waits: bool = False  # at a meeting
    since: float = field(default_factory=time.monotonic)


class Watch:
    """Writes this host's heartbeat, reads the others', and ends the process when a verdict is due."""

    def __init__(self, member: Membership, store: Store, config: HostsConfig):
        self._member, self._store, self._config = member, store, config
        self._period = min(max(config.timeout_seconds / 20, 0.2), 5.0)
        self._at, self._beats = _Place("starting"), 0
        self._told = (0, 0)  # at how many moves, how often
        unheard = {"beat": 0, "phase": "not started", "step": None, "moves": -1}
        self._said = dict.fromkeys(range(member.count), unheard)
        # Seconds without a new beat of a host, while the store answered.
        self._quiet = dict.fromkeys((index for index in range(member.count) if index != member.index), 0.0)
        self._answered, self._problem = time.monotonic(), ""  # when the store last did, and what it has said since
        self._unanswered = 0.0  # seconds since then, as far as this process ran
        self._departed: dict[str, str] = {}  # what hosts that have left say
        self._end = threading.Event()
        self._leaving, self._has_left = threading.Lock(), False
        self._threads = [
            threading.Thread(target=self._beat_on, name="beat", daemon=True),
            threading.Thread(target=self._judge_on, name="watch", daemon=True),
        ]

    def start(self) -> None:
        """Begins watching."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends watching; the other hosts will hear nothing more."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def progress(self, phase: str, step: int | None = None, *, limited: bool = True) -> None:
        """This host has come to ``phase`` (and step); ``limited`` says which of the two limits it has to move on."""
        self._at = _Place(phase, step, self._at.moves + 1, limited)

    @contextlib.contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """This host waits for others, who are watched themselves; afterwards the phase before it goes on."""
        before = self._at
        self._at = _Place(phase, before.step, before.moves + 1, waits=True)
        yield
        self._at = replace(before, moves=before.moves + 2, since=time.monotonic())

    def leave(self, reason: str, code: int) -> None:
        """Says why this host ends, and with which exit code the others should end too.

        Host 0, whose end takes the store away, gives the others time to read it.
        """
        self._end.set()
        with self._leaving:
            # The first reason is the cause; what another thread says after it only follows from it.
            first, self._has_left = not self._has_left, True
        if first:
            said = json.dumps({"reason": reason, "code": code})
            try:
                within(3 * self._period, self._store.put, f"left/{self._member.index}", said)
            except Exception:  # the store is gone, and everybody knows
                return
        if self._member.index == 0:
            time.sleep(3 * self._period)

    def blame(self) -> str:
        """Waits a few heartbeats for a host to fall silent; returns who it is, or "" if all go on."""
        deadline = time.monotonic() + 8 * self._period
        while time.monotonic() < deadline:
            _, verdict = self._left()
            verdict = verdict or self._lost(4 * self._period)
            if verdict:
                return verdict
            time.sleep(self._period / 4)
        return ""

    @property
    def coordinator_silent(self) -> bool:
        """Whether host 0 has let a few heartbeats pass without an answer."""
        return self._unanswered > 4 * self._period

    def _beat_on(self) -> None:
        while not self._end.wait(self._period):
            self._beat()

    def _judge_on(self) -> None:
        judged, heard = time.monotonic(), self._answered
        while not self._end.wait(self._period):
            now, answered = time.monotonic(), self._answered
            # A time in which this process itself was suspended proves nothing: it hardly counts.
            passed = min(now - judged, 2 * self._period)
            self._unanswered = 0.0 if answered != heard else self._unanswered + passed
            judged, heard = now, answered
            code, verdict = self._left()
            verdict = verdict or self._lost(self._config.timeout_seconds) or self._stuck()
            if verdict:
                self._finish(verdict, code)
            else:
                self._tell()

    def _beat(self) -> None:
        """Writes and reads once; a failure is remembered and no more, since networks have their moments."""
        self._beats += 1
        here = {"beat": self._beats, "phase": self._at.phase, "step": self._at.step, "moves": self._at.moves}
        try:
            self._store.put(f"beat/{self._member.index}", json.dumps(here))
            found = {int(index): json.loads(value) for index, value in self._store.under("beat").items()}
            self._departed = self._store.under("left")
        except Exception as error:
            self._problem = first_line(error)
            return
        now = time.monotonic()
        # What could not be read proves nothing: a time without answers hardly counts.
        seconds = min(now - self._answered, 2 * self._period)
        for index in self._quiet:
            heard = index in found and found[index]["beat"] != self._said[index]["beat"]
            self._quiet[index] = 0.0 if heard else self._quiet[index] + seconds
        self._answered, self._problem = now, ""
        self._said |= found

    def _left(self) -> tuple[int, str]:
        """The exit code and the message that the first host which has left leaves behind, or 1 and ""."""
        for index, value in self._departed.items():
            if int(index) == self._member.index:
                continue
            said = json.loads(value)
            return said["code"], f"{self._member.name(int(index))} has stopped: {said['reason']}"
        return 1, ""

    def _lost(self, seconds: float) -> str:
        # Where host 0 has ended, jax mostly aborts the process before, and `hosts` explains it.
        if self._unanswered > seconds:
            problem = self._problem or f"nothing for {self._unanswered:.0f} s"
            return f"{self._member.name(0)}, which coordinates the hosts, does not answer: {problem}"
        silent = [index for index, quiet in self._quiet.items() if quiet > seconds]
        return f"{self._describe(silent)}; cannot be heard any more" if silent else ""

    def _stuck(self) -> str:
        at = self._at
        limit = "timeout_seconds" if at.limited else "prepare_seconds"
        waited = time.monotonic() - at.since
        if waited < getattr(self._config, limit) or self._problem:  # how far the others are is not known then
            return ""
        # A host that has fallen silent is the reason, though its own limit may end a moment later.
        return self._lost(4 * self._period) or (
            f"no progress for {waited:.0f} s (config.hosts.{limit}); {self._told_behind(at)}"
        )

    def _tell(self) -> None:
        """Says whom a phase without the short limit waits for, once each time that limit has passed."""
        at = self._at
        waited = time.monotonic() - at.since
        times = self._told[1] if self._told[0] == at.moves else 0
        if at.limited or self._problem or waited < (times + 1) * self._config.timeout_seconds:
            return
        self._told = (at.moves, times + 1)
        print(
            f"note: {at.phase} for {waited:.0f} s; {self._told_behind(at)}; the run ends after "
            f"{self._config.prepare_seconds:g} s (config.hosts.prepare_seconds)",
            file=sys.stderr,
            flush=True,
        )

    def _told_behind(self, at: _Place) -> str:
        """Whom this host waits for: at a meeting those that have not come, elsewhere those that have moved least."""
        moves = {index: said["moves"] for index, said in self._said.items()} | {self._member.index: at.moves}
        most = at.moves - 1 if at.waits else min(moves.values())
        behind = [index for index in moves if moves[index] <= most]
        if behind and len(behind) < len(moves):
            return f"behind: {self._describe(behind)}"
        return f"no host is behind the others; {self._describe([self._member.index])}"

    def _describe(self, indices: list[int]) -> str:
        # Of its last heartbeat: a host that is lost may have done a few steps more than that.
        def one(index: int) -> str:
            said = self._said[index]
            at = "" if said["step"] is None else f" at step {said['step']}"
            return f"{self._member.name(index)}, last heard{at} ({said['phase']})"

        more = f" and {len(indices) - LISTED} more hosts" if len(indices) > LISTED else ""
        return "; ".join(one(index) for index in sorted(indices)[:LISTED]) + more

    def _finish(self, verdict: str, code: int = 1) -> None:
        print(f"error: {' '.join(verdict.split())}", file=sys.stderr, flush=True)
        self.leave(verdict, code)  # or the others would take this host for the lost one
        os._exit(code)

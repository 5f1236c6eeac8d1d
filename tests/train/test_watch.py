"""The watch by itself, with a store that is made up: who is named, when, and what is no reason to end a run."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest

from sslx.errors import LISTED
from sslx.settings import HostsConfig
from sslx.train import hosts
from sslx.train.rendezvous import Membership
from sslx.train.watch import Watch

# Host 1, aborted by the runtime before its watch has come to a verdict.
ABORTS = """
import os, socket, threading, time

from sslx.settings import HostsConfig
from sslx.train import hosts
from sslx.train.rendezvous import Membership
from sslx.train.watch import Watch


class Frozen:
    def put(self, *arguments):
        threading.Event().wait()

    under = put


kernel = socket.create_server(("127.0.0.1", 0))
member = Membership(f"127.0.0.1:{kernel.getsockname()[1]}", 2, 1, names=("a", "b"))
watch = Watch(member, Frozen(), HostsConfig(timeout_seconds=600.0))
watch._period = 0.01
hosts._joined = hosts._Joined(member, Frozen(), watch, 600.0)
watch.start()
hosts._explain_aborts(member)
while not watch.coordinator_silent:
    time.sleep(0.01)
os.abort()
"""

MEMBER = Membership("127.0.0.1:1", 3, 0, names=("a", "b", "c"))
CONFIG = HostsConfig(timeout_seconds=1.0, prepare_seconds=3.0)


class FakeStore:
    """The store of hosts 1 and 2, which beat whenever somebody looks, unless they are ``silent``.

    Its calls fail where it is ``gone``, and come back only once ``thawed`` where it is frozen.
    """

    def __init__(self):
        self.values, self.silent, self.gone, self.failing = {}, set(), threading.Event(), 0
        self.thawed = threading.Event()
        self.thawed.set()
        self.others = {index: {"phase": "preparing", "step": None, "moves": 0} for index in (1, 2)}
        self._beats = 0

    def put(self, key, value):
        self._answer()
        self.values[key] = value

    def under(self, folder):
        self._answer()
        self._beats += 1
        for index, said in self.others.items():
            if index not in self.silent:
                self.values[f"beat/{index}"] = json.dumps({"beat": self._beats, **said})
        return {key.rpartition("/")[2]: value for key, value in self.values.items() if key.startswith(f"{folder}/")}

    def _answer(self):
        self.thawed.wait()
        self.failing -= 1
        if self.gone.is_set() or self.failing >= 0:
            raise RuntimeError("UNAVAILABLE: connection reset")


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def ended(monkeypatch):
    """Is set, with ``ended.code``, where the watch would end the process."""
    ended = threading.Event()

    def end(code):
        ended.code = code
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    return ended


@pytest.fixture
def watch(store, ended):
    watch = Watch(MEMBER, store, CONFIG)
    watch.start()
    yield watch
    store.thawed.set()
    watch.stop()


def test_the_host_that_is_behind_is_named_when_nothing_moves(watch, store, ended, capsys):
    store.others = {1: {"phase": "training", "step": 3, "moves": 3}, 2: {"phase": "training", "step": 5, "moves": 5}}
    for step in range(1, 6):
        watch.progress("training", step)
    assert ended.wait(10)
    assert ended.code == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no progress for ")
    assert error.endswith(" (config.hosts.timeout_seconds); behind: host 1 (b), last heard at step 3 (training)")
    assert json.loads(store.values["left/0"]) == {"reason": error.removeprefix("error: "), "code": 1}


def test_where_all_have_moved_alike_no_host_is_called_behind(watch, store, ended, capsys):
    for index in (1, 2):
        store.others[index] = {"phase": "training", "step": 3, "moves": 3}
    for step in range(1, 4):
        watch.progress("training", step)
    assert ended.wait(60)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(
        " (config.hosts.timeout_seconds); no host is behind the others; host 0 (a), last heard at step 3 (training)"
    )


def test_a_meeting_of_hundreds_tells_of_the_first_that_have_not_come(store):
    watch = Watch(Membership("127.0.0.1:1", 300, 0), store, CONFIG)  # not started: it has heard nobody yet
    with watch.waiting("waiting at the end"):
        told = watch._told_behind(watch._at)
    assert told.startswith("behind: host 1, last heard (not started); host 2, ")
    assert told.count("last heard") == LISTED
    assert told.endswith(f"; host {LISTED}, last heard (not started) and {299 - LISTED} more hosts")


def test_a_host_that_moves_is_not_ended(watch, ended):
    for step in range(20):
        watch.progress("training", step)
        assert not ended.wait(0.1)


def test_who_has_not_come_to_a_meeting_is_told_again_and_again_and_a_later_hang_ends(watch, store, ended, capsys):
    watch.progress("preparing", limited=False)
    watch.progress("the first step", 0)
    store.others[2] |= {"moves": 3}  # it has come
    with watch.waiting("waiting at the list of checkpoints"):
        assert not ended.wait(2.5)  # longer than what may pass without a step
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    for note in notes:
        assert note.startswith("note: waiting at the list of checkpoints for ")
        assert note.endswith(
            "; behind: host 1 (b), last heard (preparing); the run ends after 3 s (config.hosts.prepare_seconds)"
        )
    assert ended.wait(10)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no progress for ")
    assert error.endswith(" (config.hosts.timeout_seconds); behind: host 1 (b), last heard (preparing)")


def test_a_phase_that_may_take_long_ends_too(watch, store, ended, capsys):
    store.others[1] |= {"moves": 1}
    store.others[2] |= {"moves": 2}
    watch.progress("preparing", limited=False)
    watch.progress("compiling", 0, limited=False)
    assert not ended.wait(2)
    assert ended.wait(10)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no progress for ")
    assert error.endswith(" (config.hosts.prepare_seconds); behind: host 1 (b), last heard (preparing)")


def test_a_silent_host_is_named(watch, store, ended, capsys):
    store.silent = {2}
    assert ended.wait(10)
    assert "error: host 2 (c), last heard (not started); cannot be heard any more" in capsys.readouterr().err


def test_a_host_that_leaves_takes_the_others_with_it_and_its_exit_code(watch, store, ended, capsys):
    store.put("left/1", json.dumps({"reason": "no such file", "code": 2}))
    assert ended.wait(10)
    assert ended.code == 2
    assert capsys.readouterr().err == "error: host 1 (b) has stopped: no such file\n"


def test_a_store_that_fails_once_or_for_less_than_the_timeout_ends_nothing(watch, store, ended):
    store.failing = 1
    assert not ended.wait(1.5)
    watch.progress("preparing", limited=False)
    store.gone.set()
    assert not ended.wait(0.5)
    store.gone.clear()
    assert not ended.wait(1.5)


def test_a_store_that_fails_for_the_whole_timeout_names_host_0(watch, store, ended, capsys):
    store.gone.set()
    assert ended.wait(10)
    assert capsys.readouterr().err == (
        "error: host 0 (a), which coordinates the hosts, does not answer: UNAVAILABLE: connection reset\n"
    )


def test_a_meeting_bears_with_a_store_that_fails_once(watch, store, monkeypatch):
    monkeypatch.setattr(hosts, "_joined", hosts._Joined(MEMBER, store, watch, CONFIG.timeout_seconds))
    for index in (1, 2):
        store.put(f"meeting/1/{index}", json.dumps({"what": "a test", "value": index}))
    store.failing = 1
    assert hosts.agree("a test", 0) == [0, 1, 2]


def test_a_store_whose_calls_never_come_back_names_host_0_and_holds_up_nothing(watch, store, ended, capsys):
    store.thawed.clear()
    assert ended.wait(60)
    assert ended.code == 1
    assert re.fullmatch(
        r"error: host 0 \(a\), which coordinates the hosts, does not answer: nothing for \d+ s\n",
        capsys.readouterr().err,
    )


def test_a_meeting_and_a_farewell_at_a_store_whose_calls_never_come_back_end(watch, store, monkeypatch):
    here = hosts._Joined(MEMBER, store, watch, CONFIG.timeout_seconds)
    store.thawed.clear()
    with pytest.raises(TimeoutError, match="no answer for 1 s"):
        here.ask(store.put, "meeting/1/0", "{}")
    assert watch.blame().startswith("host 0 (a), which coordinates the hosts, does not answer")
    watch.leave("no more", 1)


def test_an_abort_names_a_host_0_that_is_frozen_though_its_kernel_takes_connections():
    ended = subprocess.run([sys.executable, "-c", ABORTS], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1, ended.stderr
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: lost host 0 (a), which coordinates the hosts, at 127.0.0.1:")

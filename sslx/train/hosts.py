"""Several processes as one run: they start together, decide together, and none waits in silence for one that is gone.

- `joined`: the processes meet (`rendezvous`), jax connects them, a watch is kept until the block ends.
- `together`: what fails on one host ends the run on all, with its message.
- `Votes`: wishes of single hosts (stop, save) that ride along in the training step, so that all see them at one step.

A process by itself goes through the same calls; they do nothing then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sslx.data.cache import tell_on
from sslx.errors import Alarmed, Unavailable, UserError, first_line
from sslx.settings import HostsConfig
from sslx.train import rendezvous
from sslx.train.rendezvous import Membership
from sslx.train.sharding import one_per_device
from sslx.train.watch import Store, Watch, within


class _Joined:
    """This process's part in the run."""

    def __init__(self, member: Membership, store: Store, watch: Watch, timeout: float):
        self.member, self.store, self.watch, self.timeout = member, store, watch, timeout
        self.meetings = 0

    def ask(self, call: Callable[..., Any], *arguments: str) -> Any:
        """What the store answers within the timeout: one failed call is no reason to end a run."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return within(max(deadline - time.monotonic(), 1.0), call, *arguments)
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


_joined: _Joined | None = None


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Joins the other processes, if there are any, for the length of the block. Nothing of jax may have run before.

    Only host 0's Python prints on standard output; errors of all hosts go where they went.

    Raises:
      UserError: what `rendezvous.find` finds wrong.
      Unavailable: a host did not come, or was lost inside the block.
    """
    global _joined
    member = rendezvous.find(config)
    if member is None:
        yield
        return
    member = rendezvous.meet(member, config.join_seconds)
    _explain_aborts(member)
    _keep_stdout(member)
    # SIGTERM is ours: it becomes a vote. jax's own service would take it away.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        member.coordinator,
        member.count,
        member.index,
        local_device_ids=member.local_devices,
        cluster_detection_method="deactivate",
        # jax ends a process without a word about others; the watch, which names them, comes first.
        heartbeat_timeout_seconds=int(2 * config.timeout_seconds + 100),
        shutdown_timeout_seconds=30,
    )
    store = Store()
    _joined = _Joined(member, store, Watch(member, store, config), config.timeout_seconds)
    _joined.watch.start()
    try:
        yield
        with together("the end"):
            pass
    except BaseException as error:
        reason = first_line(error)
        own = (UserError, Unavailable, Alarmed, FloatingPointError, KeyboardInterrupt, SystemExit)
        if not isinstance(error, own):
            # The runtime says "connection closed by peer"; who it was shows a few heartbeats later.
            lost = _joined.watch.blame()
            if lost:
                _joined.watch.leave(lost, 1)
                raise Unavailable(lost) from error
            reason = f"{type(error).__name__}: {reason}"
        _joined.watch.leave(reason, {UserError: 2, Alarmed: 3}.get(type(error), 1))
        raise
    _joined.watch.stop()
    _joined = None
    jax.distributed.shutdown()


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Ends the block on all hosts or on none: waits for the others, and raises what one of them has raised.

    Raises:
      UserError: the block failed on another host by its user's mistake; the message names it.
      Unavailable: it failed there for another reason.
    """
    if _joined is None:
        yield
        return
    try:
        yield
    except Exception as error:
        problem = str(error) if isinstance(error, (UserError, Unavailable)) else first_line(error)
        _exchange(what, {"problem": problem, "mistake": isinstance(error, UserError)}, wait=False)
        raise
    _exchange(what, {})


def agree(what: str, value: Any) -> list[Any]:
    """Every host's JSON ``value``, in the order of the hosts; each host must come here as often as the others."""
    if _joined is None:
        return [value]
    return [said["value"] for said in _exchange(what, {"value": value})]


def host_name(index: int) -> str:
    """``host 2 (node17)``."""
    return _joined.member.name(index) if _joined else f"host {index}"


def progress(phase: str, step: int | None = None, *, limited: bool = True) -> None:
    """Tells the watch that this host has moved on.

    It must move again within ``config.hosts.timeout_seconds``, or, where the phase may take long and so is not
    ``limited``, within ``config.hosts.prepare_seconds``.
    """
    if _joined is not None:
        _joined.watch.progress(phase, step, limited=limited)


class Votes:
    """What this host wishes, as the training step takes it.

    A step's ``metrics["votes"]`` is the maximum over the hosts, so every host reads the same decision at the same step,
    at no cost: the two integers travel with the loss.
    """

    def __init__(self, mesh: Mesh):
        self._sharding, self._cast, self._array = one_per_device(mesh), None, None

    def __call__(self, *, stop: int, save: bool) -> jax.Array:
        """int32[devices, 2]: the signal to stop for (0: none), and whether to save now."""
        cast = (stop, int(save))
        if cast != self._cast:
            row = np.array([cast], np.int32)
            shape = (self._sharding.mesh.size, 2)
            self._array = jax.make_array_from_callback(shape, self._sharding, lambda index: row)
            self._cast = cast
        return self._array


def _exchange(what: str, said: dict[str, Any], *, wait: bool = True) -> list[dict[str, Any]]:
    """Publishes what this host says at this meeting and returns what all say; liveness is the watch's business."""
    here = _joined
    here.meetings += 1
    place = f"meeting/{here.meetings}"
    here.ask(here.store.put, f"{place}/{here.member.index}", json.dumps({"what": what, **said}))
    if not wait:
        return []
    with here.watch.waiting(f"waiting at {what}"):
        while len(answers := here.ask(here.store.under, place)) < here.member.count:
            time.sleep(0.05)
    found = [json.loads(answers[str(index)]) for index in range(here.member.count)]
    for index, answer in enumerate(found):
        if answer["what"] != what:
            raise Unavailable(f"{here.member.name(index)} is at {answer['what']!r} where this host is at {what!r}")
        if "problem" in answer:
            kind = UserError if answer["mistake"] else Unavailable
            raise kind(f"{here.member.name(index)}: {answer['problem']}")
    return found


def _keep_stdout(member: Membership) -> None:
    """Leaves standard output to host 0's Python alone: Gloo prints a line there for each group of devices it connects.

    Such libraries write to the descriptor, so Python moves to a copy of it.
    """
    if member.index:
        tell_on(sys.stderr)
    if not _prints_to_descriptor():
        return
    sys.stdout.flush()
    if member.index == 0:
        how = {"buffering": 1, "encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
        sys.stdout = open(os.dup(1), "w", **how)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if os.environ.get("NCCL_DEBUG") else nowhere, 1)  # who asks NCCL to talk wants to hear it
    os.close(nowhere)


def _prints_to_descriptor() -> bool:
    """Whether standard output is the descriptor 1: it may be closed, or a notebook's, and 1 then be anything."""
    try:
        return sys.stdout is not None and sys.stdout.fileno() == 1
    except (OSError, ValueError):  # it has none
        return False


def _explain_aborts(member: Membership) -> None:
    """Says why jax aborts this process: it does so when host 0, which holds its coordination service, is gone.

    The check failure that jax logs before stays: a fatal log has no level, recoverability spares a run the end of other
    hosts only, and the runtime's own callback (``missed_heartbeat_callback``) ends in ``std::bad_cast`` (jax 0.10).
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        message = "error: the process was aborted, for the reason above\n"
        # The kernel of a host that is frozen still takes connections.
        silent = _joined is not None and _joined.watch.coordinator_silent
        if member.index and (silent or not _listening(member.coordinator)):
            message = f"error: lost {member.name(0)}, which coordinates the hosts, at {member.coordinator}\n"
        os.write(2, message.encode())
        os._exit(1)

    _explain_aborts.handler = on_abort  # C holds only the address
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)


def _listening(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True

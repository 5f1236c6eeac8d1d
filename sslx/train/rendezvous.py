"""Where several processes find each other before ``jax.distributed`` connects them.

In: `HostsConfig`. Out: a `Membership`: the coordinator's address, how many processes there are, which one this is, and
their names. jax would abort the process when one of them never comes, without saying which; so they meet first on a
plain socket of the coordinator's port, where host 0 knows who is missing and tells the others. Who waits says so on
stderr, after a few seconds and then ever more rarely.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sslx.errors import LISTED, Unavailable, UserError
from sslx.settings import HostsConfig
from sslx.train.chips import tpu_device_files

# What jax calls the same; several kinds of TPU metadata are told apart by jax itself.
JAX_NAMES = {"slurm": "slurm", "mpi": "ompi", "tpu": None}

FIRST_NOTE = 5.0  # seconds of waiting; each later note comes after twice the time


@dataclass(frozen=True)
class Membership:
    """Who takes part; ``local_devices`` are this process's, where a cluster gives each process devices of its own."""

    coordinator: str  # HOST:PORT
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        """``host 2 (node17)``."""
        return f"host {index} ({self.names[index]})" if index < len(self.names) else f"host {index}"


def find(config: HostsConfig) -> Membership | None:
    """Returns the membership that the config or the cluster's environment gives, or None for a process by itself.

    Raises:
      UserError: the cluster that the config names is not there, or the coordinator is no address.
    """
    if config.coordinator:
        _address(config.coordinator)
        return Membership(config.coordinator, config.count, config.index) if config.count > 1 else None
    cluster = _detected(os.environ) if config.cluster == "auto" else config.cluster
    if cluster == "none":
        return None
    # Private, and the only place that knows what every scheduler calls these; its callers would hide who is missing.
    from jax._src.clusters import ClusterEnv

    try:
        coordinator, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, JAX_NAMES[cluster], int(config.join_seconds)
        )
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"config.hosts.cluster is {cluster!r}, but its environment cannot be read: {error}") from None
    if coordinator is None or count is None or index is None:
        if config.cluster == "auto":  # a single TPU host without a pod's metadata, such as Colab
            return None
        raise UserError(
            f"config.hosts.cluster is {cluster!r}, but there is no such environment; start it with the cluster's "
            "launcher, or give config.hosts.coordinator, count and index"
        )
    return Membership(coordinator, count, index, tuple(devices) if devices else None) if count > 1 else None


def meet(member: Membership, seconds: float) -> Membership:
    """Waits until all have come; returns the membership with their names.

    Raises:
      Unavailable: some did not come in time; names them.
      UserError: two say they are the same one, or they expect different numbers.
    """
    host, port = _address(member.coordinator)
    deadline = time.monotonic() + seconds
    patience = _Patience(seconds)
    names = (
        _gather(member, port, deadline, patience)
        if member.index == 0
        else _report(member, host, port, deadline, patience)
    )
    return Membership(member.coordinator, member.count, member.index, member.local_devices, tuple(names))


def _detected(environment: Mapping[str, str]) -> str:
    def several(variable: str) -> bool:
        return environment.get(variable, "").isdecimal() and int(environment[variable]) > 1

    # SLURM_STEP_NODELIST is there inside srun only; a script that was merely submitted is one process.
    if "SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"):
        return "slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "mpi"
    # Of a machine that plans for TPUs (libtpu is there) and has none, nothing is asked: its answer takes minutes.
    on_cpu = environment.get("JAX_PLATFORMS", "") == "cpu"
    if not on_cpu and tpu_device_files() and importlib.util.find_spec("libtpu") is not None:
        return "tpu"
    return "none"


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"config.hosts.coordinator is {coordinator!r}; expected HOST:PORT, for example 10.0.0.2:8476")
    return host.strip("[]"), int(port)


class _Patience:
    """Says whom this host waits for: sparsely, since a pod has hundreds of hosts and some may be long in coming."""

    def __init__(self, seconds: float):
        self.seconds, self._begin, self._next = seconds, time.monotonic(), FIRST_NOTE

    @property
    def left(self) -> float:
        """Seconds until there is something to say again."""
        return max(self._begin + self._next - time.monotonic(), 0.01)

    def tell(self, whom: str, *, ends: bool = True) -> None:
        """Says it if it is time to; ``ends``: with the limit that holds for this wait."""
        waited = time.monotonic() - self._begin
        if waited < self._next:
            return
        self._next = 2 * waited
        limit = f"; the run ends after {self.seconds:g} s (config.hosts.join_seconds)" if ends else ""
        print(f"note: waiting for {whom}, {waited:.0f} s now{limit}", file=sys.stderr, flush=True)


def _gather(member: Membership, port: int, deadline: float, patience: _Patience) -> list[str]:
    """Host 0: collects the names, then answers everyone at once."""
    names = {0: socket.gethostname()}
    waiting: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(member, port))
        problem, mistake = "", True
        while len(names) < member.count and not problem:
            patience.tell(f"{_missing(member, names)} to join {member.coordinator}")
            server.settimeout(max(min(deadline - time.monotonic(), patience.left), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                problem = f"{_missing(member, names)} did not join {member.coordinator} within {patience.seconds:g} s"
                mistake = False
                break
            connection.settimeout(min(5.0, max(deadline - time.monotonic(), 0.1)))
            said = _receive(connection)
            if not said or not {"index", "count", "name"} <= set(said):  # a port scanner, or a host that died again
                continue
            waiting.append(connection)
            if said["count"] != member.count:
                whose = f"host {said['index']} ({said['name']})"
                problem = f"{whose} expects {said['count']} hosts, host 0 expects {member.count}"
            elif said["index"] in names:
                problem = f"{said['name']} and {names[said['index']]} both say they are host {said['index']}"
            names[said["index"]] = said["name"]
        answer = (
            {"problem": problem, "mistake": mistake}
            if problem
            else {"names": [names[index] for index in range(member.count)]}
        )
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
    return _names(answer)


def _missing(member: Membership, names: Mapping[int, str]) -> str:
    """``host 1, host 3 of 4``."""
    missing = [f"host {index}" for index in range(member.count) if index not in names]
    more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
    return f"{', '.join(missing[:LISTED])}{more} of {member.count}"


def _report(member: Membership, host: str, port: int, deadline: float, patience: _Patience) -> list[str]:
    """Any other host: says its name to host 0 and waits for the answer."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"host 0 could not be reached at {member.coordinator} within {patience.seconds:g} s")
        patience.tell(f"host 0 of {member.count} to be reached at {member.coordinator}")
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as connection:
                said = {"index": member.index, "count": member.count, "name": socket.gethostname()}
                connection.sendall(json.dumps(said).encode() + b"\n")
                # Host 0 may have begun to wait later than this one, and answers after its own deadline.
                last = time.monotonic() + 2 * patience.seconds + 10
                while not select.select([connection], [], [], patience.left)[0] and time.monotonic() < last:
                    others = f"the other hosts of {member.count}, which host 0 at {member.coordinator} collects"
                    patience.tell(others, ends=False)  # host 0's clock counts now, and it says how long it waits
                connection.settimeout(max(last - time.monotonic(), 0.01))
                answer = _receive(connection)
        except OSError:
            answer = None
        if answer is None:
            time.sleep(0.2)
        else:
            return _names(answer)


def _names(answer: dict) -> list[str]:
    """The names in host 0's answer, or the error that it tells of."""
    if "problem" in answer:
        raise (UserError if answer["mistake"] else Unavailable)(answer["problem"])
    return answer["names"]


def _listen(member: Membership, port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=member.count)
    except OSError as error:
        raise UserError(
            f"host 0 cannot listen at {member.coordinator}: {error.strerror or error}; give config.hosts.coordinator "
            "another port"
        ) from None


def _receive(connection: socket.socket) -> dict | None:
    """One JSON line, or None where the other side said nothing sensible."""
    try:
        line = connection.makefile("rb").readline(1 << 20)
        said = json.loads(line)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None

"""The client of `entry_server`: command line entries as real processes of one server, which has imported everything.

`conftest` offers it as the fixture ``entries``: one server for all tests of an xdist worker, on one simulated device
unless told otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
HANGS = 600  # seconds after which a process has surely hung


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


class Process:
    """An entry that goes on by itself; it leads a process group, so what it starts can be killed with it."""

    def __init__(self, pid: int, output: Path, ask: Callable[[dict[str, Any]], Any]):
        self.pid, self._output, self._ask, self._code = pid, output, ask, None

    stdout = property(lambda self: Path(f"{self._output}.stdout").read_text(encoding="utf8"))
    stderr = property(lambda self: Path(f"{self._output}.stderr").read_text(encoding="utf8"))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        if self._code is None:  # the server forgets a process once it has told its code
            self._code = self._ask({"poll": self.pid})
        return self._code

    def wait(self) -> int:
        """The exit code, once there is one."""
        deadline = time.monotonic() + HANGS
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"the process did not end:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.02)
        return self.poll()


class Entries:
    """Starts entries; ``output`` is an empty folder for what they print."""

    def __init__(self, output: Path):
        self._output, self._started = output, 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("entry_server.py"))],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | simulated(1),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, entry: str, *arguments: str, folder: Path = REPOSITORY, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Starts ``python -m sslx.ENTRY`` in a folder; ``environment`` is added to that of the tests."""
        self._started += 1
        output = self._output / str(self._started)
        job = {"module": f"sslx.{entry}", "arguments": arguments, "folder": str(folder), "output": str(output)}
        return Process(self._ask(job | {"environment": dict(environment or {})}), output, self._ask)

    def run(self, entry: str, *arguments: str, **where: Any) -> Ended:
        """Runs an entry to its end; ``where`` as for `start`."""
        process = self.start(entry, *arguments, **where)
        return Ended(process.wait(), process.stdout, process.stderr)

    def close(self) -> None:
        """Ends the server, which kills what still runs."""
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def _ask(self, job: dict[str, Any]) -> Any:
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def simulated(devices: int) -> dict[str, str]:
    """The environment of a process with this many simulated devices, its programs compiled quickly and running slowly.

    The tests compile hundreds of small programs, and without this spend most of their time in LLVM's passes and, before
    them, in those of the MLIR emitters. Parts of a program that are compiled beside each other cost more in all, and
    the workers keep the cores busy anyway.
    """
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quickly += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quickly}"}


def collect_rarely() -> None:
    """What has been imported is no longer looked through for garbage, and what is new less often.

    Tracing makes and drops objects by the million: with Python's thresholds, a tenth of the tests' time went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def until(moment: Callable[[], bool], *processes: Process) -> None:
    """Waits for a moment, for as long as all processes run."""
    deadline = time.monotonic() + HANGS
    while True:
        with contextlib.suppress(FileNotFoundError):  # what is watched is being renamed
            if moment():
                return
        for process in processes:
            assert process.poll() is None, f"ended too early:\n{process.stdout}\n{process.stderr}"
        assert time.monotonic() < deadline
        time.sleep(0.001)

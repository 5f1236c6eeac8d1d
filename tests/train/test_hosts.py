"""Several real processes as one run, on this machine: the same numbers as one process, and no silent waiting.

Each host is ``python -m sslx.main`` with ``config.hosts`` on its command line and simulated devices of its own. They
are forked by `entry_server`, which has imported everything already.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from sslx.config import HostsConfig
from sslx.errors import UserError
from sslx.train import rendezvous
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.metrics import read_metrics

SERVER = Path(__file__).resolve().parent.parent / "entry_server.py"
PATIENCE = 240  # seconds for what takes ten on an idle machine


class Cluster:
    """Starts hosts and waits for them."""

    def __init__(self, folder, tiny_config):
        self._folder, self._tiny_config, self._started = folder, tiny_config, 0
        self._server = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, job):
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, run, hosts, devices, *, only=None, extra=(), entry="sslx.main", **changes):
        """Starts the hosts of a run with ``devices`` each (or the ``only`` ones); returns a `Host` each."""
        settings = {"eval.batches": 1, "steps": 8} | changes
        if entry == "sslx.main":
            settings = {"model.layers": 1, "model.dropout": 0.1, "model.attention_dropout": 0.1} | settings
        config = {"sslx.main": "bert_mlm", "sslx.finetune": "finetune/text_classification"}[entry]
        written = self._tiny_config(config, settings).to_json()
        self._started += 1
        config = self._folder / f"config{self._started}.py"
        config.write_text(
            "import json\n\nimport ml_collections\n\n\n"
            f"def get_config():\n    return ml_collections.ConfigDict(json.loads({written!r}))\n"
        )
        coordinator = f"127.0.0.1:{free_port()}"
        found = []
        for index in only or range(hosts):
            arguments = [f"--config={config}", f"--workdir={run}", *extra]
            if hosts > 1:
                names = {"coordinator": coordinator, "count": hosts, "index": index}
                arguments += [f"--config.hosts.{name}={value}" for name, value in names.items()]
            output = self._folder / f"{self._started}-{index}"
            job = {"module": entry, "arguments": arguments, "folder": str(self._folder), "output": str(output)}
            job["environment"] = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            found.append(Host(self._ask({**job, "background": True}), output, self._ask))
        return found

    def finish(self, hosts):
        """Waits for hosts and expects that all end well."""
        for host in hosts:
            assert host.wait() == 0, host.stderr
        return hosts

    def close(self):
        self._server.stdin.close()
        self._server.wait(timeout=60)


class Host:
    """One process."""

    def __init__(self, pid, output, ask):
        self.pid, self._output, self._ask, self._code = pid, output, ask, None

    stdout = property(lambda self: Path(f"{self._output}.stdout").read_text())
    stderr = property(lambda self: Path(f"{self._output}.stderr").read_text())

    @property
    def errors(self):
        """The lines that sslx says about an error; the runtime may add its own."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        deadline = time.monotonic() + PATIENCE
        while self._code is None:
            self._code = self._ask({"poll": self.pid})
            if self._code is None and time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"host did not end:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.1)
        return self._code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_config):
    cluster = Cluster(tmp_path_factory.mktemp("hosts"), tiny_config)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory):
    """The run of one process with eight devices that all others are compared with."""
    run = tmp_path_factory.mktemp("alone") / "run"
    cluster.finish(cluster.start(run, 1, 8))
    return run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_apart(cluster, run, flags):
    """Starts hosts of one device, each with flags of its own."""
    names = [f"--config.hosts.coordinator=127.0.0.1:{free_port()}", f"--config.hosts.count={len(flags)}"]
    started = [
        cluster.start(run, 1, 1, extra=[*names, f"--config.hosts.index={index}", *extra])
        for index, extra in enumerate(flags)
    ]
    return [host for (host,) in started]


def until(moment, hosts):
    """Waits for a moment while all hosts run."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert all(host._ask({"poll": host.pid}) is None for host in hosts), [host.stderr for host in hosts]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(run, step):
    return lambda: any(record["step"] >= step for record in read_metrics(run))


def losses(run):
    """``{step: (loss, gradient norm)}`` in training."""
    return {r["step"]: (r["train/loss"], r["train/grad_norm"]) for r in read_metrics(run) if "train/loss" in r}


def assert_close(run, other):
    """Equal steps and, up to the order of float32 additions, equal losses and parameters."""
    ours, theirs = losses(run), losses(other)
    assert sorted(ours) == sorted(theirs)
    for step in ours:
        np.testing.assert_allclose(ours[step], theirs[step], rtol=1e-4, err_msg=f"step {step}")
    one, two = read_variables(run)["params"], read_variables(other)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, two)


def test_four_hosts_train_as_one_process_and_one_or_two_go_on_with_another_mesh(cluster, alone, tmp_path):
    run = tmp_path / "run"
    hosts = cluster.finish(cluster.start(run, 4, 2, extra=["--config.steps=4"], **{"optimizer.schedule_steps": 8}))
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert saved_steps(run / "checkpoints") == [4]
    assert "on 4 hosts" in hosts[0].stdout
    for host in hosts[1:]:
        assert [line for line in host.stdout.splitlines() if "Gloo" not in line] == []
    one = tmp_path / "one"
    shutil.copytree(run, one)
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "optimizer.schedule_steps": 8}
    cluster.finish(cluster.start(one, 1, 8, **mesh))
    assert_close(one, alone)
    mesh = {"mesh.data": 1, "mesh.fsdp": 4, "optimizer.schedule_steps": 8}
    cluster.finish(cluster.start(run, 2, 2, **mesh))
    assert_close(run, alone)


def test_a_killed_host_stops_the_others_and_the_restart_is_bit_exact(cluster, tmp_path):
    settings = {"checkpoint.every_steps": 3, "mesh.fsdp": 2, "hosts.timeout_seconds": 30.0}
    settings["optimizer.schedule_steps"] = 4000
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    hosts = cluster.start(run, 2, 2, steps=4000, **settings)
    until(logged(run, 5), hosts)
    hosts[1].signal(signal.SIGKILL)
    killed = time.monotonic()
    assert hosts[1].wait() == -signal.SIGKILL
    assert hosts[0].wait() == 1
    assert time.monotonic() - killed < 30 + 30  # the timeout, and what a busy machine adds
    assert any("host 1 (" in line for line in hosts[0].errors), hosts[0].stderr
    steps = max(losses(run)) + 3
    cluster.finish(cluster.start(run, 2, 2, steps=steps, **settings))
    cluster.finish(cluster.start(unbroken, 2, 2, steps=steps, **settings))
    assert losses(run) == losses(unbroken)
    one, two = read_variables(run)["params"], read_variables(unbroken)["params"]
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_end_of_host_0_is_told_by_name(cluster, tmp_path):
    hosts = cluster.start(tmp_path / "run", 2, 1, steps=4000)
    until(logged(tmp_path / "run", 2), hosts)
    hosts[0].signal(signal.SIGKILL)
    assert hosts[1].wait() == 1
    assert any("host 0 (" in line for line in hosts[1].errors), hosts[1].stderr


def test_a_hanging_host_is_told_by_name_within_the_timeout(cluster, tmp_path):
    hosts = cluster.start(tmp_path / "run", 2, 1, steps=4000, **{"hosts.timeout_seconds": 5.0})
    until(logged(tmp_path / "run", 2), hosts)
    hosts[1].signal(signal.SIGSTOP)
    assert hosts[0].wait() == 1
    hosts[1].signal(signal.SIGKILL)
    hosts[1].wait()
    assert any("host 1 (" in line and "cannot be heard" in line for line in hosts[0].errors), hosts[0].stderr


def test_a_signal_to_any_host_saves_on_all_and_fewer_hosts_go_on(cluster, alone, tmp_path):
    run = tmp_path / "run"
    hosts = cluster.start(run, 2, 4, steps=4000, **{"optimizer.schedule_steps": 8})
    until(logged(run, 2), hosts)
    hosts[1].signal(signal.SIGTERM)
    cluster.finish(hosts)
    (step,) = saved_steps(run / "checkpoints")
    assert f"saved at step {step} on SIGTERM" in hosts[0].stdout
    cluster.finish(cluster.start(run, 1, 2, steps=step + 2, **{"optimizer.schedule_steps": 8}))
    ours, theirs = losses(run), losses(alone)
    assert sorted(ours) == list(range(1, step + 3))
    for common in set(ours) & set(theirs):
        np.testing.assert_allclose(ours[common], theirs[common], rtol=1e-4)


def test_what_is_wrong_on_one_host_ends_all_with_its_message(cluster, tmp_path):
    hosts = start_apart(cluster, tmp_path / "run", [[], ["--config.data.source=jsonl:nowhere.jsonl"]])
    assert [host.wait() for host in hosts] == [2, 2]
    assert "nowhere.jsonl" in hosts[1].errors[0]
    assert "host 1 (" in hosts[0].errors[0]
    assert "nowhere.jsonl" in hosts[0].errors[0]
    assert not (tmp_path / "run").exists()


def test_hosts_with_different_configs_are_refused(cluster, tmp_path):
    hosts = start_apart(cluster, tmp_path / "run", [[], ["--config.seed=1"]])
    assert [host.wait() for host in hosts] == [2, 2]
    assert "config.seed: 0 there, 1 here" in hosts[0].errors[0]


def test_a_connection_that_says_nothing_does_not_hold_up_the_meeting():
    port = free_port()
    member = rendezvous.Membership(f"127.0.0.1:{port}", 2, 0)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(rendezvous.meet, member, 20.0)
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                silent = socket.create_connection(("127.0.0.1", port))
                break
        other = rendezvous.meet(rendezvous.Membership(f"127.0.0.1:{port}", 2, 1), 20.0)
        assert other.names == meeting.result().names
        silent.close()


def test_two_hosts_fine_tune_as_one_process(cluster, alone, tmp_path):
    scores = {}
    for count, devices in ((1, 2), (2, 1)):
        run = tmp_path / str(count)
        changes = {"init": str(alone), "eval.every_steps": 2, "steps": 4, "mesh.data": 2}
        cluster.finish(cluster.start(run, count, devices, entry="sslx.finetune", **changes))
        scores[count] = json.loads((run / "report.json").read_text())
    assert scores[1]["step"] == scores[2]["step"]
    assert scores[1]["eval/loss"] == pytest.approx(scores[2]["eval/loss"], rel=1e-4)
    assert scores[1]["confusion_matrix"] == scores[2]["confusion_matrix"]


def test_a_host_that_never_joins_is_named(cluster, tmp_path):
    (host,) = cluster.start(tmp_path / "run", 3, 1, only=[0], **{"hosts.join_seconds": 2.0})
    assert host.wait() == 1  # it may come later: a scheduler starts the same command again
    (error,) = host.errors
    assert "host 1, host 2 of 3 did not join 127.0.0.1:" in error
    assert "within 2 s" in error
    (host,) = cluster.start(tmp_path / "run", 3, 1, only=[2], **{"hosts.join_seconds": 2.0})
    assert host.wait() == 1
    assert "host 0 could not be reached at 127.0.0.1:" in host.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HostsConfig(cluster="slrum"), "did you mean 'slurm'"),
        (HostsConfig(coordinator="node1", count=2), "'node1'; expected HOST:PORT"),
        (HostsConfig(coordinator="node1:8476", count=2, index=2), "expected 0 to 1"),
        (HostsConfig(coordinator="node1:8476"), "without config.hosts.count; expected all three"),
        (HostsConfig(coordinator="node1:8476", count=2), "without config.hosts.index; expected all three"),
        (HostsConfig(timeout_seconds=-3.0), "config.hosts.timeout_seconds is -3.0; expected at least 1"),
        (HostsConfig(count=2), r"config.hosts.count is given without config.hosts.coordinator"),
    ],
)
def test_wrong_hosts_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        rendezvous.find(config, {})


def test_a_slurm_step_is_found_and_a_batch_script_by_itself_is_one_process(monkeypatch):
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node[07-10]",
    }
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    member = rendezvous.find(HostsConfig())
    assert (member.coordinator.partition(":")[0], member.count, member.index) == ("node07", 4, 2)
    assert member.local_devices == (0,)
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert rendezvous.find(HostsConfig()) is None


def test_open_mpi_is_found(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    member = rendezvous.find(HostsConfig())
    assert (member.coordinator.partition(":")[0], member.count, member.index) == ("10.96.0.1", 2, 1)

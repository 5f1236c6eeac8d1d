"""Several real processes as one run, on this machine: the same numbers as one process, and no silent waiting.

Each host is ``python -m sslx.main`` with ``config.hosts`` on its command line and simulated devices of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from entries import simulated, until

from sslx.errors import UserError
from sslx.settings import HostsConfig
from sslx.train import rendezvous
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.metrics import read_metrics

STALLS = """
import time

import jax

from sslx.pretext.mlm import MaskedLanguageModel


class WhilePreparing(MaskedLanguageModel):
    @classmethod
    def prepare(cls, config, tokenizer=None):
        if jax.process_index() == 1:
            time.sleep(3600)
        return super().prepare(config, tokenizer)


class WhileReading(MaskedLanguageModel):
    @classmethod
    def prepare(cls, config, tokenizer=None):
        objective, data = super().prepare(config, tokenizer)
        fetch, fetched = data.train.fetch, []

        def stalling(row_ids):
            fetched.append(row_ids)
            if jax.process_index() == 1 and len(fetched) > 10:
                time.sleep(3600)
            return fetch(row_ids)

        data.train.fetch = stalling
        return objective, data
"""


class Cluster:
    """Starts the hosts of runs; ``folder`` is where they start."""

    def __init__(self, folder, entries, write_tiny_config):
        self._folder, self._entries, self._write_config, self._started = folder, entries, write_tiny_config, 0

    def start(self, run, hosts, devices, *, only=None, extra=(), entry="main", **changes):
        """Starts the hosts of a run with ``devices`` each (or the ``only`` ones); returns a process each."""
        settings = {"eval.batches": 1, "steps": 8} | changes
        if entry == "main":
            settings = {"model.layers": 1, "model.dropout": 0.1, "model.attention_dropout": 0.1} | settings
        self._started += 1
        config = self._folder / f"config{self._started}.py"
        self._write_config(config, {"main": "bert_mlm", "finetune": "finetune/text_classification"}[entry], settings)
        coordinator = f"127.0.0.1:{free_port()}"
        found = []
        for index in only or range(hosts):
            arguments = [f"--config={config}", f"--workdir={run}", *extra]
            if hosts > 1:
                names = {"coordinator": coordinator, "count": hosts, "index": index}
                arguments += [f"--config.hosts.{name}={value}" for name, value in names.items()]
            where = {"folder": self._folder, "environment": simulated(devices)}
            found.append(self._entries.start(entry, *arguments, **where))
        return found

    def finish(self, hosts):
        """Waits for hosts and expects that all end well."""
        for host in hosts:
            assert host.wait() == 0, host.stderr
        return hosts


def errors(host):
    """The lines that sslx says about an error; the runtime may add its own."""
    return [line for line in host.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, entries, write_tiny_config):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "stalls.py").write_text(STALLS)  # objectives that make host 1 hang while it goes on beating
    return Cluster(folder, entries, write_tiny_config)


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


def logged(run, step):
    return lambda: any(record["step"] >= step for record in read_metrics(run))


@contextlib.contextmanager
def frozen(host):
    """Stops a host for the length of the block, so that it holds its connections and says nothing; then ends it."""
    host.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        host.signal(signal.SIGKILL)
        host.wait()


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
    assert "done: held-out loss" in hosts[0].stdout
    assert "[Gloo]" not in hosts[0].stdout + hosts[0].stderr
    for host in hosts[1:]:
        assert host.stdout == ""
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
    until(logged(run, 5), *hosts)
    hosts[1].signal(signal.SIGKILL)
    killed = time.monotonic()
    assert hosts[1].wait() == -signal.SIGKILL
    assert hosts[0].wait() == 1
    assert time.monotonic() - killed < 30 + 30  # the timeout, and what a busy machine adds
    assert any("host 1 (" in line for line in errors(hosts[0])), hosts[0].stderr
    steps = max(losses(run)) + 3
    cluster.finish(cluster.start(run, 2, 2, steps=steps, **settings))
    cluster.finish(cluster.start(unbroken, 2, 2, steps=steps, **settings))
    assert losses(run) == losses(unbroken)
    one, two = read_variables(run)["params"], read_variables(unbroken)["params"]
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_end_of_host_0_is_told_by_name(cluster, tmp_path):
    hosts = cluster.start(tmp_path / "run", 2, 1, steps=4000)
    until(logged(tmp_path / "run", 2), *hosts)
    hosts[0].signal(signal.SIGKILL)
    assert hosts[1].wait() == 1
    assert any("host 0 (" in line for line in errors(hosts[1])), hosts[1].stderr


@pytest.mark.parametrize(
    ("hung", "reason"),
    [
        (1, "cannot be heard"),
        (0, "does not answer"),  # it holds the store; jax would abort host 1 a minute later, which has another line
    ],
)
def test_a_hanging_host_is_told_by_name_within_the_timeout(cluster, tmp_path, hung, reason):
    hosts = cluster.start(tmp_path / "run", 2, 1, steps=4000, **{"hosts.timeout_seconds": 5.0})
    until(logged(tmp_path / "run", 2), *hosts)
    other = hosts[1 - hung]
    with frozen(hosts[hung]):
        assert other.wait() == 1
    assert any(f"host {hung} (" in line and reason in line for line in errors(other)), other.stderr


def test_a_host_whose_data_hang_is_told_by_name_while_its_heart_beats(cluster, tmp_path):
    settings = {"pretext.name": "stalls:WhileReading", "hosts.timeout_seconds": 8.0}
    hosts = cluster.start(tmp_path / "run", 2, 1, steps=4000, **settings)
    until(logged(tmp_path / "run", 2), *hosts)
    hung = time.monotonic()
    assert [host.wait() for host in hosts] == [1, 1]
    assert time.monotonic() - hung < 8 + 30  # the timeout, and what a busy machine adds
    for host in hosts:
        error = errors(host)[0]
        assert "no progress for" in error
        assert "behind: host 1 (" in error
        assert "host 0 (" not in error.partition("behind: ")[2]


def test_hosts_that_wait_for_one_that_prepares_say_so_and_end_at_a_limit_of_its_own(cluster, tmp_path):
    limits = {"hosts.timeout_seconds": 4.0, "hosts.prepare_seconds": 20.0}
    hosts = cluster.start(tmp_path / "run", 2, 1, **limits, **{"pretext.name": "stalls:WhilePreparing"})
    assert [host.wait() for host in hosts] == [1, 1]
    notes = [line for line in hosts[0].stderr.splitlines() if line.startswith("note: waiting at preparing for ")]
    assert notes
    for note in notes:
        assert "; behind: host 1 (" in note
        assert note.endswith(", last heard (preparing); the run ends after 20 s (config.hosts.prepare_seconds)")
    for host in hosts:
        assert "(config.hosts.prepare_seconds); behind: host 1 (" in errors(host)[0]


def test_a_signal_to_any_host_saves_on_all_and_fewer_hosts_go_on(cluster, alone, tmp_path):
    run = tmp_path / "run"
    hosts = cluster.start(run, 2, 4, steps=4000, **{"optimizer.schedule_steps": 8})
    until(logged(run, 2), *hosts)
    hosts[1].signal(signal.SIGTERM)
    cluster.finish(hosts)
    (step,) = saved_steps(run / "checkpoints")
    assert f"saved at step {step} on SIGTERM" in hosts[0].stdout
    cluster.finish(cluster.start(run, 1, 2, steps=step + 2, **{"optimizer.schedule_steps": 8}))
    ours, theirs = losses(run), losses(alone)
    assert sorted(ours) == list(range(1, step + 3))
    for common in set(ours) & set(theirs):
        np.testing.assert_allclose(ours[common], theirs[common], rtol=1e-4)


def test_a_checkpoint_that_one_host_cannot_read_is_put_aside_by_all(cluster, tmp_path):
    run = tmp_path / "run"
    settings = {"mesh.fsdp": 2, "checkpoint.every_steps": 2, "hosts.timeout_seconds": 30.0}
    settings["optimizer.schedule_steps"] = 8
    cluster.finish(cluster.start(run, 2, 1, steps=4, **settings))
    unharmed = losses(run)
    for part in (run / "checkpoints" / "4" / "state" / "ocdbt.process_1" / "d").iterdir():
        part.write_bytes(bytes(part.stat().st_size))  # what host 1 reads, and host 0 does not
    hosts = cluster.finish(cluster.start(run, 2, 1, steps=6, **settings))
    assert "checkpoint 4 cannot be read" in hosts[0].stdout
    assert "resumed at step 2 of 6" in hosts[0].stdout
    assert (run / "checkpoints" / "4.damaged").is_dir()
    assert saved_steps(run / "checkpoints") == [4, 6]
    resumed = losses(run)
    assert {step: resumed[step] for step in unharmed} == unharmed


def test_what_is_wrong_on_one_host_ends_all_with_its_message(cluster, tmp_path):
    hosts = start_apart(cluster, tmp_path / "run", [[], ["--config.data.source=jsonl:nowhere.jsonl"]])
    assert [host.wait() for host in hosts] == [2, 2]
    assert "nowhere.jsonl" in errors(hosts[1])[0]
    assert "host 1 (" in errors(hosts[0])[0]
    assert "nowhere.jsonl" in errors(hosts[0])[0]
    assert not (tmp_path / "run").exists()


def test_hosts_with_different_configs_are_refused(cluster, tmp_path):
    hosts = start_apart(cluster, tmp_path / "run", [[], ["--config.seed=1"]])
    assert [host.wait() for host in hosts] == [2, 2]
    assert "config.seed: 0 there, 1 here" in errors(hosts[0])[0]


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


def test_hosts_that_expect_different_numbers_are_named_by_their_index(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        counts = {0: 2, 1: 3}
        met = [pool.submit(rendezvous.meet, rendezvous.Membership(address, counts[i], i), 20.0) for i in counts]
        for meeting in met:
            with pytest.raises(UserError, match=r"host 1 \(vm\) expects 3 hosts, host 0 expects 2"):
                meeting.result()


def test_who_waits_says_for_whom_and_ever_more_rarely(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "FIRST_NOTE", 0.4)
    address = f"127.0.0.1:{free_port()}"

    def meet(index):
        rendezvous.meet(rendezvous.Membership(address, 4, index), 20.0)

    def heard(part):
        said = capsys.readouterr().err
        noted.extend(said.splitlines())
        return any(part in line for line in noted)

    noted = []
    with ThreadPoolExecutor(4) as pool:
        met = [pool.submit(meet, 1)]
        until(lambda: heard(f"note: waiting for host 0 of 4 to be reached at {address}, "))
        met += [pool.submit(meet, 0), pool.submit(meet, 3)]
        until(lambda: heard(f"note: waiting for the other hosts of 4, which host 0 at {address} collects, "))
        until(lambda: heard(f"note: waiting for host 2 of 4 to join {address}, "))
        time.sleep(3)
        met.append(pool.submit(meet, 2))
        for one in met:
            one.result()
    heard("")
    told = [line for line in noted if "host 2 of 4 to join" in line]
    assert 2 <= len(told) <= 4  # after 0.4 s, 0.8 s, 1.6 s and 3.2 s
    for line in noted:  # once host 0 is reached, its clock decides
        limit = "" if "the other hosts of 4" in line else "; the run ends after 20 s (config.hosts.join_seconds)"
        assert re.search(rf", \d+ s now{re.escape(limit)}$", line), line


PREPARES = """
import sys

from sslx.data.cache import prepare_once
from sslx.train import hosts
from sslx.train.rendezvous import Membership

hosts._keep_stdout(Membership("127.0.0.1:1", 2, int(sys.argv[1])))
prepare_once(sys.argv[2], "words", lambda folder: print("note: fewer than asked for"))
print("as on every host")
"""


@pytest.mark.parametrize(("index", "stdout", "stderr"), [(0, "PN=", ""), (1, "", "PN"), (0, None, ""), (1, None, "PN")])
def test_what_one_host_prepares_is_told_whichever_it_is_and_a_closed_stdout_is_no_reason_to_end(
    tmp_path, index, stdout, stderr
):
    lines = {
        "P": f"preparing {tmp_path}/words (once)\n",
        "N": "note: fewer than asked for\n",
        "=": "as on every host\n",
    }
    command = [sys.executable, "-c", PREPARES, str(index), str(tmp_path)]
    if stdout is None:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "".join(lines[sign] for sign in stdout or "")
    assert ended.stderr == "".join(lines[sign] for sign in stderr)


def test_two_hosts_fine_tune_as_one_process(cluster, alone, tmp_path):
    scores = {}
    for count, devices in ((1, 2), (2, 1)):
        run = tmp_path / str(count)
        changes = {"init": str(alone), "eval.every_steps": 2, "steps": 4, "mesh.data": 2}
        cluster.finish(cluster.start(run, count, devices, entry="finetune", **changes))
        scores[count] = json.loads((run / "report.json").read_text())
    assert scores[1]["step"] == scores[2]["step"]
    assert scores[1]["eval/loss"] == pytest.approx(scores[2]["eval/loss"], rel=1e-4)
    assert scores[1]["confusion_matrix"] == scores[2]["confusion_matrix"]


def test_a_host_that_never_joins_is_named(cluster, tmp_path):
    (host,) = cluster.start(tmp_path / "run", 3, 1, only=[0], **{"hosts.join_seconds": 2.0})
    assert host.wait() == 1  # it may come later: a scheduler starts the same command again
    (error,) = errors(host)
    assert "host 1, host 2 of 3 did not join 127.0.0.1:" in error
    assert "within 2 s" in error
    (host,) = cluster.start(tmp_path / "run", 3, 1, only=[2], **{"hosts.join_seconds": 2.0})
    assert host.wait() == 1
    assert "host 0 could not be reached at 127.0.0.1:" in errors(host)[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cluster": "slrum"}, "did you mean 'slurm'"),
        ({"coordinator": "node1", "count": 2, "index": 0}, "'node1'; expected HOST:PORT"),
        ({"coordinator": "node1:8476", "count": 2, "index": 2}, "expected 0 to 1"),
        ({"coordinator": "node1:8476", "count": 0, "index": 0}, "config.hosts.count is 0; expected at least 1"),
        ({"coordinator": "node1:8476"}, "without config.hosts.count; expected all three"),
        ({"coordinator": "node1:8476", "count": 2}, "without config.hosts.index; expected all three"),
        ({"timeout_seconds": -3.0}, "config.hosts.timeout_seconds is -3.0; expected at least 1"),
        ({"prepare_seconds": 0.0}, "config.hosts.prepare_seconds is 0.0; expected at least 1"),
        ({"count": 2}, "config.hosts.count is given without config.hosts.coordinator"),
    ],
)
def test_wrong_hosts_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        rendezvous.find(HostsConfig(**config))


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

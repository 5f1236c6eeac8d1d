"""Settings of the process: a machine that can plan for TPUs and has none does not try to start one."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sslx.runtime import ONE_ARENA_CORES
from sslx.train.chips import tpu_device_files

REPOSITORY = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, os, sys
from sslx.runtime import ignore_absent_tpu
from jax._src import xla_bridge

kept = []
for name in ("TPU_WORKER_ID", "JAX_PLATFORMS", ""):
    if name:
        os.environ[name] = "0"
    ignore_absent_tpu()
    kept.append("tpu" in xla_bridge._backend_factories)
    os.environ.pop(name, None)
import jax

print(json.dumps([kept, jax.default_backend()]))
"""

# How many arenas malloc has once threads have made arrays and filled them.
ARENAS = """
import ctypes, tempfile, threading
import jax
from sslx.runtime import configure

configure()
threads = [threading.Thread(target=lambda: jax.numpy.arange(2**20).sort().block_until_ready()) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL("libc.so.6")
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


@pytest.fixture
def plain():
    """Runs Python as a user would who has set nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_PLATFORMS", "TPU_"))}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.mark.skipif(bool(tpu_device_files()), reason="there is a TPU")
def test_libtpu_is_not_started_where_there_is_no_tpu_and_nobody_asks_for_one(plain):
    ended = plain("-c", PROGRAM)
    assert ended.stderr == ""
    kept, backend = json.loads(ended.stdout)
    assert kept == [True, True, False]  # named by its machine, chosen by the user, neither
    assert backend in ("cpu", "gpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on accelerators each thread may have its arena")
@pytest.mark.skipif((os.cpu_count() or 1) > ONE_ARENA_CORES, reason="with many cores each thread may have its arena")
def test_freed_memory_stays_in_one_arena_for_all_threads(plain):
    ended = plain("-c", ARENAS)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == 1  # eight and more if each thread has its own, whose emptied heaps are unmapped


@pytest.mark.skipif(bool(tpu_device_files()), reason="there is a TPU")
def test_an_entry_prints_nothing_of_libtpu(plain, corpus_file):
    config = f"{REPOSITORY}/configs/bert_mlm.py:data=jsonl:{corpus_file}"
    small = ("--config.data.seq_len=16", "--config.data.vocab_size=200")
    ended = plain("-m", "sslx.preview", f"--config={config}", *small)
    assert ended.returncode == 0, ended.stderr
    # What the preparation says is ours; the rest would be libtpu's.
    assert [line for line in ended.stderr.splitlines() if not line.startswith(("preparing ", "note: "))] == []

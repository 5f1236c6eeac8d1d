"""Settings of the process that must be made once, before the first array exists."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path

import jax

from sslx.data.cache import cache_folder
from sslx.storage import is_remote
from sslx.train.chips import tpu_device_files

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
ONE_ARENA_CORES = 8  # at most, where threads share one

# How the names of variables begin that tell of a TPU; and two that jax and libtpu set wherever they are imported.
TPU_VARIABLES = ("TPU_", "COLAB_TPU", "CLOUD_TPU", "JAX_FORCE_TPU")
SET_BY_IMPORT = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY")


def ignore_absent_tpu() -> None:
    """Keeps jax from starting libtpu where it is installed, for `sslx.plan`, and there is no TPU.

    jax would try it before all else, and libtpu complains on stderr in lines that Python cannot stop. Every entry calls
    this before the first device is made. What the user has set (``JAX_PLATFORMS``) stays, and so do other backends.
    """
    if os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
        return
    if _tpu_is_told_of():
        return
    # Private, and the only way that leaves the choice among the other backends to jax: a list of platforms is binding.
    with contextlib.suppress(ImportError, AttributeError):  # a jax that keeps them elsewhere is only loud
        from jax._src import xla_bridge

        xla_bridge._backend_factories.pop("tpu", None)


def _tpu_is_told_of() -> bool:
    described = (name for name in os.environ if name.startswith(TPU_VARIABLES) and name not in SET_BY_IMPORT)
    return bool(tpu_device_files() or any(described))


def _only_cpu_can_be() -> bool:
    """Whether jax will compute on CPU, as far as one can say before it has started a backend."""
    if chosen := os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms:
        return chosen.partition(",")[0] == "cpu"
    if importlib.util.find_spec("libtpu") is not None and _tpu_is_told_of():
        return False
    return importlib.util.find_spec("jax_plugins") is None and not entry_points(group="jax_plugins")


def configure() -> None:
    """Turns on the persistent compile cache and, on CPU, keeps freed memory instead of returning it to the kernel.

    Set ``JAX_COMPILATION_CACHE_DIR`` to move the cache, ``SSLX_CACHE`` to move all caches, and
    ``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` to keep programs that compile faster than in half a second, too.
    """
    ignore_absent_tpu()
    if not jax.config.jax_compilation_cache_dir:
        folder = cache_folder("") / "jax"
        with contextlib.suppress(OSError):  # without a cache everything works, only slower
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Before there is a backend wherever possible: threads that it has started keep the arenas they have.
    if _only_cpu_can_be() or jax.default_backend() == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    # XLA's CPU buffers are large mallocs. By default each is a fresh mmap whose pages fault one by one: adding 1 to a
    # 32 MB array took 17.6 ms that way and 2.7 ms without mmap and trimming. Those that XLA's own threads ask for still
    # went back page by page, since a thread's arena unmaps a heap that is empty, whatever the threshold; one arena for
    # all threads took the steps of tests/benchmarks from 0.96 s to 0.75 (MAE) and from 1.83 to 1.54 (BERT). Huge pages
    # on top of that changed them by 2 % at most. None of it changes arithmetic. The price: threads that allocate much
    # at once, as tokenizers' do, wait for each other. On two cores texts are tokenized 2.8 times slower, which the
    # steps make up for soon; `sslx.prepare`, which trains nothing, does not call this. With many cores they would wait
    # longer, and what steps gain there is not known.
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        if (os.cpu_count() or 1) <= ONE_ARENA_CORES:
            libc.mallopt(M_ARENA_MAX, 1)


def is_first_process() -> bool:
    """Whether this process prints and writes what is written once."""
    return jax.process_index() == 0


def describe_devices() -> str:
    """``8 x TPU v5 lite`` or ``1 x cpu``, with hosts if there are several."""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{hosts}"


def display(path: os.PathLike[str]) -> str:
    """A path as a person would type it from here."""
    if is_remote(path):
        return str(path)
    with contextlib.suppress(ValueError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)

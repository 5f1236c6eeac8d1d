"""How long the training step takes to compile: with nothing in the persistent cache, and with everything in it.

In: a `Program`. Out: seconds. The cache is a temporary folder of its own, so that neither depends on earlier runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from sslx.train.program import Program

_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Seconds until the step could run, tracing included; ``cached`` is None where the cache has not served it."""

    tracing: float
    cold: float
    cached: float | None


def time_compilation(program: Program) -> Compilation:
    """Compiles twice: into an empty cache, then, with all that jax keeps in memory forgotten, from it."""
    with tempfile.TemporaryDirectory(prefix="sslx-bench-") as folder, _cache(folder):
        jax.clear_caches()
        begin = time.perf_counter()
        lowered = program.lower_train()
        tracing = time.perf_counter() - begin
        lowered.compile()
        cold = time.perf_counter() - begin
        jax.clear_caches()
        del lowered
        with _hits() as hits:
            cached = program.compile()
    return Compilation(tracing, cold, cached if hits else None)


@contextlib.contextmanager
def _cache(folder: str) -> Iterator[None]:
    """Puts the persistent cache, which takes everything, into a folder for the length of the block."""
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or it stays with the folder that it was first used with


@contextlib.contextmanager
def _hits() -> Iterator[list[str]]:
    """Collects the cache's hits."""
    found: list[str] = []

    def listen(event: str, **_: object) -> None:
        if event == _HIT:
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)

"""Prepared folders: one builder among many processes, whole or not at all, and a clear line where it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from sslx.data.cache import cache_folder, hash_of, prepare_once
from sslx.errors import UserError

SLOW_BUILDER = textwrap.dedent(
    """
    import sys, time
    from sslx.data.cache import prepare_once
    def build(folder):
        (folder / "a.bin").write_bytes(b"half")
        print("building", flush=True)
        time.sleep(float(sys.argv[2]))
        (folder / "a.bin").write_bytes(b"whole")
    print((prepare_once(sys.argv[1], "thing", build) / "a.bin").read_text(), flush=True)
    """
)


def start_builder(cache, seconds):
    command = [sys.executable, "-c", SLOW_BUILDER, str(cache), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_at_once_build_once(tmp_path):
    processes = [start_builder(tmp_path / "cache", 1) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [words[-1] for words in said] == ["whole"] * 3
    assert sorted("building" in words for words in said) == [False, False, True]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing"]


def test_a_build_killed_half_way_is_started_anew(tmp_path):
    process = start_builder(tmp_path, 60)
    assert process.stdout.readline().startswith("preparing ")
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert list(tmp_path.glob("thing.tmp-*"))
    folder = prepare_once(tmp_path, "thing", lambda to: (to / "a.bin").write_bytes(b"whole"))
    assert (folder / "a.bin").read_bytes() == b"whole"
    assert not list(tmp_path.glob("thing.tmp-*"))


def test_a_finished_folder_is_opened_without_writing(tmp_path):
    folder = prepare_once(tmp_path, "thing", lambda to: (to / "a.bin").touch())
    before = sorted(tmp_path.rglob("*"))
    assert prepare_once(tmp_path, "thing", lambda to: pytest.fail("built again")) == folder
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the data cache .*/file/cache: Not a dir.*cache_dir"):
        prepare_once(tmp_path / "file" / "cache", "thing", lambda to: None)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("nothing to build from")])
def test_a_build_that_fails_leaves_nothing_half_written(tmp_path, error):
    def build(folder):
        (folder / "a.bin").write_bytes(b"half")
        raise error

    with pytest.raises(UserError, match=r"No space left on device; set config.data.cache_dir|nothing to build from"):
        prepare_once(tmp_path, "thing", build)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_file_that_cannot_be_read_is_named_and_not_the_cache(tmp_path):
    missing = tmp_path / "corpus" / "a.txt"
    with pytest.raises(UserError, match=rf"^cannot read {missing}: No such file or directory$"):
        prepare_once(tmp_path / "cache", "thing", lambda to: missing.read_text())
    with pytest.raises(UserError, match=r"cannot write the data cache .*: No such file"):
        prepare_once(tmp_path / "cache", "thing", lambda to: (to / "no" / "a.bin").write_bytes(b""))


def test_content_is_on_disk_before_the_folder_appears(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(opened):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{opened}")))
        fsync(opened)

    def renamed(one, other):
        events.append("renamed")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)

    def build(folder):
        (folder / "a.bin").write_bytes(b"a")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(b"b")

    prepare_once(tmp_path / "cache", "thing", build)
    assert {"a.bin", "b.bin", "deep"} < set(events[: events.index("renamed")])
    assert events[events.index("renamed") + 1 :] == ["cache"]


def test_the_cache_is_where_the_config_or_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSLX_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache/sslx"
    monkeypatch.setenv("SSLX_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    assert cache_folder("/given") == type(tmp_path)("/given")


def test_names_follow_the_content_and_not_the_order_of_keys():
    assert hash_of({"a": 1, "b": (2, 3)}) == hash_of({"b": [2, 3], "a": 1})
    assert hash_of("a", 1) != hash_of("a", 2)

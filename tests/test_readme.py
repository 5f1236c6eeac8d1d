"""What a newcomer copies from the README: two commands begin it, and every file it names is there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_two_commands_install_and_run():
    """`.ci/run` takes its two commands from the README; a third line that looks like one stops it."""
    commands = [line for line in README.splitlines() if line.startswith("pip install -e ")]
    assert len(commands) == 2
    assert "-m sslx.main" in commands[0]
    assert commands[1].endswith("pytest")


def test_every_file_that_is_named_is_there():
    named = re.findall(r"(?<![\w/.])(?:configs|docs|launch|tests)/[\w/.]+\.\w+", README)
    assert len(named) > 20
    assert [name for name in sorted(set(named)) if not (ROOT / name).exists()] == []

"""`launch/Dockerfile`, as far as it can be checked without building it: layers, user, entry, and what it copies."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from sslx.entry import HELP

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[tuple[str, str]]:
    """Instructions and their values, in order, without comments."""
    # The parser keeps a copy of what it reads beside it.
    parser = DockerfileParser(path=str(tmp_path_factory.mktemp("docker")))
    parser.content = (REPOSITORY / "launch" / "Dockerfile").read_text()
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def values(steps: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in steps if name == instruction]


def copied(steps: list[tuple[str, str]]) -> list[str]:
    return [source for value in values(steps, "COPY") for source in value.split()[:-1]]


def test_the_libraries_are_a_layer_that_only_the_projects_description_changes(steps):
    install = next(i for i, (name, value) in enumerate(steps) if name == "RUN" and "pip install" in value)
    assert copied(steps[:install]) == ["pyproject.toml", "README.md", "LICENSE", "sslx/__init__.py"]
    (package,) = [value for value in values(steps, "RUN") if "--no-deps" in value]
    assert "--editable ." in package


def test_the_last_user_is_not_root_and_the_entry_trains(steps):
    assert values(steps, "USER") == ["1000"]
    assert json.loads(values(steps, "ENTRYPOINT")[0]) == ["python", "-m", "sslx.main"]
    assert json.loads(values(steps, "CMD")[0])[0] in HELP


def test_the_python_is_one_that_the_project_takes(steps):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    default = next(value for value in values(steps, "ARG") if value.startswith("PYTHON=")).partition("=")[2]
    least = project["requires-python"].removeprefix(">=")
    assert tuple(map(int, default.split("."))) >= tuple(map(int, least.split(".")))


@pytest.mark.parametrize(("extra", "expected"), [("", "."), ("cuda", ".[cuda]"), ("tpu,gcs", ".[tpu,gcs]")])
def test_the_build_argument_chooses_the_extras(steps, extra, expected):
    command = next(value for value in values(steps, "RUN") if "pip install" in value)
    command = command[command.index("python -m pip install") :].partition("&&")[0]
    script = f'python() {{ echo "${{@: -1}}"; }}; EXTRA={extra}; {command}'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.strip() == expected


def test_what_is_copied_exists_and_is_not_kept_out_of_the_build(steps):
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    for source in copied(steps):
        assert (REPOSITORY / source).exists(), source
        assert let_in & {source, *map(str, Path(source).parents)}, source
    assert let_in <= {*copied(steps)}

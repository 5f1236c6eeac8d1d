"""What holds for every file in `launch/`: they parse, and what they call and name exists in this repository."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from sslx.entry import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), *sorted(LAUNCH.glob("*.sbatch"))]
FILES = sorted(path for path in LAUNCH.iterdir() if path.is_file())


def text_of(path: Path) -> str:
    """What a person reads; of a notebook, its cells."""
    text = path.read_text(encoding="utf8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def names(pattern: str) -> list[tuple[str, str]]:
    return sorted({(path.name, found) for path in FILES for found in re.findall(pattern, text_of(path))})


MODULES = names(r"python -m (sslx\.\w+)")
CONFIGS = names(r"(configs/[\w/]+\.py)")
FLAGS = names(r"--config\.([\w.]+\w)")


def shellcheck() -> str:
    return shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_the_files_name_modules_configs_and_flags():
    assert len(SHELL) == 3
    # The image's entry is written as a list; test_dockerfile runs it.
    assert {name for name, _ in MODULES} == {path.name for path in FILES} - {"Dockerfile"}
    assert len(FLAGS) > 5
    assert CONFIGS


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run([shellcheck(), "--shell=bash", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_parses_a_script_that_can_be_executed(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n# ")


@pytest.mark.parametrize(("file", "module"), MODULES)
def test_a_module_that_is_named_exists(file, module):
    assert importlib.util.find_spec(module), f"{file} runs {module}"


def test_an_extra_that_is_installed_exists():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [*names(r"EXTRA=([\w,]+)"), *names(r"'\.\[([\w,]+)\]'"), *names(r"sslx\[(\w+)\]"), *names(r'"\[(\w+)\]"')]
    assert {file for file, _ in named} >= {"Dockerfile", "colab.ipynb", "slurm.sbatch", "tpu_pod.sh"}
    for file, given in named:
        assert set(given.split(",")) <= set(extras), f"{file} installs [{given}]"


@pytest.mark.parametrize(("file", "config"), CONFIGS)
def test_a_config_that_is_named_exists(file, config):
    assert (REPOSITORY / config).is_file(), f"{file} names {config}"


@pytest.mark.parametrize(("file", "flag"), FLAGS)
def test_a_flag_that_is_given_is_a_single_value_of_every_config(file, flag):
    config = load_config(REPOSITORY / "configs" / "bert_mlm.py").to_dict()
    for key in flag.split("."):
        assert isinstance(config, Mapping), f"{file} gives --config.{flag}"
        assert key in config, f"{file} gives --config.{flag}"
        config = config[key]
    assert not isinstance(config, Mapping)


def test_the_flags_given_to_the_study_are_its_own():
    (command,) = re.findall(r"python -m sslx\.study (.*?)['\n]", (LAUNCH / "slurm.sbatch").read_text())
    flags = set(re.findall(r"--(\w+)=", command)) - {"config"}
    assert flags >= {"sizes", "budgets"}
    about = ast.get_docstring(ast.parse((REPOSITORY / "sslx" / "study.py").read_text()))
    assert all(f"--{flag}=" in about for flag in flags)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_says_what_to_change(path):
    if path.name != "resumable.sh":  # takes a command and nothing else
        assert re.search("what to change", text_of(path)[:2500], re.IGNORECASE)

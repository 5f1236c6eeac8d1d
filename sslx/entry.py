"""What every command line entry shares: flags, one-line errors and exit codes.

Exit codes: 0 done or saved on a signal, 2 the user's mistake, 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from sslx.errors import UserError, nearest


def run(main: Callable[[ml_collections.ConfigDict, Path], None], *, needs_workdir: bool = True) -> None:
    """Parses ``--config`` (and ``--workdir``, default ``runs/<config name>``), then calls ``main(config, workdir)``."""
    config = config_flags.DEFINE_config_file("config", None, "Config file, with an optional argument: FILE.py[:ARG]")
    workdir = flags.DEFINE_string("workdir", "", "Run folder; default: runs/<config name>") if needs_workdir else None

    def start(_: list[str]) -> None:
        given = workdir.value if workdir is not None else ""
        folder = given or f"runs/{_config_file(sys.argv).stem}"
        main(config.value, Path(folder))

    logging.set_verbosity(logging.ERROR)  # Orbax warns of choices made on purpose
    try:
        app.run(start, flags_parser=_parse)
    except UserError as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(1)


def _refuse(error: UserError) -> None:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr, flush=True)
    # A failed save may have left threads waiting on a full disk; the answer has been given, so nothing may hang here.
    sys.stdout.flush()
    os._exit(2)


def _parse(arguments: list[str]) -> list[str]:
    if any(argument in ("--help", "-help", "--helpfull", "--helpshort") for argument in arguments):
        return flags.FLAGS(arguments)
    _check_overrides(arguments)
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --config=FILE.py --config.steps=100")
    return rest


def _config_file(arguments: list[str]) -> Path:
    return Path(_config_value(arguments).partition(":")[0])


def _config_value(arguments: list[str]) -> str:
    for position, argument in enumerate(arguments):
        name, given, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            if given:
                return value
            if position + 1 < len(arguments):
                return arguments[position + 1]
    raise UserError("no config given; expected --config=FILE.py, for example --config=configs/bert_mlm.py")


def _check_overrides(arguments: list[str]) -> None:
    """Finds a missing config file or an unknown ``--config.key`` before absl does, which answers with a traceback."""
    path, _, argument = _config_value(arguments).partition(":")
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        raise UserError(f"no config file {path!r}; {nearest(path, siblings or map(str, Path('configs').glob('*.py')))}")
    config = load_config(file, argument)
    for given in arguments[1:]:
        if not given.lstrip("-").startswith("config."):
            continue
        node, walked = config, "config"
        for key in given.lstrip("-").partition("=")[0].split(".")[1:]:
            if not isinstance(node, ml_collections.ConfigDict) or key not in node:
                valid = node.keys() if isinstance(node, ml_collections.ConfigDict) else ()
                raise UserError(f"unknown key {walked}.{key}; {nearest(key, valid)}")
            node, walked = node.get(key), f"{walked}.{key}"


def load_config(file: str | Path, argument: str = "") -> ml_collections.ConfigDict:
    """Runs a config file's ``get_config``, with or without an argument.

    Raises:
      UserError: the file has no ``get_config``, or takes no argument where one is given.
    """
    scope: dict = {"__name__": "config", "__file__": str(file)}
    exec(compile(Path(file).read_text(encoding="utf8"), str(file), "exec"), scope)
    if "get_config" not in scope:
        raise UserError(f"{file} defines no get_config(arg)")
    get_config = scope["get_config"]
    if argument and not get_config.__code__.co_argcount:
        raise UserError(f"{file} takes no argument; given {argument!r}")
    return get_config(argument) if get_config.__code__.co_argcount else get_config()

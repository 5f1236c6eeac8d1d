"""What every command line entry shares: flags, help, one-line errors and exit codes.

Exit codes: 0 done or saved on a signal, 2 the user's mistake, 3 ended by an alarm, 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import FlagOrderError, UnsupportedOperationError

from sslx.errors import Alarmed, Unavailable, UserError, nearest
from sslx.runtime import ignore_absent_tpu

HELP = ("-h", "--h", "-help", "--help", "--helpshort", "--helpfull")


class _ValueParser(flags.ArgumentParser):
    """Reads a value of one type, or the word None; which fields may be None is for `config.build` to say."""

    def __init__(self, parser: flags.ArgumentParser, expected: str):
        self._parser, self._expected = parser, expected

    def parse(self, argument: object) -> object:
        if argument == "None":
            return None
        try:
            return self._parser.parse(argument)
        except (ValueError, TypeError):
            raise ValueError(f"expected {self._expected}") from None


for _kind, _parser, _expected in (
    (int, flags.IntegerParser(), "a whole number"),
    (float, flags.FloatParser(), "a number"),
    (bool, flags.BooleanParser(), "true or false"),
    (str, flags.ArgumentParser(), "text"),
):
    config_flags.register_flag_parser_for_type(_kind, _ValueParser(_parser, _expected))


def run(main: Callable[[ml_collections.ConfigDict, epath.Path], None], *, needs_workdir: bool = True) -> None:
    """Parses ``--config`` (and ``--workdir``, default ``runs/<config name>``), then calls ``main(config, workdir)``."""
    config = config_flags.DEFINE_config_file("config", None, "Config file, with an optional argument: FILE.py[:ARG]")
    workdir = flags.DEFINE_string("workdir", "", "Run folder; default: runs/<config name>") if needs_workdir else None

    def start() -> None:
        given = workdir.value if workdir is not None else ""
        folder = given or f"runs/{_config_file(sys.argv).stem}"
        fit_warmup(config.value)
        main(config.value, epath.Path(folder))

    def parse(arguments: list[str]) -> list[str]:
        _check_overrides(arguments)
        return _parse(arguments)

    about = sys.modules[main.__module__].__doc__
    _run(start, parse, lambda: _help(about, needs_workdir))


def run_without_config(main: Callable[[], None]) -> None:
    """Parses the flags of an entry that needs no config, then calls ``main()``."""
    about = sys.modules[main.__module__].__doc__
    _run(main, _parse, lambda: print((about or "").strip()))


def _run(start: Callable[[], None], parse: Callable[[list[str]], list[str]], tell_help: Callable[[], None]) -> None:
    # Orbax warns of choices made on purpose, and logs the traceback of what it then raises.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _tell_unraisable
    if sys.stdout is None:  # closed (>&-): nothing is printed, and everything else goes on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        if any(argument in HELP for argument in sys.argv[1:]):
            tell_help()
            return
        ignore_absent_tpu()
        app.run(lambda _: start(), flags_parser=parse)
    except UserError as error:
        _end(error, 2)
    except (FloatingPointError, Unavailable) as error:  # the run has diverged, or lost a host or a store
        _end(error, 1)
    except Alarmed as alarm:
        _end(alarm, 3)
    except KeyboardInterrupt:
        # By now everything temporary is gone. The usual end is not waited for: XLA's crashes if it was stopped while it
        # compiled.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _tell_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # When a save fails, TensorStore still calls, once an array, into the event loop that Orbax has closed by then.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _end(error: Exception, code: int) -> None:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr, flush=True)
    # A failed save may have left threads waiting on a full disk; the answer has been given, so nothing may hang here.
    sys.stdout.flush()
    os._exit(code)


def _help(about: str | None, needs_workdir: bool) -> None:
    print((about or "").strip())
    print("\nFlags:")
    print("  --config=FILE.py[:ARG]  the experiment; --help beside it lists its values")
    if needs_workdir:
        print("  --workdir=FOLDER        the run folder; default: runs/<config name>")
    print("  --config.KEY=VALUE      changes one value of the experiment; None where a value may be absent")
    if any(argument.lstrip("-").partition("=")[0] == "config" for argument in sys.argv[1:]):
        file, config = _given_config(sys.argv)
        print(f"\n{file}:")
        for key, value in _flattened(config):
            print(f"  --config.{key}={value}")


def _flattened(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, object]]:
    values = []
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        values += _flattened(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return values


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except flags.IllegalFlagValueError as error:
        raise UserError(_worded(str(error))) from None
    except (flags.Error, FlagOrderError, UnsupportedOperationError) as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --name=VALUE")
    return rest


# How Python says that a value is not what absl's parsers read, and what they read.
_UNREAD = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "true or false",
}


def _worded(said: str) -> str:
    """What a flag expects, where all that is said is what Python could not do with its value."""
    for phrase, expected in _UNREAD.items():
        before, found, _ = said.partition(phrase)
        if found:
            return f"{before.rpartition(':')[0]}: expected {expected}"
    return said


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


def _given_config(arguments: list[str]) -> tuple[Path, ml_collections.ConfigDict]:
    path, _, argument = _config_value(arguments).partition(":")
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        valid = siblings or [str(p) for p in sorted(Path("configs").glob("*.py"))]
        looked = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"no config file {path!r}{looked}" + (f"; {nearest(path, valid)}" if valid else ""))
    return file, load_config(file, argument)


def given_keys() -> list[str]:
    """The config's keys of which the command line gives values, such as ``model.layers``."""
    names = [argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
    names = [name.removeprefix("no") for name in names]  # --noconfig.key is absl's way to say false
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]


def fit_warmup(config: ml_collections.ConfigDict) -> None:
    """Shortens the config file's warm-up for a first trial of few steps, of which it would take more than half."""
    given, optimizer = given_keys(), config.get("optimizer")
    if "steps" not in given or "optimizer.warmup_steps" in given or optimizer is None:
        return
    steps, warmup = optimizer.get("schedule_steps") or config.steps, optimizer.get("warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and 0 < steps < 2 * warmup:
        optimizer.warmup_steps = steps // 10
        print(f"note: the warm-up of {warmup} steps is shortened to {steps // 10}, a tenth of config.steps", flush=True)


def _check_overrides(arguments: list[str]) -> None:
    """Finds a missing config file, an unknown ``--config.key`` or one that comes too early, before absl does, which
    answers with a traceback or in words of its own."""
    _, config = _given_config(arguments)
    file_given = False
    for given in arguments[1:]:
        flag = given.lstrip("-").partition("=")[0].removeprefix("no")  # --noconfig.key is absl's way to say false
        file_given |= given.startswith("-") and flag == "config"
        if not given.startswith("-") or not flag.startswith("config."):
            continue
        if not file_given:
            raise UserError(f"{given} stands before --config; put --config={_config_value(arguments)} first")
        node, walked = config, "config"
        for key in flag.split(".")[1:]:
            if not isinstance(node, ml_collections.ConfigDict):
                raise UserError(f"unknown key {walked}.{key}; {walked} is a single value, {node!r}")
            if key not in node:
                raise UserError(f"unknown key {walked}.{key}; {nearest(key, node.keys())}")
            node, walked = node.get(key), f"{walked}.{key}"
        if isinstance(node, ml_collections.ConfigDict):
            raise UserError(f"{walked} is a group; give one of its values: {walked}.{', .'.join(node)}")


def load_config(file: str | Path, argument: str = "") -> ml_collections.ConfigDict:
    """Runs a config file's ``get_config``, with or without an argument.

    Raises:
      UserError: the file does not run, has no ``get_config``, or takes no argument where one is given.
    """
    try:
        scope: dict = {"__name__": "config", "__file__": str(file)}
        exec(compile(Path(file).read_text(encoding="utf8"), str(file), "exec"), scope)
        if "get_config" not in scope:
            raise UserError(f"{file} defines no get_config(arg)")
        get_config = scope["get_config"]
        if argument and not get_config.__code__.co_argcount:
            raise UserError(f"{file} takes no argument; given {argument!r}")
        config = get_config(argument) if get_config.__code__.co_argcount else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {_place(error, file)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config of {file} returned {type(config).__name__}; expected a ConfigDict")
    return config


def _place(error: Exception, file: str | Path) -> str:
    """The file, with the line that an error came from where it is known; a SyntaxError says its own."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}, line {lines[-1]}" if lines else str(file)

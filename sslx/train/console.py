"""What the user sees: a header, a progress bar that degrades to plain lines, tables. Only process 0 prints."""

from __future__ import annotations

import sys
from typing import Any

import jax
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

UNBROKEN = 100_000  # columns


def plain(**options: Any) -> RichConsole:
    """Rich's console on stdout as it is; into a file or a pipe, where no window has a width, it breaks no line."""
    return RichConsole(width=None if sys.stdout.isatty() else UNBROKEN, **options)


class Console:
    """Prints to stdout; quiet on every process but the first."""

    def __init__(self):
        self._console = plain(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, line: str) -> None:
        """One line."""
        self._console.print(Text(line))

    def header(self, title: str, rows: dict[str, str]) -> None:
        """What is about to run, in a box."""
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(value))
        if self._console.is_terminal:
            self._console.print(Panel(table, title=title, expand=False))
            return
        self.say(title)
        for name, value in rows.items():
            self.say(f"  {name:<12} {value}")

    def table(self, title: str, rows: list[dict[str, str]]) -> None:
        """A table; the first row's keys are its columns."""
        if not rows:
            return
        table = Table(title=title, title_justify="left", show_lines=False, expand=False)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row.values()))
        self._console.print(table, soft_wrap=False)

    def start(self, step: int, steps: int) -> None:
        """Starts the progress bar."""
        self._steps = steps
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps, completed=step, numbers="compiling")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Moves the bar; costs nothing without a terminal."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def numbers(self, step: int, values: dict[str, float], remaining: float) -> None:
        """Shows the logged numbers: in the bar, or as a line with the time that is left, in seconds."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=text)
        else:
            self.say(f"step {step}/{self._steps}  {text}  eta {_clock(remaining)}")

    def stop(self) -> None:
        """Ends the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2e}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

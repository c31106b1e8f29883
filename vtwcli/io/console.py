"""What a user sees: results on stdout, progress and words on stderr.

Colour and moving bars appear on a terminal only; ``NO_COLOR`` is respected by rich. Without a terminal,
long work prints a plain line now and then, so a CI log stays readable. Whatever is printed may come from data, models
and file names: it is shown as it is, never obeyed, and what the stream's encoding lacks is spelled out.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from vtwcli.errors import typed_line
from vtwcli.io.text import escaped, fitting, one_line
from vtwcli.machine.libraries import settings
from vtwcli.machine.memory import peak_resident

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PLAIN_INTERVAL_S = 15.0
_EARLY_S = 3.0  # after which a first line says how long the work will take
_LONGEST = 2000  # characters of a message
_NO_TERMINAL_WIDTH = 400  # characters; tables of a log or a pipe keep all their columns
ESCAPE = "vtwcli.escape"
"""Name of the error handler that writes what an encoding lacks as JSON does, ``\\u2588``."""


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(escaped, error.object[error.start : error.end])), error.end


codecs.register_error(ESCAPE, _escaped)


def prepare_streams() -> None:
    """Let no character and no closed stream end the work: what cannot be encoded is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start; the number must not go to a file that is opened next
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)


def stdout() -> Console:
    """A console for results: as wide as the terminal; without one nothing is cut, and there is no colour."""
    if sys.stdout.isatty():
        return _screen()(file=sys.stdout)
    width = None if "COLUMNS" in os.environ else _NO_TERMINAL_WIDTH
    return _screen()(file=sys.stdout, soft_wrap=True, width=width)


def stderr() -> Console:
    """A console for progress and words."""
    return _screen()(file=sys.stderr, soft_wrap=not sys.stderr.isatty())


@cache
def _screen() -> type[Console]:
    """The class of the consoles: rich's own, with text as it is."""
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(highlight=False, markup=False, emoji=False, **options)

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(fitting(text, self.encoding), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(fitting(segment.text, self.encoding), segment.style)

    return Screen


def result(renderable: Any) -> None:
    """Print a result (text or a rich renderable) on stdout."""
    console = stdout()
    with console.capture() as drawn:  # rich would end the program where nobody reads on
        console.print(renderable)
    shown = drawn.get()
    if not sys.stdout.isatty():  # the blanks that fill a table's last column
        shown = "\n".join(map(str.rstrip, shown.split("\n")))
    _to_stdout(lambda: sys.stdout.write(shown))


def result_text(text: str) -> None:
    """Write text to stdout, not wrapped and without colour, for JSON and other machine formats.

    What is spelled out is so in JSON's own way, so that a document stays the same document.
    """
    text = fitting(text, sys.stdout.encoding)
    _to_stdout(lambda: sys.stdout.write(text if text.endswith("\n") else text + "\n"))


def _to_stdout(write: Callable[[], object]) -> None:
    """A full disk or a reader that has left ends the output, not the work; ``cli.main`` tells of it at the end."""
    try:
        write()
        sys.stdout.flush()
    except OSError as error:
        lose_stdout(error)


def lose_stdout(error: OSError) -> None:
    """Go on without stdout, and remember why unless its reader has left."""
    if not isinstance(error, BrokenPipeError):
        settings.unwritten = error
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())  # what is still buffered must not fail once more at the exit
    except (OSError, ValueError):  # no stream of the system
        pass
    finally:
        os.close(nowhere)


def _to_stderr(text: str, style: str | None = None) -> None:
    with suppress(OSError):  # words that cannot be told must not end the work
        stderr().print(text, style=style)


def note(text: str) -> None:
    """A word on stderr; silent under ``--quiet``."""
    if not settings.quiet:
        _to_stderr(text)


def detail(text: str) -> None:
    """A word on stderr that only ``--verbose`` asks for."""
    if settings.verbose and not settings.quiet:
        _to_stderr(text, "dim")


def warn(text: str) -> None:
    """A warning on stderr; shown under ``--quiet`` too."""
    _to_stderr(f"warning: {one_line(text, _LONGEST)}", "yellow")


@contextmanager
def not_worth_failing(what: str) -> Iterator[None]:
    """Turn a failure of something that is only for looks into a warning.

    Args:
        what: what is missing then.
    """
    try:
        yield
    except Exception as error:  # drawing raises whatever the text of data leads it to
        warn(f"{what} ({typed_line(error)})")


def error(message: str, hint: str | None = None) -> None:
    """The one line (and a hint) with which a command fails."""
    _to_stderr(f"error: {one_line(message, _LONGEST)}", "bold red")
    if hint:
        _to_stderr(f"  {one_line(hint, _LONGEST)}")


def trace(error: BaseException) -> None:
    """Where an unexpected failure came from."""
    import traceback

    with suppress(OSError):
        sys.stderr.write(fitting("".join(traceback.format_exception(error)), sys.stderr.encoding))


class Task:
    """One piece of long work; ``advance`` it as units finish."""

    def __init__(self, description: str, total: int | None, bar: Progress | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._id = bar.add_task(description, total=total) if bar is not None else None
        self._started = self._last = time.monotonic()
        self._interval = _EARLY_S

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more units as done."""
        self.done += n
        if self._bar is not None and self._id is not None:
            self._bar.advance(self._id, n)
        elif not settings.quiet and time.monotonic() - self._last > self._interval:
            self._last, self._interval = time.monotonic(), _PLAIN_INTERVAL_S
            left = ""
            if self.total and self.done:
                seconds = (self._last - self._started) * (self.total - self.done) / self.done
                left = f", about {seconds:.0f} s left"
            if self.done == self.total:
                return
            note(f"{self.description}: {self.done}/{self.total or '?'}{left}, {_memory()}")

    def update(self, text: str) -> None:
        """Change the description, for example to name the current layer."""
        self.description = text
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, description=text)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Task]:
    """Show long work on stderr: a bar with remaining time and peak memory on a terminal, sparse lines elsewhere.

    Args:
        description: what is being done, a few words.
        total: number of units, or None when unknown.
    """
    if settings.quiet or not sys.stderr.isatty():
        yield Task(description, total, None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Memory(ProgressColumn):
        def render(self, task: object) -> Text:
            return Text(_memory(), style="dim")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        Memory(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        yield Task(description, total, bar)


def _memory() -> str:
    return f"{peak_resident() / 1e9:.1f} GB"

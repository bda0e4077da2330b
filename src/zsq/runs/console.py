"""What a run shows while it works, on stderr: a bar in a terminal, a line now and then in a log."""

import importlib
import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from types import TracebackType
from typing import Any, TextIO

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

from zsq.runs.forecast import Forecast
from zsq.runtime import distributed
from zsq.runtime.observer import Observer, Silent
from zsq.runtime.plain_text import printable

LINE_EVERY = 30
"""Seconds between two lines where stderr is no terminal."""

NOTEBOOK_EVERY, NOTEBOOK_COLUMNS = 0.25, 100
"""Seconds between two pictures of a bar in a notebook, and its columns."""

NOTEBOOK_STYLE = "white-space:pre-wrap;word-break:normal;font-family:var(--jp-code-font-family,monospace)"
"""Of its text: long lines are folded between words."""


def say_line(text: str) -> None:
    """Print a line that the user should read."""
    print(text, file=sys.stderr, flush=True)


class Lines(logging.Handler):
    """Prints what is logged as lines, warnings marked as such.

    Args:
        stream: where; None takes the stderr of the moment.
        level: the least that is printed.
    """

    def __init__(self, stream: TextIO | None = None, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        marked = "WARNING: " if record.levelno >= logging.WARNING else ""
        return marked + printable(record.getMessage())

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        print(self.format(record), file=self.stream or sys.stderr, flush=True)


def _printing() -> list[Lines]:
    """Return what prints the lines now."""
    return [handler for handler in logging.getLogger("zsq").handlers if isinstance(handler, Lines)]


@contextmanager
def lines_on(stream: TextIO | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Print what zsq logs within the block, once where blocks are nested.

    Args:
        stream: where; None takes the stderr of the moment.
        verbose: print details, too.
    """
    if _printing():
        yield
        return
    logger = logging.getLogger("zsq")
    wanted = logging.DEBUG if verbose else logging.INFO
    handler, level = Lines(stream, wanted), logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > wanted:
        logger.setLevel(wanted)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def lines_off() -> Iterator[None]:
    """Print nothing of what zsq logs within the block."""
    logger, printing = logging.getLogger("zsq"), _printing()
    for handler in printing:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in printing:
            logger.addHandler(handler)


@contextmanager
def shown(observer: Observer | None, *, quiet: bool) -> Iterator[Observer]:
    """Yield who is told how far a run is, and print what it logs.

    Args:
        observer: the caller's; None shows a bar on stderr.
        quiet: show and print nothing; of several processes, all but the first are quiet anyway.
    """
    if not distributed.is_main():
        with lines_off():
            yield Silent()
    elif quiet:
        with lines_off():
            yield observer or Silent()
    elif observer is not None:
        with lines_on():
            yield observer
    else:
        with TerminalProgress() as terminal, lines_on(terminal.notebook):
            yield terminal


class TimeLeft(bars.ProgressColumn):
    """Time left of the phase, and of the whole run where it is known."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.forecast: Forecast | None = None

    def render(self, task: bars.Task) -> Text:
        """Return such as `0:31 left, run 4:05`."""
        left, whole = task.time_remaining, ""
        if self.forecast is not None:
            if left is None:
                left = self.forecast.of_phase(time.monotonic())
            whole = f", run {clock((left or 0.0) + self.forecast.rest())}"
        return Text(f"{'-:--' if left is None else clock(left)} left{whole}", style="progress.remaining")


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are any.

    >>> clock(245.2), clock(3700), clock(-3)
    ('4:05', '1:01:40', '0:00')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class NotebookOutput(io.StringIO):
    """One output of a notebook cell that is replaced as a run goes on: what was written to it, and a bar below."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None
        self._shown = 0.0

    def write(self, text: str) -> int:
        """Add text."""
        count = super().write(text)
        if text:  # rich writes nothing, too, where a bar is rendered
            self.show("")
        return count

    def show(self, bar: str) -> None:
        """Show what was written, and a bar, unless another one was shown a moment ago."""
        now = time.monotonic()
        if bar and now - self._shown < NOTEBOOK_EVERY:
            return
        self._shown = now
        display = importlib.import_module("IPython.display").display
        text = self.getvalue() + bar
        data = {"text/plain": text, "text/html": f'<pre style="{NOTEBOOK_STYLE}">{escape(text)}</pre>'}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class TerminalProgress:
    """Shows each phase with the time left and its latest losses, a finished one as one line; use it as a context.

    Where the terminal is narrow, losses go first. A notebook shows the same in one output; in a log, there is a line
    now and then.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self.notebook = NotebookOutput() if self._console.is_jupyter else None
        """Where lines go in a notebook."""
        if self.notebook is not None:
            self._console = Console(file=self.notebook, force_jupyter=False, width=NOTEBOOK_COLUMNS, color_system=None)
        self._left = TimeLeft()
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            bars.BarColumn(bar_width=16),
            bars.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            self._left,
            bars.TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self._console,
            expand=True,
        )
        self._draws = self._console.is_terminal or self.notebook is not None
        self._task: tuple[str, bars.TaskID] | None = None
        self._shown = 0.0
        self._begun: dict[str, tuple[float, int, int, int]] = {}

    def expect(self, forecast: Forecast) -> None:
        """Show the time left of the whole run, too."""
        self._left.forecast = forecast

    def _show(self, phase: str, done: int, total: int, losses: str) -> None:
        """Show a phase in the terminal, alone; what was shown before it, and it when it is finished, becomes a line."""
        if self._task is not None and (self._task[0] != phase or done < self._bars.tasks[0].completed):
            self._fold()
        if self._task is None:
            self._task = phase, self._bars.add_task(phase, total=total, losses="")
        self._bars.update(self._task[1], completed=done, total=total, losses=losses)
        if done >= total:
            self._fold()
        elif self.notebook is not None:
            with self._console.capture() as bar:
                self._console.print(self._bars.get_renderable())
            self.notebook.show(bar.get())

    def _fold(self) -> None:
        """Replace the phase that is shown by one line of text."""
        if self._task is None:
            return
        (task,) = self._bars.tasks
        text = f"{task.description:15} {task.completed:.0f}/{task.total:.0f} in {clock(task.elapsed or 0)}"
        self._bars.remove_task(task.id)
        self._task = None
        line = f"{text}  {task.fields['losses']}".rstrip()
        self._bars.console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis", crop=True)

    def __enter__(self) -> "TerminalProgress":
        if self._draws and self.notebook is None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draws:
            self._fold()
            if self.notebook is None:
                self._bars.stop()

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Show that `done` of `total` steps of `phase` are finished, with the latest values."""
        losses = " ".join(f"{name} {value:.3g}" for name, value in values.items())
        now = time.monotonic()
        start, first, latest, whole = self._begun.get(phase, (now, done, -1, total))
        if done < latest or total != whole or done == latest == total:  # the next run's phase of the same name
            start, first = now, done
        self._begun[phase] = (start, first, done, total)
        forecast = self._left.forecast
        if forecast is not None:
            forecast.update(phase, done, total, now)
        if self._draws:
            self._show(phase, done, total, losses)
            return
        if done >= total and values:
            say_line(f"{phase}: {done}/{total}, done in {now - start:.0f} s {losses}")
        elif first < done < total and now - self._shown > LINE_EVERY:
            left = (now - start) / (done - first) * (total - done)
            if left >= 1:  # else it is over before the line is read
                self._shown = now
                of_run = "" if forecast is None else f", run {left + forecast.rest():.0f} s"
                say_line(f"{phase}: {done}/{total}, about {left:.0f} s left{of_run} {losses}".rstrip())

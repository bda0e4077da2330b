"""What a run shows while it works, on stderr: a bar in a terminal, a line now and then in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich import progress as bars
from rich.console import Console

from zsq.runtime import distributed
from zsq.runtime.observer import Observer, Silent
from zsq.runtime.plain_text import printable

LINE_EVERY = 30
"""Seconds between two lines where stderr is not a terminal."""


def say_line(text: str) -> None:
    """Print a line that the user should read."""
    print(text, file=sys.stderr, flush=True)


class Lines(logging.Handler):
    """Prints what is logged as lines, warnings marked as such.

    Args:
        stream: where; None takes the stderr of the moment.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(logging.INFO)
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
def lines_on(stream: TextIO | None = None) -> Iterator[None]:
    """Print what zsq logs within the block, on stderr unless another stream is given; once, where blocks are nested."""
    if _printing():
        yield
        return
    logger = logging.getLogger("zsq")
    handler, level = Lines(stream), logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
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
        with lines_on(), TerminalProgress() as terminal:
            yield terminal


class TerminalProgress:
    """Shows each phase with its latest losses and the time left; use it as a context."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = bars.Progress(
            bars.TextColumn("{task.description:14}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[losses]}"),
            console=self._console,
        )
        self._tasks: dict[str, int] = {}
        self._shown = 0.0
        self._begun: dict[str, tuple[float, int, int, int]] = {}

    def __enter__(self) -> "TerminalProgress":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Show that `done` of `total` steps of `phase` are finished, with the latest values."""
        losses = " ".join(f"{name} {value:.3g}" for name, value in values.items())
        now = time.monotonic()
        start, first, latest, whole = self._begun.get(phase, (now, done, -1, total))
        if done < latest or total != whole or done == latest == total:  # the next run's phase of the same name
            start, first = now, done
        self._begun[phase] = (start, first, done, total)
        if self._console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, losses="")
            elif start == now:
                self._bars.reset(self._tasks[phase], total=total)  # type: ignore[arg-type]
            self._bars.update(self._tasks[phase], completed=done, total=total, losses=losses)  # type: ignore[arg-type]
            return
        if done >= total and values:
            say_line(f"{phase}: {done}/{total}, done in {now - start:.0f} s {losses}")
        elif first < done < total and now - self._shown > LINE_EVERY:
            left = (now - start) / (done - first) * (total - done)
            if left >= 1:  # else it is over before the line is read
                self._shown = now
                say_line(f"{phase}: {done}/{total}, about {left:.0f} s left {losses}".rstrip())

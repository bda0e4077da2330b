"""What a run shows while it works, on stderr: a bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from zsq.runtime import distributed
from zsq.training.loop import Progress, Say, Silent

LINE_EVERY = 30
"""Seconds between two lines where stderr is not a terminal."""


def say_line(text: str) -> None:
    """Print a line that the user should read."""
    print(text, file=sys.stderr, flush=True)


def nothing(text: str) -> None:
    """Say nothing."""
    del text


@contextmanager
def shown(progress: Progress | None, say: Say | None, *, quiet: bool) -> Iterator[tuple[Progress, Say]]:
    """Yield where a run shows its progress, and what it says lines with: on stderr, unless the caller gives his own.

    Args:
        progress, say: the caller's; None takes a bar and lines on stderr.
        quiet: show nothing that the caller did not ask for; of several processes, all but the first are quiet anyway.
    """
    if not distributed.is_main():
        yield Silent(), nothing
    elif quiet or progress is not None:
        yield progress or Silent(), say or (nothing if quiet else say_line)
    else:
        with TerminalProgress() as terminal:
            yield terminal, say or say_line


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

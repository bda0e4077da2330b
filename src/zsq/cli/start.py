"""Where `zsq` starts: what can be said at once, before the seconds that importing PyTorch takes."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from zsq.cli.names import SUPERVISED, WRONG_USAGE, misspelled, without_anywhere
from zsq.runtime.quiet import leave_stdout
from zsq.runtime.versions import version_line

LOADING = "zsq: loading PyTorch ..."
"""Shown in a terminal until something else is."""

NOTHING_DONE = "Stopped before anything was done."

QUIET = "--quiet"


def main() -> None:
    """Run the command line of this process."""
    words = sys.argv[1:]
    if error := misspelled(without_anywhere(words)):
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(WRONG_USAGE)
    if words == ["--version"]:
        _say(version_line())
        return
    with _ends_in_one_line(), _loading(shown=QUIET not in words):
        from zsq.cli.main import main as run
    run()


def _say(text: str) -> None:
    """Print a line; one line of error where standard output takes nothing, as on a full disk."""
    try:
        print(text, flush=True)
    except OSError as error:
        leave_stdout()
        print(f"Error: writing: {error.strerror or error}.", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _ends_in_one_line() -> Iterator[None]:
    """End the process with one line where a signal comes; a module half imported must not see an exception.

    Signals that are ignored, as below `nohup`, stay so, and a process that `--devices` started leaves the line to its
    starter.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(2, f"\r{NOTHING_DONE:{len(LOADING)}}\n".encode())
        os._exit(128 + number)

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        supervised = number == signal.SIGTERM and SUPERVISED in os.environ
        if signal.getsignal(number) not in (None, signal.SIG_IGN) and not supervised:
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


@contextmanager
def _loading(*, shown: bool) -> Iterator[None]:
    """Say in a terminal what takes so long, until the block ends."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(LOADING)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write(f"\r{' ' * len(LOADING)}\r")
        sys.stderr.flush()

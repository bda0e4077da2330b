"""What goes to standard output: results alone."""

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console

from zsq.runtime.plain_text import printable

NAME_WIDTH = 24
"""Columns that names of rows take."""


class PlainConsole(Console):
    """Prints texts as they are, without markup, and names so that the terminal does nothing with them."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts and tables."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and texts, a line each; in a terminal, long texts are folded between words, beside their names."""
    for name, text in rows:
        line = f"{name + ':':{NAME_WIDTH}} {text}"
        if console.is_terminal:
            line = _folded(line, console.width, " " * (NAME_WIDTH + 1))
        console.print(line, soft_wrap=True)


def print_error(text: str) -> None:
    """Print what went wrong to standard error, as one line; a terminal shows it folded between words."""
    line = f"Error: {printable(' '.join(text.split()))}"
    if sys.stderr.isatty():
        line = _folded(line, Console(stderr=True).width)
    print(line, file=sys.stderr)


def _folded(line: str, width: int, indent: str = "") -> str:
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def open_streams() -> None:
    """Give standard output and error that are closed a place to go, and let both take names of any bytes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Keep what the user's code prints out of the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

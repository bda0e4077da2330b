"""Keep from a stream what shall not be there: of libraries on standard error, of the process on a closed output."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Send to nowhere what C++ of a library writes to the standard error, for which it has no switch."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def leave_stdout() -> None:
    """Let nothing more be written to a standard output that takes nothing, at exit either."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

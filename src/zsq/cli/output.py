"""What goes to standard output: results alone."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Keep what the user's code prints out of the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

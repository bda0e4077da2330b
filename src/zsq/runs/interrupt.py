"""An interrupt of a run that Python has started."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BEGUN = "settings.toml"
"""File without which a run cannot be continued."""


class Stopped(KeyboardInterrupt):
    """A run was interrupted; the text says how it goes on. A notebook shows that line alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def told_how_to_resume(folder: str | Path | None, name: str) -> Iterator[None]:
    """Say after an interrupt how the run of a folder continues.

    Args:
        folder: of the run, where it is known.
        name: of the function that is called again.

    Raises:
        Stopped: in place of `KeyboardInterrupt`.
    """
    try:
        yield
    except KeyboardInterrupt:
        if folder is None or not (Path(folder) / BEGUN).exists():
            raise Stopped(f"Stopped before {name} had anything to keep.") from None
        raise Stopped(f"Stopped; zsq.{name}(out={str(folder)!r}, resume=True) continues.") from None

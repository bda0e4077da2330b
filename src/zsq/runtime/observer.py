"""Who is shown how far the work is."""

from typing import Protocol


class Observer(Protocol):
    """Is told how far the work is."""

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Take note that `done` of `total` steps of `phase` are finished, with the latest values."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Do nothing."""
        del phase, done, total, values

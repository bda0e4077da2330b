"""What a training phase tells another tool while it runs."""

from typing import Protocol

from zsq.types import SampleSource


class Log(Protocol):
    """Takes the losses and rates of a phase, and pictures of samples."""

    def begin(self, phase: str, step: int, steps: int) -> None:
        """Open the log of a phase of `steps` steps, of which `step` are done: later ones are told again."""
        ...

    def add(self, step: int, values: dict[str, float]) -> None:
        """Take note of the losses and learning rates after `step` steps."""
        ...

    def show(self, step: int, source: SampleSource) -> None:
        """Keep a picture of a source's samples where it is time for one."""
        ...

    def end(self) -> None:
        """Close the log of the phase."""
        ...


class NoLog:
    """Keeps nothing."""

    def begin(self, phase: str, step: int, steps: int) -> None:
        """Do nothing."""
        del phase, step, steps

    def add(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""
        del step, values

    def show(self, step: int, source: SampleSource) -> None:
        """Do nothing."""
        del step, source

    def end(self) -> None:
        """Do nothing."""

"""What the training loop drives."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Learner(Protocol):
    """One training step, and a state to save."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Do step `step` and return its losses as scalars."""
        ...

    def rates(self) -> dict[str, float]:
        """Return the learning rates of the latest step, by name."""
        ...

    def halve(self) -> bool:
        """Split later batches into twice as many parts where that is possible, and return whether it was."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that later steps depend on, flat."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...

"""When a run should end: what its phases were expected to take, put right by what they have taken so far."""

from collections.abc import Collection, Mapping

PRIOR_SECONDS = 2.0
"""Seconds for which the machine counts as taking as long as expected, so that the first tenths decide nothing."""

OVERDUE = 0.25
"""What is left of a phase that tells nothing and has taken longer than expected, over what it has taken."""


class Forecast:
    """Follows a run through its phases; what is not done yet takes as much longer as what is done did.

    Args:
        expected: seconds that each phase should take, in order; a phase that the run leaves out counts as done once a
            later one has begun.
        guessed: phases whose seconds were not measured, so that their pace says nothing of the others.
    """

    def __init__(self, expected: Mapping[str, float], guessed: Collection[str] = ()) -> None:
        self._expected = dict(expected)
        self._guessed = frozenset(guessed)
        self._ahead = list(expected)
        self._phase, self._begin, self._first = "", 0.0, 0
        self._latest, self._done, self._total = 0.0, 0, 1
        self._took = self._should = PRIOR_SECONDS

    def update(self, phase: str, done: int, total: int, now: float) -> None:
        """Take note of how far a phase is at a moment, in seconds of any clock."""
        if phase != self._phase:
            took, should = self._told()
            self._took, self._should = self._took + took, self._should + should
            self._phase, self._begin, self._first = phase, now, done
            if phase in self._ahead:
                del self._ahead[: self._ahead.index(phase) + 1]
        self._latest, self._done, self._total = now, done, max(1, total)

    def _told(self) -> tuple[float, float]:
        """Return what the done part of this phase took, and what it should have taken; zeros where that is unknown."""
        if self._phase in self._guessed or self._phase not in self._expected:
            return 0.0, 0.0
        share = max(0, self._done - self._first) / self._total
        return (self._latest - self._begin, self._expected[self._phase] * share) if share else (0.0, 0.0)

    @property
    def slowness(self) -> float:
        """What phases take over what was expected of them: 2 on a core that another process shares."""
        took, should = self._told()
        return (self._took + took) / (self._should + should)

    def rest(self) -> float:
        """Return the seconds of the phases behind this one."""
        return self.slowness * sum(self._expected[phase] for phase in self._ahead)

    def of_phase(self, now: float) -> float | None:
        """Return the seconds that are left of this phase; None where nothing was expected of it and nothing is done."""
        if self._done > self._first:
            return (self._latest - self._begin) / (self._done - self._first) * (self._total - self._done)
        if self._phase not in self._expected:
            return None
        took = now - self._begin
        return max(OVERDUE * took, self.slowness * self._expected[self._phase] - took)

    def left(self, now: float) -> float:
        """Return the seconds until the run ends."""
        return (self.of_phase(now) or 0.0) + self.rest()

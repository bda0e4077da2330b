"""Random numbers and waves that are the same on every machine and with every version of numpy."""

import numpy as np

MANTISSA = 2.0**-53
"""What scales 53 random bits to [0, 1)."""


class Stream:
    """Random numbers as a function of (kind, seed, index): raw words of Philox, which numpy keeps as they are.

    numpy promises the words of its bit generators and not what its distributions make of them, so that numbers are
    made of the words here, by operations that IEEE 754 rounds the same everywhere.

    Args:
        kind: what is drawn, so that images and signals of one seed are independent.
        seed, index: which of them, each from 0 to 2^64 - 1.

    >>> Stream(0, 1, 2).uniform(3).round(4).tolist()
    [0.3093, 0.357, 0.0369]
    """

    def __init__(self, kind: int, seed: int, index: int) -> None:
        key = np.array([seed, index], dtype=np.uint64)
        self._words = np.random.Philox(counter=[0, 0, 0, kind], key=key)

    def uniform(self, *shape: int) -> np.ndarray:
        """Return numbers from [0, 1), float64 of that shape."""
        count = 1
        for size in shape:
            count *= size
        words: np.ndarray = self._words.random_raw(count)
        return ((words >> np.uint64(11)) * MANTISSA).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """Return one number from [low, high)."""
        return low + (high - low) * float(self.uniform(1)[0])

    def below(self, count: int) -> int:
        """Return one integer from 0 to count - 1."""
        return int(self.between(0, count))

    def chance(self, share: float) -> bool:
        """Return True in this share of the cases."""
        return self.between(0, 1) < share

    def bell(self, *shape: int) -> np.ndarray:
        """Return sums of four uniform numbers, with mean 0 and variance 1: nearly normal, and at most 3.5."""
        parts = self.uniform(4, *shape)
        sums: np.ndarray = parts[0] + parts[1] + parts[2] + parts[3]
        return (sums - 2.0) * 1.7320508075688772


def wave(turns: np.ndarray) -> np.ndarray:
    """Return sin(2 pi turns) to within 2e-4, by a polynomial: libraries differ in the last bits of their sines.

    >>> wave(np.array([0.0, 0.25, 0.5, 0.75, 1.125])).round(3).tolist()
    [0.0, 1.0, 0.0, -1.0, 0.707]
    """
    phase = turns - np.floor(turns)
    quarter = 1.0 - np.abs(4.0 * np.abs(phase - 0.5) - 1.0)  # 0 at multiples of a half, 1 at the quarters
    square = quarter * quarter
    value = quarter * (1.5706268 + square * (-0.6432292 + square * 0.0727102))
    signed: np.ndarray = np.where(phase > 0.5, -value, value)
    return signed

"""Drawn heartbeats: two leads of four seconds, in eight rhythms and shapes."""

import numpy as np

from zsq.data.shapes.stream import Stream, wave

SIGNAL_CLASSES = ("normal", "fast", "slow", "irregular", "premature", "skipped", "flutter", "inverted")
"""Names of the classes, in the order of their labels."""

LEADS, SAMPLES = 2, 256
"""Channels and length of a signal; 64 samples a second."""

SIGNAL = 16
"""Kind of the streams; those of images are below."""

PERIODS = {"fast": (24.0, 34.0), "slow": (76.0, 104.0), "irregular": (26.0, 72.0)}
"""Samples from beat to beat; other classes: 42 to 60."""

WAVES = ((-10.0, 4.5, 0.16), (-2.2, 1.6, -0.14), (0.0, 2.2, 1.0), (2.4, 1.8, -0.22), (14.0, 8.0, 0.3))
"""P, Q, R, S and T of a beat: place after its R in samples, half width in samples, height."""

FLUTTER_PERIOD = 11.0
"""Samples of each of the small waves of flutter, about four a beat."""


def signals(count: int, *, seed: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return signals, float32 [count, 2, 256], with heights of about 1, and their classes, int64 [count].

    Signal number `start + i` of a seed is the same whatever else is drawn, on every machine.

    >>> drawn, classes = signals(3, seed=7)
    >>> drawn.shape, drawn.dtype.name, [SIGNAL_CLASSES[label] for label in classes]
    ((3, 2, 256), 'float32', ['fast', 'slow', 'fast'])
    """
    drawn = np.zeros((count, LEADS, SAMPLES), np.float32)
    labels = np.zeros(count, np.int64)
    for row in range(count):
        draws = Stream(SIGNAL, seed, start + row)
        labels[row] = draws.below(len(SIGNAL_CLASSES))
        drawn[row] = _signal(draws, SIGNAL_CLASSES[labels[row]])
    return drawn, labels


def signal_labels(count: int, *, seed: int, start: int = 0) -> np.ndarray:
    """Return the classes of these signals, int64 [count], without drawing them."""
    rows = (Stream(SIGNAL, seed, start + row) for row in range(count))
    return np.array([draws.below(len(SIGNAL_CLASSES)) for draws in rows], np.int64)


def _signal(draws: Stream, name: str) -> np.ndarray:
    time = np.arange(SAMPLES, dtype=np.float64)
    heights = 1.0 + 0.25 * (2.0 * draws.uniform(LEADS, len(WAVES)) - 1.0)
    heights[1] *= draws.between(0.5, 0.9)
    widths = draws.between(0.85, 1.2)
    values = np.zeros((LEADS, SAMPLES))
    for place, wide in _beats(draws, name):
        for number, (after, width, height) in enumerate(WAVES):
            if (wide or name == "flutter") and number == 0:
                continue  # no P wave
            stretch = widths * (2.4 if wide else 1.0)
            size = -height if name == "inverted" and number == 4 else height
            size = -1.2 * height if wide and number == 4 else size
            values += heights[:, number, None] * size * _bump((time - place - after * widths) / (width * stretch))
    if name == "flutter":
        turns = time / (FLUTTER_PERIOD * draws.between(0.85, 1.15)) + draws.between(0, 1)
        saw = 2.0 * (turns - np.floor(turns)) - 1.0
        values += draws.between(0.08, 0.16) * saw
    drift = draws.between(0.0, 0.25) * wave(time / draws.between(150.0, 400.0) + draws.between(0, 1))
    hum = draws.between(0.0, 0.05) * wave(time * draws.between(0.3, 0.45))
    noise = draws.between(0.01, 0.1) * draws.bell(LEADS, SAMPLES)
    return draws.between(0.7, 1.3) * (values + drift + hum + noise)


def _bump(x: np.ndarray) -> np.ndarray:
    """Return a smooth bump of height 1 over [-2, 2], nearly Gaussian."""
    rest = np.maximum(1.0 - 0.25 * x * x, 0.0)
    bump: np.ndarray = rest * rest * rest
    return bump


def _beats(draws: Stream, name: str) -> list[tuple[float, bool]]:
    """Return place and kind of each beat: whether it is a wide one that came early."""
    low, high = PERIODS.get(name, (42.0, 60.0))
    period = draws.between(low, high)
    place = -draws.between(0.0, 1.0) * period
    beats = []
    while place < SAMPLES + 20.0:
        beats.append((place, False))
        place += draws.between(low, high) if name == "irregular" else period * draws.between(0.97, 1.03)
    inside = [number for number, (at, _) in enumerate(beats) if 35.0 < at < SAMPLES - 45.0]
    chosen = inside[draws.below(len(inside))]
    if name == "premature":
        beats[chosen] = (beats[chosen][0] - draws.between(0.28, 0.42) * period, True)
    elif name == "skipped":
        del beats[chosen]
    return beats

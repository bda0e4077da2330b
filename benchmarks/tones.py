"""Draw tones of known pitch for CREPE (examples/crepe.py), as an .npz that `zsq --data` reads.

    python benchmarks/tones.py tones.npz --count 1000 --seed 1

Each is a sum of harmonics whose amplitudes fall at random, with noise of up to 0.3 of their deviation, 1,024 samples at
16 kHz, standardised. The label is the pitch's class of 20 cents, 40 to 299.
"""

import argparse
from pathlib import Path

import numpy as np

RATE, SAMPLES = 16_000, 1024
LOWEST, HIGHEST = 40, 300
CENTS, OFFSET = 20, 1997.3794084376191
"""Of a class, and of class 0 above 10 Hz, as in CREPE."""


def tones(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tones, float32 [count, 1, 1024], and their classes, int64 [count]."""
    random = np.random.default_rng(seed)
    classes = random.integers(LOWEST, HIGHEST, count)
    pitches = 10 * 2 ** ((CENTS * classes + OFFSET) / 1200)
    time = np.arange(SAMPLES) / RATE
    drawn = np.zeros((count, 1, SAMPLES), np.float32)
    for row, pitch in enumerate(pitches):
        harmonic = np.arange(1, 1 + int(min(20, 7500 // pitch)))
        amplitude = harmonic ** -random.uniform(0.5, 1.8) * random.uniform(0.3, 1, len(harmonic))
        phase = random.uniform(0, 2 * np.pi, len(harmonic))
        wave = (amplitude[:, None] * np.sin(2 * np.pi * pitch * harmonic[:, None] * time + phase[:, None])).sum(0)
        wave += random.normal(size=SAMPLES) * wave.std() * random.uniform(0, 0.3)
        drawn[row, 0] = (wave - wave.mean()) / wave.std()
    return drawn, classes


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    inputs, labels = tones(options.count, options.seed)
    np.savez(options.file, inputs=inputs, labels=labels)


if __name__ == "__main__":
    main()

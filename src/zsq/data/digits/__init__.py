"""The bundled teacher: a small residual network that reads the 8x8 digits of scikit-learn.

Its weights (`weights.safetensors`) were trained by `python -m zsq.data.digits.train` on half of the set; the other half
tests it.
"""

from functools import cache
from pathlib import Path

import numpy as np

from zsq.data.bundled import Bundled
from zsq.data.digits.network import DigitsNet
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=1, height=8, width=8, classes=10, mean=(0.3050,), std=(0.3757,))
"""Mean and deviation are those of the training half's pixels, on the scale of [0, 1]."""

SPLIT_SEED = 20190607


NETWORK = Bundled(
    name="digits",
    summary="8x8 digits, 10 classes",
    build=DigitsNet,
    weights=Path(__file__).with_name("weights.safetensors"),
    spec=SPEC,
)
"""It takes float [N, 1, 8, 8] and gives logits [N, 10]."""


def split(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return one half of the digits: images uint8 [N, 8, 8, 1] in 0..255 and labels int64 [N].

    The halves are disjoint, each class is halved, and the order is a fixed permutation. The set's own pixels, 0 to 16,
    are scaled to 0..255 and rounded (an error of at most half a grey level).

    >>> images, labels = split(train=False)
    >>> images.shape, images.dtype.name, labels.dtype.name
    ((899, 8, 8, 1), 'uint8', 'int64')
    """
    images, labels = _digits()
    chosen = _training_half() if train else ~_training_half()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    index = order[chosen[order]]
    return images[index], labels[index]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images / 16 * 255).astype(np.uint8)
    return pixels[..., None], digits.target.astype(np.int64)


@cache
def _training_half() -> np.ndarray:
    """Mark every second image of each class, in a fixed random order, as bool [1797]; odd classes alternate."""
    _, labels = _digits()
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_class[1::2]] = True
    return chosen

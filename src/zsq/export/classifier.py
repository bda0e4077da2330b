"""What all runtimes share that run a file: what it takes by its metadata, the check of a shape, and pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.errors import InputError
from zsq.export.image_spec import KEY, from_json
from zsq.export.pixels import as_pixels, fed, layout_in
from zsq.export.profile import Profile
from zsq.types import ImageSpec


class FileClassifier(ABC):
    """A file in a runtime, called like a network.

    Args:
        path: the file.
        notes: its metadata, by name.
        shape: of its input: sizes, or a name where any will do.
    """

    def __init__(self, path: Path, notes: Mapping[str, str], shape: list[Any]) -> None:
        self._path, self._notes, self._shape, self._layout = path, notes, shape, layout_in(notes)
        if self._layout is not None:
            self._shape = [shape[0], *self.spec.shape]

    @cached_property
    def spec(self) -> ImageSpec:
        """What the file takes and gives, as zsq has noted in it.

        Raises:
            InputError: it holds no such note.
        """
        if KEY not in self._notes:
            raise InputError(f"{self._path} does not say how its images are normalised; zsq has not written it.")
        return from_json(self._notes[KEY], f"{self._path}: its metadata {KEY}")

    def seen(self, images: Tensor) -> Tensor:
        """Return the normalised images that the file computes with: of the nearest pixels where it takes those."""
        return images if self._layout is None else as_pixels(images, self.spec)

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Return the logits, float [N, classes], of normalised images, float [N, C, H, W].

        A file that gives something else gives all of it in one row an image, [N, K].

        A file that takes pixels is fed the nearest ones; one of a fixed batch gets as many as it takes at a time.

        Raises:
            InputError: the images do not have the shape that the file takes, or the runtime cannot run it.
        """
        images = torch.as_tensor(images).detach().to("cpu", torch.float32).contiguous()
        if images.dim() != len(self._shape) or list(images.shape[1:]) != self._shape[1:]:
            raise InputError(f"images are {list(images.shape)}; the file takes {self._shape}.")
        array = images.numpy() if self._layout is None else fed(images, self.spec, self._layout)
        if not isinstance(self._shape[0], int):
            return torch.from_numpy(self._rows(array))
        return torch.from_numpy(_in_batches(self._rows, array, self._shape[0]))

    def _rows(self, array: np.ndarray) -> np.ndarray:
        rows = [np.asarray(answer).reshape(len(array), -1) for answer in self._run(array)]
        found = rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
        if KEY in self._notes:
            spec = self.spec
            wanted = sum(output.size for output in spec.outputs) or spec.classes
            if found.shape[1] != wanted:
                raise InputError(
                    f"{self._path} gives {found.shape[1]} values an image, and its metadata says {wanted}; it is "
                    "damaged, or not as zsq has written it."
                )
        return found

    def profile(self) -> Profile:
        """Return what the runtime did with the file in the calls since it was opened with `profiled`; once.

        Raises:
            InputError: it was opened without, or has not been called.
        """
        raise InputError(f"{self._path}: its runtime tells nothing of what it does.")

    @abstractmethod
    def _run(self, array: np.ndarray) -> Sequence[np.ndarray]:
        """Return what the file gives for what it takes: each output, [N, ...], in order."""


def _in_batches(run: Callable[[np.ndarray], np.ndarray], array: np.ndarray, size: int) -> np.ndarray:
    """Return what `run` gives for an array of any length, so many at once; the last ones are repeated to fill it."""
    short = -len(array) % size
    filled = np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short else array
    found = [run(np.ascontiguousarray(part)) for part in np.split(filled, len(filled) // size)]
    return np.concatenate(found)[: len(array)]

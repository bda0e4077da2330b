"""Images that are given, not learnt: noise, the lower bound, and a labelled set, the upper bound."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zsq.checked import Count, Text
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.methods.base import Method, Surrogate
from zsq.methods.dead_leaves import dead_leaves
from zsq.methods.labels import draw_labels
from zsq.methods.natural_noise import natural_noise
from zsq.methods.pool import PoolSource, Stateless
from zsq.models.teacher import Teacher
from zsq.runtime import distributed
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

logger = logging.getLogger(__name__)

DRAWN = {"natural": natural_noise, "leaves": dead_leaves}
"""Distributions of whole images, not of single pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise(Method):
    """Random pixels: what any method has to beat."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "Gaussian, uniform or natural noise, or drawn discs: the lower bound"

    distribution: Literal["gaussian", "uniform", "natural", "leaves"] = "gaussian"
    """Standard normal as the network takes it; uniform, of pixels in [0, 1]; natural, with blobs and colors as in
    photographs; leaves, with edges as well. Signals and volumes have no pixels: uniform is of variance 1, natural has a
    spectrum of 1/f, and leaves are intervals or balls."""
    batch_size: Count = 64
    """Images a distillation step."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Return the source; nothing is learnt."""
        del distill_steps, fitted
        return Surrogate(NoiseSource(self, teacher.spec, run), teacher.network)


class NoiseSource(Stateless):
    """Streams noise with uniform labels, which say nothing of it."""

    data_free = True
    true_labels = asks_labels = False

    def __init__(self, settings: Noise, spec: ImageSpec, run: Run) -> None:
        self.settings, self.spec, self.seed, self.device = settings, spec, run.seed, run.device

    def _draw(self, name: str, step: int, count: int) -> Batch:
        random = stream(self.seed, name, step, self.device)
        labels = draw_labels(self.spec, count, random, self.device)
        if (draw := DRAWN.get(self.settings.distribution)) is not None:
            return Batch(distributed.share(draw(count, self.spec, random)), labels)
        shape = (count, *self.spec.shape)
        if self.settings.distribution == "gaussian":
            return Batch(distributed.share(torch.randn(shape, generator=random, device=self.device)), labels)
        pixels = distributed.share(torch.rand(shape, generator=random, device=self.device))
        if not self.spec.is_image:
            return Batch(math.sqrt(3) * (2 * pixels - 1), labels)
        return Batch(self.spec.normalize(pixels), labels)

    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Stream `count` images."""
        for index, start in enumerate(range(0, count, batch_size)):
            yield self._draw(name, index, min(batch_size, count - start))

    def sample_labels(self, labels: Tensor) -> None:
        """Return None: noise is of no class."""
        del labels

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of a distillation step."""
        del student
        return self._draw("distill", step, self.settings.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Real(Method):
    """Real images: what data-free methods are measured against, and what helps at once where there are some."""

    name: ClassVar[str] = "real"
    summary: ClassVar[str] = "a data set, the data-dependent upper bound"
    paths: ClassVar[tuple[str, ...]] = ("data", "class_names")

    data: Text = ""
    """Data set: `digits:train`, an .npz file, or a folder of images; labels need not be known."""
    class_names: Text = ""
    """File with the name of one class a line, in the network's order, where a folder's classes stand in another."""
    batch_size: Count = 64
    """Images a distillation step."""
    limit: Count = 20_000
    """Most images kept in memory, pixels as bytes, other numbers as float32; drawn evenly from the set."""
    augment: Literal["none", "crop-flip"] = "none"
    """What is done to distillation batches: crop-flip shifts by up to an eighth and mirrors half, wrong for digits."""

    @property
    def data_set(self) -> str | None:
        """Name or path of the labelled images, where they are given."""
        return self.data or None

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Read the images; nothing is learnt.

        Raises:
            InputError: no data set is named, or it does not fit the teacher.
        """
        del distill_steps, fitted
        if not self.data:
            raise InputError("method real needs images: --set method.data=SET (digits:train, an .npz or a folder).")
        source = RealSource(self, teacher.spec, run)
        if not source.true_labels and not teacher.spec.outputs:
            source.labels = _named_by(teacher.network, source)
        return Surrogate(source, teacher.network)


class ImagePool(PoolSource, Stateless):
    """Draws from a set that is held in memory: images as uint8, signals and volumes as float32.

    Args:
        data: name or path of the set.
        limit: most images kept, taken evenly.
        batch_size: images a distillation step.
        spec: what the teacher takes.
        run: seed and device.
        class_names: file of names that say which class a folder is; empty: none.

    Raises:
        InputError: there is no such set, or it does not fit the teacher.
    """

    data_free = False

    def __init__(
        self, data: str, limit: int, batch_size: int, spec: ImageSpec, run: Run, class_names: str = ""
    ) -> None:
        super().__init__(run, batch_size)
        self.spec = spec
        images = open_dataset(data, spec, class_names=class_names or None)
        self.labelled = images.labelled
        for notice in images.notices:
            logger.info(notice)
        every = max(1, -(-images.num_images // limit))
        pixels, labels, seen = [], [], 0
        for batch in images.batches():
            keep = slice(-seen % every, None, every)
            seen += len(batch.labels)
            pixels.append(spec.to_raw(batch.images[keep]))
            labels.append(batch.labels[keep])
        self.pixels, self.labels = torch.cat(pixels), torch.cat(labels)

    def images(self, rows: Tensor) -> Tensor:
        """See `PoolSource.images`."""
        return self.spec.from_raw(self.pixels[rows])


class RealSource(ImagePool):
    """Draws from a set whose labels are true, where it has any; else they are the teacher's.

    A network that gives something else than one vector of logits learns from the teacher's answers alone.
    """

    def __init__(self, settings: Real, spec: ImageSpec, run: Run) -> None:
        super().__init__(settings.data, settings.limit, settings.batch_size, spec, run, settings.class_names)
        self.true_labels = self.asks_labels = self.labelled and not spec.outputs
        self.augment = settings.augment
        if self.augment != "none" and not spec.is_image:
            raise InputError(f"method.augment is {self.augment}, which is for images; the network takes others.")

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of a distillation step, drawn with replacement and augmented."""
        batch = super().batch(step, student)
        if self.augment == "none":
            return batch
        black = self.spec.normalize(torch.zeros(1, self.spec.channels, 1, 1, device=self.device))
        random = stream(self.seed, "augment", step)
        return Batch(crop_flip(batch.images, black, random, len(batch.labels)), batch.labels)


@torch.no_grad()
def _named_by(network: nn.Module, source: ImagePool) -> Tensor:
    """Return the class that a network sees in each image of a pool, int64 [N]."""
    every, at_once = torch.arange(len(source.labels)), source.spec.images_at_once
    return torch.cat([network(source.images(rows).to(source.device)).argmax(1).cpu() for rows in every.split(at_once)])


def crop_flip(images: Tensor, fill: Tensor, random: torch.Generator, drawn: int | None = None) -> Tensor:
    """Shift images at random by up to an eighth of their sides and mirror half of them left to right.

    Args:
        images: [N, C, H, W].
        fill: what moves in from outside, [1, C, 1, 1].
        random: of the draws, on the CPU.
        drawn: images of the whole batch, where processes share it; None: these are all.

    Returns:
        [N, C, H, W].
    """
    count, _, height, width = images.shape
    pad_y, pad_x = height // 8, width // 8

    def draw(below: int) -> list[int]:
        return distributed.share(torch.randint(0, below, (drawn or count,), generator=random)).tolist()

    tops, lefts, flips = draw(2 * pad_y + 1), draw(2 * pad_x + 1), draw(2)
    padded = fill.expand(count, -1, height + 2 * pad_y, width + 2 * pad_x).clone()
    padded[:, :, pad_y : pad_y + height, pad_x : pad_x + width] = images
    crops = []
    for image, top, left, flip in zip(padded, tops, lefts, flips, strict=True):
        crop = image[:, top : top + height, left : left + width]
        crops.append(crop.flip(2) if flip else crop)
    return torch.stack(crops)

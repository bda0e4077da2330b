"""Images that are given, not learnt: noise, the lower bound, and a labelled set, the upper bound."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zsq.datasets import open_dataset
from zsq.errors import InputError
from zsq.methods.base import Surrogate
from zsq.methods.pool import PoolSource, Stateless, require_positive
from zsq.teachers import Teacher
from zsq.training import Run, stream
from zsq.types import Batch, ImageSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Random pixels: what any method has to beat."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "Gaussian or uniform noise, the lower bound"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq", "qat")
    steps: ClassVar[int] = 0

    distribution: Literal["gaussian", "uniform"] = "gaussian"
    """Standard normal as the network takes it, or uniform pixels in [0, 1]."""
    batch_size: int = 64
    """Images a distillation step."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Return the source; nothing is learnt."""
        del distill_steps, fitted
        return Surrogate(NoiseSource(self, teacher.spec, run), teacher.network)


class NoiseSource(Stateless):
    """Streams noise with uniform labels."""

    data_free = True
    true_labels = False

    def __init__(self, settings: Noise, spec: ImageSpec, run: Run) -> None:
        self.settings, self.spec, self.seed, self.device = settings, spec, run.seed, run.device

    def _draw(self, name: str, step: int, count: int) -> Batch:
        random = stream(self.seed, name, step, self.device)
        labels = torch.randint(0, self.spec.classes, (count,), generator=random, device=self.device)
        shape = (count, self.spec.channels, self.spec.height, self.spec.width)
        if self.settings.distribution == "gaussian":
            return Batch(torch.randn(shape, generator=random, device=self.device), labels)
        pixels = torch.rand(shape, generator=random, device=self.device)
        return Batch(self.spec.normalize(pixels), labels)

    def sample(self, count: int, batch_size: int = 100) -> Iterator[Batch]:
        """Stream `count` images."""
        for index, start in enumerate(range(0, count, batch_size)):
            yield self._draw("sample", index, min(batch_size, count - start))

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of a distillation step."""
        del student
        return self._draw("distill", step, self.settings.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """Real images with labels: what data-free methods are measured against."""

    name: ClassVar[str] = "real"
    summary: ClassVar[str] = "a labelled data set, the data-dependent upper bound"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq", "qat")
    steps: ClassVar[int] = 0

    data: str = ""
    """Data set: `digits:train`, an .npz file, or a folder of images."""
    batch_size: int = 64
    """Images a distillation step."""
    limit: int = 20_000
    """Most images kept in memory, as bytes; drawn evenly from the set."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "limit")

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
        return Surrogate(RealSource(self, teacher.spec, run), teacher.network)


class RealSource(PoolSource, Stateless):
    """Draws from a labelled set that is held in memory as uint8."""

    data_free = False
    true_labels = True

    def __init__(self, settings: Real, spec: ImageSpec, run: Run) -> None:
        super().__init__(run, settings.batch_size)
        self.spec = spec
        data = open_dataset(settings.data, spec)
        every = max(1, -(-data.num_images // settings.limit))
        pixels, labels, seen = [], [], 0
        for batch in data.batches():
            keep = slice(-seen % every, None, every)
            seen += len(batch.labels)
            pixels.append(spec.to_pixels(batch.images[keep]))
            labels.append(batch.labels[keep])
        self.pixels, self.labels = torch.cat(pixels), torch.cat(labels)

    def images(self, rows: Tensor) -> Tensor:
        """See `PoolSource.images`."""
        return self.spec.normalize(self.pixels[rows].permute(0, 3, 1, 2).float() / 255)

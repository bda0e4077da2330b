"""A method in a package of its own: striped images. CONTRIBUTING.md explains each step.

pip install ./examples/toy_method
zsq methods toy
zsq quantize digits --method toy --set method.images=500 --out runs/toy
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zsq.checked import Count
from zsq.methods import Method, Surrogate
from zsq.methods.pool import PoolSource, Stateless
from zsq.models.teacher import Teacher
from zsq.training.loop import Run
from zsq.types import ImageSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(Method):
    """Stripes of random direction, width and brightness."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "striped images, an example of a method in another package"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq", "qat")

    images: Count = 1000
    """Number of images in the pool."""
    batch_size: Count = 64
    """Images per distillation step."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Draw the pool; nothing is learned."""
        del distill_steps, fitted
        return Surrogate(Stripes(self, teacher.spec, run), teacher.network)


class Stripes(PoolSource, Stateless):
    """A pool of striped images with random labels."""

    data_free = True
    true_labels = False
    asks_labels = True

    def __init__(self, settings: Toy, spec: ImageSpec, run: Run) -> None:
        super().__init__(run, settings.batch_size)
        random = torch.Generator().manual_seed(run.seed)
        self.pixels = spec.normalize(stripes(settings.images, spec, random))
        self.labels = torch.randint(0, spec.classes, (settings.images,), generator=random)

    def images(self, rows: Tensor) -> Tensor:
        """Return the images of these rows."""
        return self.pixels[rows]


def stripes(count: int, spec: ImageSpec, random: torch.Generator) -> Tensor:
    """Draw striped images.

    Args:
        count: number of images, N.
        spec: image shape.
        random: generator of all random numbers.

    Returns:
        Pixels in [0, 1], float [N, C, H, W].
    """
    draw = torch.rand(4, count, 1, 1, 1, generator=random)
    angle, cycles, phase, contrast = math.pi * draw[0], 1 + 3 * draw[1], 2 * math.pi * draw[2], draw[3]
    y, x = torch.linspace(0, 1, spec.height).view(-1, 1), torch.linspace(0, 1, spec.width).view(1, -1)
    wave = torch.sin(2 * math.pi * cycles * (angle.cos() * x + angle.sin() * y) + phase)
    tint = torch.rand(count, spec.channels, 1, 1, generator=random)
    return (tint + 0.5 * contrast * wave).clamp(0, 1)

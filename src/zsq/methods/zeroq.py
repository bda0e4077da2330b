"""ZeroQ's distilled data: pixels whose batch-norm statistics are the stored ones (Cai et al. 2020, section 3.1)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zsq.checked import Count, Factor
from zsq.graph.moments import moments as moments_of
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.models.teacher import Teacher
from zsq.training.loop import Run
from zsq.training.losses import squared_bns_distance

LEARNING_RATE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroQ(Inversion):
    """Optimise Gaussian noise until its batch-norm means and deviations are the stored ones; labels play no part."""

    name: ClassVar[str] = "zeroq"
    summary: ClassVar[str] = "pixels with the stored batch-norm means and deviations, no labels"

    patience: Count = 100
    """Iterations without a lower loss after which the learning rate is divided by ten."""
    input_weight: Factor = 1.0
    """Factor of the same distance for the images themselves, from mean 0 and deviation 1."""

    def source(self, teacher: Teacher, run: Run) -> "ZeroQSource":
        """Make the source, its first batch of images Gaussian noise."""
        return ZeroQSource(self, teacher, run)


class ZeroQSource(InversionSource):
    """Images that carry statistics and no classes: their labels are drawn and mean nothing."""

    asks_labels = False

    def __init__(self, settings: ZeroQ, teacher: Teacher, run: Run) -> None:
        self.patience = settings.patience
        super().__init__(
            settings,
            teacher,
            run,
            learning_rate=settings.learning_rate or LEARNING_RATE,
            weights={"bns": 1.0, "input": settings.input_weight},
        )
        self.zeros = torch.zeros(self.spec.channels, device=self.device)

    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return ZeroQ's eq. (3) over the layers, and the same for the input."""
        del logits, labels
        own, teacher = [moments_of(images)], self.teacher
        return {
            "bns": squared_bns_distance(moments, teacher.target_mean, teacher.target_var, teacher.eps),
            "input": squared_bns_distance(own, self.zeros, self.zeros + 1, self.zeros),
        }

    def rate(self, iteration: int) -> float:
        """Return the learning rate that the batch's losses so far lead to."""
        return plateau(self.history[:iteration].tolist(), self.learning_rate, patience=self.patience)


def plateau(losses: Iterable[float], learning_rate: float, *, patience: int, floor: float = 1e-4) -> float:
    """Return the learning rate after these losses.

    It becomes a tenth, but not below `floor`, after more than `patience` losses in a row of which none is lower than
    the least before by a ten-thousandth of it; then the count starts anew.

    >>> plateau([1.0, 2.0, 2.0], 0.5, patience=1)
    0.05
    """
    least, waited = math.inf, 0
    for loss in losses:
        improved = loss < least * (1 - 1e-4)
        least, waited = (loss, 0) if improved else (least, waited + 1)
        if waited > patience:
            learning_rate, waited = max(learning_rate * 0.1, floor), 0
    return learning_rate

"""Pictures from a network: the paper's losses on the spectrum of images that begin as natural noise. Ours."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.checked import Count, Factor, Positive
from zsq.errors import InputError
from zsq.methods.base import takes_size
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.methods.labels import label_terms, map_shape
from zsq.methods.natural_noise import channel_correlation, frequencies, natural_noise
from zsq.models.teacher import Teacher
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.training.losses import bns_loss
from zsq.training.optim import cosine
from zsq.types import ImageSpec

SMALL_RATE, LARGE_RATE = 0.1, 0.05
SMALL_CE_WEIGHT, LARGE_CE_WEIGHT = 20.0, 300.0

LEAST_AREA = 0.3
"""Least share of an image's area that a crop shows."""

WARM_ITERATIONS = 5
"""Iterations in which the learning rate rises."""

MARGIN = 0.02
"""Distance of the first pixels from 0 and 1, so that they can still move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectral(Inversion):
    """Optimise the spectrum of images for wanted labels and stored batch-norm statistics."""

    name: ClassVar[str] = "spectral"
    summary: ClassVar[str] = "images with wanted labels and stored statistics, found in their spectrum (ours)"

    iterations: Count = 100
    """Most steps of one batch of images: there are steps / iterations batches, rounded up."""
    learning_rate: Positive | None = None
    """Adam's step size, for coefficients in units of a natural spectrum; unset, 0.1, and 0.05 from 96 pixels on."""
    ce_weight: Factor | None = None
    """Factor of the label cross-entropy; unset, 20, and 300 from 96 pixels on, where batch norms have more channels."""
    bns_weight: Factor = 1.0
    """Factor of the batch-norm statistics loss."""
    whole_every: Count = 4
    """Of images from 96 pixels on, the network is shown whole ones in one step of so many, and in the others crops at
    half the size, which cost a quarter; 1: whole ones in every step."""
    flip: bool = True
    """Mirror the whole batch at every other step, drawn at random; images only."""

    def check(self) -> None:
        """Check that there is something to learn from."""
        if self.ce_weight == self.bns_weight == 0:
            raise InputError("method.ce_weight and method.bns_weight are both 0; one must be above 0.")

    def source(self, teacher: Teacher, run: Run) -> "SpectralSource":
        """Make the source, its first batch of images natural noise."""
        return SpectralSource(self, teacher, run)


class Spectrum:
    r"""Numbers, of which a sigmoid makes pixels, as coefficients that Adam can move at one rate, and back.

    .. math:: x = L\,F^{-1}(a \odot c), \quad a_f \propto 1 / |f|, \quad L L^T = (1 - r) I + r

    A step of equal size on all coefficients changes an image as photographs differ: more in coarse than in fine
    detail, and more in brightness than in colour.

    Source: Olah, Mordvintsev, Schubert 2017, Feature Visualization, "Preconditioning and Parameterization", where the
    correlation of the colours is measured on ImageNet; here it is the one of `natural_noise`.

    Args:
        spec: shape of the images.
        device: of the coefficients.
    """

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        self.size, self.axes = spec.sides, tuple(range(2, 2 + spec.axes))
        amplitude = 1 / frequencies(self.size, device).clamp(min=1 / max(self.size))
        self.amplitude = amplitude / amplitude.mean()
        correlation = torch.full((spec.channels, spec.channels), channel_correlation(spec))
        self.colours = torch.linalg.cholesky(correlation.fill_diagonal_(1.0)).to(device)
        self.decorrelated = torch.linalg.inv(self.colours)

    def coefficients(self, values: Tensor) -> Tensor:
        """Return those of numbers [N, C, ..., W]: [N, C, ..., W // 2 + 1, 2], real and imaginary part."""
        plain = torch.einsum("kc,nc...->nk...", self.decorrelated, values)
        return torch.view_as_real(torch.fft.rfftn(plain, dim=self.axes, norm="ortho") / self.amplitude)

    def values(self, coefficients: Tensor) -> Tensor:
        """Return the numbers of coefficients [N, C, ..., W // 2 + 1, 2]: [N, C, ..., W]."""
        scaled = torch.view_as_complex(coefficients) * self.amplitude
        plain = torch.fft.irfftn(scaled, s=self.size, dim=self.axes, norm="ortho")
        return torch.einsum("kc,nc...->nk...", self.colours, plain)


class SpectralSource(InversionSource):
    """Images whose labels are recognised, each of its own."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)

    def __init__(self, settings: Spectral, teacher: Teacher, run: Run) -> None:
        spec = teacher.spec
        self.asks_labels = spec.classes > 0
        if not self.asks_labels and settings.bns_weight == 0:
            raise InputError("method.bns_weight is 0, and this network names no class; it must be above 0.")
        self.spectrum = Spectrum(spec, run.device)
        self.crop = (spec.height // 2, spec.width // 2)
        in_place = bool(map_shape(spec)) or not spec.is_image
        crops = spec.is_large and settings.whole_every > 1 and not in_place
        crops = crops and takes_size(teacher, self.crop, run.device)
        self.whole_every = settings.whole_every if crops else 1
        self.flip = settings.flip and not in_place
        rate = settings.learning_rate or (LARGE_RATE if spec.is_large else SMALL_RATE)
        usual = LARGE_CE_WEIGHT if spec.is_large else SMALL_CE_WEIGHT
        weights = {"ce": usual if settings.ce_weight is None else settings.ce_weight, "bns": settings.bns_weight}
        super().__init__(settings, teacher, run, learning_rate=rate, weights=weights)

    def start(self, random: torch.Generator) -> Tensor:
        """Return natural noise."""
        return natural_noise(self.batch_size, self.spec, random)

    def encode(self, images: Tensor) -> Tensor:
        """Return the coefficients of the images."""
        return self.spectrum.coefficients(self.spec.unbounded(images, MARGIN).to(self.device))

    def render(self) -> Tensor:
        """Return the images of the coefficients."""
        return self.spec.bounded(self.spectrum.values(self.pixels))

    def images_of(self, step: int) -> Tensor:
        """Return the images, whole or one crop of all of them at half the size, mirrored at random."""
        images, random = self.render(), stream(self.seed, "view", step)
        if (step + 1) % self.whole_every:
            images = cropped(images, self.crop, random)
        if self.flip and bool(torch.randint(0, 2, (1,), generator=random)):
            images = images.flip(3)
        return images.contiguous(memory_format=torch.channels_last) if self.spec.is_image else images

    def losses(
        self, images: Tensor, logits: Tensor, moments: list[tuple[Tensor, Tensor]], labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the terms of the paper's eq. (2)."""
        del images
        teacher = self.teacher
        bns = bns_loss(moments, teacher.target_mean, teacher.target_var, teacher.eps)
        return label_terms(self.spec, logits, labels) | {"bns": bns}

    def rate(self, iteration: int) -> float:
        """Return the learning rate: a cosine to 0, after a short rise."""
        return min(1.0, (iteration + 1) / WARM_ITERATIONS) * cosine(self.learning_rate, iteration, self.iterations)


def cropped(images: Tensor, size: tuple[int, int], random: torch.Generator) -> Tensor:
    """Return one part of all images [N, C, H, W], of a share of their area drawn between `LEAST_AREA` and 1, resized.

    Args:
        images: to be cropped.
        size: h and w of what is returned.
        random: for place and area.

    Returns:
        [N, C, h, w].
    """
    drawn, down, right = torch.rand(3, generator=random, dtype=torch.float64).tolist()
    side = LEAST_AREA ** (drawn / 2)
    height, width = (max(1, round(side * length)) for length in images.shape[2:])
    top, left = (
        int(share * (whole - part + 1))
        for share, whole, part in ((down, images.shape[2], height), (right, images.shape[3], width))
    )
    part = images[:, :, top : top + height, left : left + width]
    return F.interpolate(part, size, mode="bilinear", antialias=True, align_corners=False)

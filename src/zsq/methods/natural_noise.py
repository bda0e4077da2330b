"""Random images with what photographs have in common: their spectrum, their colours, their brightness and contrast."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zsq.types import ImageSpec

CHANNEL_CORRELATION = 0.9
"""Of two channels of a photograph: brightness varies more than colour (Ruderman, Cronin, Chiao 1998)."""

OTHER_CORRELATION = 0.5
"""Of two channels of a signal or a volume, of which nothing is known."""

BRIGHTNESS, BRIGHTNESS_SPREAD = 0.45, 0.1
"""Mean of an image's pixels in [0, 1], over all images, and its deviation between them."""

CONTRAST, CONTRAST_SPREAD = 0.22, 0.3
"""Deviation of the pixels within an image, the median over all images, and the deviation of its logarithm."""


def natural_noise(count: int, spec: ImageSpec, random: torch.Generator) -> Tensor:
    r"""Draw images whose amplitude falls as one over the frequency, with random phases.

    .. math:: x = clip_{[0, 1]}(b + k\,z), \quad |\hat z(f)| \propto 1 / |f|

    The spectrum of photographs is about that (Field 1987; Torralba and Oliva 2003). Frequencies are in cycles a pixel,
    so that blobs are as round in a wide image as in a square one. Signals and volumes get the same spectrum, with mean
    0 and deviation 1 on average.

    Args:
        count: N.
        spec: shape and normalisation.
        random: on the device of the images.

    Returns:
        Images as the network takes them, float [N, C, ...].
    """
    return exposed(smooth_field(count, spec, random), spec, random)


def smooth_field(count: int, spec: ImageSpec, random: torch.Generator) -> Tensor:
    """Draw Gaussian fields of amplitude 1/f whose channels are alike: [N, C, ...], each of mean 0 and deviation 1."""
    sides, axes = spec.sides, pixel_axes(spec)
    frequency = frequencies(sides, random.device)
    frequency[(0,) * spec.axes] = math.inf  # the mean is drawn apart
    white = torch.randn(count, 1 + spec.channels, *sides, generator=random, device=random.device)
    smooth = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) / frequency, s=sides, dim=axes)
    mixed = alike(smooth[:, :1], smooth[:, 1:], spec)
    return mixed / mixed.square().mean((1, *axes), keepdim=True).sqrt().clamp(min=1e-12)


def exposed(field: Tensor, spec: ImageSpec, random: torch.Generator) -> Tensor:
    """Give fields of mean 0 and deviation 1 the brightness and contrast of photographs, as the network takes them.

    Args:
        field: [N, C, ...].
        spec: shape and normalisation.
        random: on the device of the field.

    Returns:
        [N, C, ...].
    """
    drawn = torch.randn(2, len(field), *[1] * (1 + spec.axes), generator=random, device=random.device)
    brightness = BRIGHTNESS + BRIGHTNESS_SPREAD * drawn[0]
    contrast = torch.exp(CONTRAST_SPREAD * drawn[1])
    if spec.is_image:
        return spec.normalize((brightness + CONTRAST * contrast * field).clamp(0, 1))
    return spec.bounded((brightness - BRIGHTNESS) / CONTRAST + contrast * field)


def pixel_axes(spec: ImageSpec) -> tuple[int, ...]:
    """Return the axes of a batch [N, C, ...] beside images and channels."""
    return tuple(range(2, 2 + spec.axes))


def alike(shared: Tensor, own: Tensor, spec: ImageSpec) -> Tensor:
    """Mix what all channels share with what each has of its own, to their correlation."""
    correlation = channel_correlation(spec)
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own


def channel_correlation(spec: ImageSpec) -> float:
    """Return how alike two channels are."""
    return CHANNEL_CORRELATION if spec.is_image else OTHER_CORRELATION


def frequencies(sides: Sequence[int], device: torch.device) -> Tensor:
    """Return the frequency, in cycles a pixel, of each coefficient of real images: [..., width // 2 + 1]."""
    parts = [torch.fft.fftfreq(side, device=device) for side in sides[:-1]]
    parts.append(torch.fft.rfftfreq(sides[-1], device=device).abs())
    grids = torch.meshgrid(*parts, indexing="ij")
    return functools.reduce(torch.hypot, grids).clone()

"""Random images with what photographs have in common: their spectrum, their colours, their brightness and contrast."""

import math

import torch
from torch import Tensor

from zsq.types import ImageSpec

CHANNEL_CORRELATION = 0.9
"""Of two channels of a photograph: brightness varies more than colour (Ruderman, Cronin, Chiao 1998)."""

BRIGHTNESS, BRIGHTNESS_SPREAD = 0.45, 0.1
"""Mean of an image's pixels in [0, 1], over all images, and its deviation between them."""

CONTRAST, CONTRAST_SPREAD = 0.22, 0.3
"""Deviation of the pixels within an image, the median over all images, and the deviation of its logarithm."""


def natural_noise(count: int, spec: ImageSpec, random: torch.Generator) -> Tensor:
    r"""Draw images whose amplitude falls as one over the frequency, with random phases.

    .. math:: x = clip_{[0, 1]}(b + k\,z), \quad |\hat z(f)| \propto 1 / |f|

    The spectrum of photographs is about that (Field 1987; Torralba and Oliva 2003). Frequencies are in cycles a pixel,
    so that blobs are as round in a wide image as in a square one.

    Args:
        count: N.
        spec: shape and normalisation.
        random: on the device of the images.

    Returns:
        Images as the network takes them, float [N, C, H, W].
    """
    height, width, device = spec.height, spec.width, random.device
    frequency = frequencies(height, width, device)
    frequency[0, 0] = math.inf  # the mean is drawn apart
    white = torch.randn(count, 1 + spec.channels, height, width, generator=random, device=device)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    shared, own = smooth[:, :1], smooth[:, 1:]
    mixed = math.sqrt(CHANNEL_CORRELATION) * shared + math.sqrt(1 - CHANNEL_CORRELATION) * own
    mixed = mixed / mixed.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    drawn = torch.randn(2, count, 1, 1, 1, generator=random, device=device)
    brightness = BRIGHTNESS + BRIGHTNESS_SPREAD * drawn[0]
    contrast = CONTRAST * torch.exp(CONTRAST_SPREAD * drawn[1])
    return spec.normalize((brightness + contrast * mixed).clamp(0, 1))


def frequencies(height: int, width: int, device: torch.device) -> Tensor:
    """Return the frequency, in cycles a pixel, of each coefficient of a real image: [height, width // 2 + 1]."""
    return torch.hypot(torch.fft.fftfreq(height, device=device)[:, None], torch.fft.rfftfreq(width, device=device))

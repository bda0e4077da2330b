"""Random images with edges: discs that hide each other, as things do in photographs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zsq.methods.natural_noise import alike, exposed, pixel_axes, smooth_field
from zsq.training.losses import blurred
from zsq.types import ImageSpec

LEAVES = 200
"""Discs of an image; those of a 2d image cover nine tenths of it, and a ground the rest."""

SMALLEST, LARGEST = 1 / 45, 2 / 3
"""Radius of a disc, as a share of the image's longest side; between them its density falls as r^-3."""

SHADE, TEXTURE = 0.6, 0.275
"""Rise of a disc's shade from its centre to its rim, and the median deviation of its texture, where the colours of
discs have deviation 1."""


def dead_leaves(count: int, spec: ImageSpec, random: torch.Generator) -> Tensor:
    r"""Draw images of "dead leaves": discs of all sizes that hide each other, each with its colour, shade and texture.

    .. math:: x = clip_{[0, 1]}(b + k\,z), \quad z(p) \propto c_i + s_i^T (p - m_i) / r_i + t_i\,n(p)

    of the uppermost disc :math:`i` at place :math:`p`: its centre :math:`m_i`, its radius :math:`r_i` of density
    :math:`r^{-3}`, by which images are alike at all scales, its colour :math:`c_i`, and natural noise :math:`n` at its
    own strength :math:`t_i`; blurred by a pixel and standardised per image. Discs of signals are intervals, those of
    volumes balls.

    Args:
        count: N.
        spec: shape and normalisation.
        random: on the device of the images.

    Returns:
        Images as the network takes them, float [N, C, ...].

    Source: Lee, Mumford, Huang 2001, section 3; colours, shades and textures are ours, brightness and contrast those of
    `natural_noise`.
    """
    device, size = random.device, max(spec.sides)
    noise = smooth_field(count, spec, random)
    uniform = torch.rand(count, 1 + spec.axes, LEAVES, generator=random, device=device)
    normal = torch.randn(count, 1 + spec.channels + spec.axes + 1, 1 + LEAVES, generator=random, device=device)
    sides = torch.tensor(spec.sides, dtype=torch.float32, device=device).view(1, -1, 1)
    radius = size * (SMALLEST**-2 - (SMALLEST**-2 - LARGEST**-2) * uniform[:, :1]).rsqrt()
    radius = torch.cat([radius.new_full((count, 1, 1), size), radius], 2)  # the ground is the first
    centre = torch.cat([(sides / 2).expand(count, -1, 1), uniform[:, 1:] * sides], 2)
    shared, own, slope, strength = normal.split([1, spec.channels, spec.axes, 1], 1)
    slope = SHADE * slope / radius
    places = [torch.arange(side, device=device) + 0.5 for side in spec.sides]
    grids = torch.meshgrid(*places, indexing="ij")
    top = uppermost(centre, radius[:, 0], grids).flatten(1)

    def seen(of_discs: Tensor) -> Tensor:
        """Spread values of discs, [N, K, 1 + LEAVES], over the places where they are seen, [N, K, ...]."""
        at = top[:, None].expand(-1, of_discs.shape[1], -1)
        return of_discs.gather(2, at).view(count, -1, *spec.sides)

    field = seen(alike(shared, own, spec) - (slope * centre).sum(1, keepdim=True))
    field = field + (seen(slope) * torch.stack(grids)).sum(1, keepdim=True)
    field = blurred(field + seen(TEXTURE * strength.exp()) * noise)
    deviation, mean = torch.std_mean(field, (1, *pixel_axes(spec)), correction=0, keepdim=True)
    return exposed((field - mean) / deviation.clamp(min=1e-12), spec, random)


def uppermost(centre: Tensor, radius: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the last disc that each place lies in, int64 [N, ...]; discs are balls in as many axes as there are.

    Args:
        centre: [N, axes, discs], in pixels.
        radius: [N, discs]; the first disc is taken to lie under every place.
        places: coordinate of every place along each axis, [...] each.
    """
    count, axes, discs = centre.shape
    top = torch.zeros(count, *places[0].shape, dtype=torch.int64, device=centre.device)
    for disc in range(1, discs):
        at, reach = (value[..., disc].view(count, -1, *[1] * axes) for value in (centre, radius))
        away = sum((place - at[:, axis]).square() for axis, place in enumerate(places))
        top.masked_fill_(away < reach[:, 0].square(), disc)
    return top

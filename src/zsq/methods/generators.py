"""Generators: label and noise in, valid image out."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.errors import unknown_name
from zsq.graph.moments import moments
from zsq.training.losses import blurred
from zsq.types import LARGE_IMAGE, ImageSpec

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Convolutions by their axes."""

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""Linear interpolation by the number of axes."""

LEAK = 0.2

SMALL_IMAGE = 16
"""Shorter side in pixels below which every pixel has its place: nothing goes round the edge, and nothing is blurred."""

SMALL_MARGIN = 1
"""Pixels by which a small image may lie to each side of its middle."""

DETAIL = 0.2
"""Size of the noise in the light decoder's first map, beside the label's layout of 0.6, before training."""


WINDOW = 4 / 7
"""Side of a window over that of the image."""

BRIGHTNESS_BOUND = 0.7
"""Most by which an image's mean before the sigmoid lies off that of all: about 0.17 in pixels of [0, 1]."""

CONTRAST_BOUND = 0.3
"""Most by which the logarithm of an image's contrast lies off that of all."""

LEAST_VARIANCE = 1e-6
"""Keeps an image of one colour from being amplified without bound."""


class ConditionalNorm(nn.Module):
    """Batch norm whose scale and shift are linear in the label's code (De Vries et al. 2017, section 4).

    The code is fixed and differs between labels from the first step on, so that labels are told apart before they are
    learnt, and what one label learns serves those alike.

    Args:
        channels: C.
        code_size: length E of a label's code.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, code_size: int) -> None:
        super().__init__()
        self.affine = nn.Linear(code_size, 2 * channels)
        nn.init.normal_(self.affine.weight, std=0.3 / math.sqrt(code_size))
        nn.init.constant_(self.affine.bias[:channels], 1.0)
        nn.init.constant_(self.affine.bias[channels:], 0.0)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps, self.momentum = 1e-5, 0.1

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Normalise x [N, C, ...] by the statistics of the batch, else the running ones, and scale by code.

        The code is [N, E], or a map of codes [N, E, h, w] whose nearest cell counts.
        """
        if self.training:
            mean, var = moments(x)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        by_channel = (1, -1, *[1] * (code.dim() - 2))
        gamma, beta = self.affine(code.movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)
        scale = gamma * torch.rsqrt(var + self.eps).view(by_channel)
        shift = beta - mean.view(by_channel) * scale
        if code.dim() > 2:
            scale, shift = (F.interpolate(values, x.shape[2:], mode="nearest") for values in (scale, shift))
        shape = (*scale.shape, *[1] * (x.dim() - scale.dim()))
        return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


def _convolution(axes: int, inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool = True) -> nn.Module:
    """Return a convolution of so many axes that keeps the size but for its stride, edges reflected."""
    mode = "reflect" if kernel > 1 else "zeros"
    return CONVOLUTIONS[axes](inputs, outputs, kernel, stride, kernel // 2, padding_mode=mode, bias=bias)


class _Block(nn.Module):
    """Convolution, conditional batch norm, LeakyReLU."""

    def __init__(
        self, axes: int, inputs: int, outputs: int, code_size: int, *, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.convolution = _convolution(axes, inputs, outputs, kernel, stride, bias=False)
        self.norm = ConditionalNorm(outputs, code_size)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.convolution(x), code), LEAK)


class _Level(nn.Module):
    """One level of the U-Net: skip past, or go down, through the deeper levels and up again."""

    def __init__(self, axes: int, inputs: int, width: int, skip: int, code_size: int, deeper: nn.Module | None) -> None:
        super().__init__()
        self.mode = LINEAR[axes]
        self.skip = _Block(axes, inputs, skip, code_size, kernel=1)
        self.down = _Block(axes, inputs, width, code_size, stride=2)
        self.refine = _Block(axes, width, width, code_size)
        self.deeper = deeper
        self.norm = ConditionalNorm(skip + width, code_size)
        self.up = _Block(axes, skip + width, width, code_size)
        self.mix = _Block(axes, width, width, code_size, kernel=1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        low = self.refine(self.down(x, code), code)
        if self.deeper is not None:
            low = self.deeper(low, code)
        high = F.interpolate(low, scale_factor=2.0, mode=self.mode, align_corners=False)
        x = self.norm(torch.cat([self.skip(x, code), high], dim=1), code)
        mixed: Tensor = self.mix(self.up(x, code), code)
        return mixed


class Exposure(nn.Module):
    """Brightness and contrast of each image, within bounds of what is learnt for all images.

    The statistics of a batch leave open how labels share them: without bounds, some labels become black-and-white
    patterns of twice the contrast of real images, and others flat colours.

    Args:
        start: brightness to start from, before `ImageSpec.bounded`.
        code_size: length of a label's code with its style.
    """

    def __init__(self, start: Tensor, code_size: int) -> None:
        super().__init__()
        self.brightness = nn.Parameter(start)
        self.log_contrast = nn.Parameter(torch.tensor(0.0))
        self.variation = nn.Linear(code_size, 2, bias=False)
        nn.init.zeros_(self.variation.weight)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Give images before the sigmoid, [N, C, ...], mean and deviation as codes [N, E] ask for, within bounds."""
        brighter, sharper = torch.tanh(self.variation(code)).view(-1, 2, *[1] * (x.dim() - 1)).unbind(1)
        brightness = self.brightness + BRIGHTNESS_BOUND * brighter
        contrast = torch.exp(self.log_contrast + CONTRAST_BOUND * sharper)
        return torch.addcmul(brightness, F.group_norm(x, 1, eps=LEAST_VARIANCE), contrast)


class Generator(nn.Module, ABC):
    """A conditional generator: standard-normal noise and a label to a normalised image.

    The first `style_size` components of the noise join the label's code in every batch norm, so that images of one
    label differ as a whole and not only in detail.

    Args:
        spec: shape and normalisation of the image.
        codes: one fixed code a label, [classes, E].
        style_size: length of the style.
        bound_contrast: keep brightness and contrast of each image near those of all, see `Exposure`.

    Attributes:
        low_precision: compute the layers in bfloat16 in training.
        windowed: make a window of about half of each side in training, where the generator can: see `window`.
        noise_size: length of one image's noise, style included.
    """

    noise_size: int
    codes: Tensor

    def __init__(self, spec: ImageSpec, codes: Tensor, style_size: int, bound_contrast: bool) -> None:
        super().__init__()
        self.spec, self.style_size, self.low_precision, self.windowed = spec, style_size, False, False
        self.code_size = codes.shape[1] + style_size
        mean = min(max(sum(spec.mean) / len(spec.mean), 0.05), 0.95)
        start = torch.tensor(mean).logit() if spec.is_image else torch.tensor(0.0)
        self.exposure = Exposure(start, self.code_size) if bound_contrast else None
        self.register_buffer("codes", codes.clone())

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Map noise [N, noise_size] and labels to images, [N, C, ...], as the teacher takes them.

        Labels are int64 [N], or maps [N, ...] that say what is where.
        """
        style, detail = noise.split([self.style_size, self.noise_size - self.style_size], dim=1)
        wanted = self.codes[labels].movedim(-1, 1)
        code = torch.cat(
            [wanted, style.view(*style.shape, *[1] * (wanted.dim() - 2)).expand(-1, -1, *wanted.shape[2:])], 1
        )
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.low_precision and self.training):
            x = self.synthesize(detail, code)
        x = cut(x, self.spec.sides).float()
        if self.exposure is not None:
            x = self.exposure(x, code.flatten(2).mean(2) if code.dim() > 2 else code)
        return self.spec.bounded(x)

    @property
    def window(self) -> tuple[int, ...] | None:
        """Sides of a part of an image that can be made for a part of the work; None where none can."""
        return None

    @abstractmethod
    def synthesize(self, noise: Tensor, code: Tensor) -> Tensor:
        """Map the noise without the style, and codes with it, to the image before it is bounded, at least as large."""


class UNet(Generator):
    """The U-Net of Deep Image Prior with every batch norm conditional on the label.

    Stride-2 convolutions down, bilinear upsampling, reflection padding, LeakyReLU, 1x1 skip connections. Small images
    take fewer levels, such that the deepest map keeps two pixels a side.

    Source: Ulyanov, Vedaldi, Lempitsky 2018, figure 21 (width 128, five levels, skip 4, 32 noise channels).
    """

    def __init__(
        self,
        spec: ImageSpec,
        codes: Tensor,
        *,
        width: int = 128,
        levels: int = 5,
        skip: int = 4,
        noise_channels: int = 32,
        style_size: int = 0,
        bound_contrast: bool = True,
    ) -> None:
        super().__init__(spec, codes, style_size, bound_contrast)
        levels = max(1, min(levels, int(math.log2(min(spec.sides))) - 1))
        multiple = 2**levels
        self.noise_map = (noise_channels, *(math.ceil(side / multiple) * multiple for side in spec.sides))
        self.noise_size = style_size + math.prod(self.noise_map)
        body: _Level | None = None
        for level in reversed(range(levels)):
            inputs = noise_channels if level == 0 else width
            body = _Level(spec.axes, inputs, width, skip, self.code_size, body)
        self.body = body
        self.to_pixels = _convolution(spec.axes, width, spec.channels, 1)

    def synthesize(self, noise: Tensor, code: Tensor) -> Tensor:
        """See `Generator.synthesize`."""
        assert self.body is not None
        pixels: Tensor = self.to_pixels(self.body(noise.unflatten(1, self.noise_map), code))
        return pixels


class LightDecoder(Generator):
    """Label code to a small map, shifted at random, with noise in it; upsampled, with a pixel shuffle at the end.

    No layer but the last works at full resolution. The shift is circular, so that images of one label differ as a
    whole; a blur takes out the pattern that the pixel shuffle leaves. A small image is made larger instead by a margin
    all around, and a window of its size is cut out of it at random.
    """

    sides: Tensor

    def __init__(
        self,
        spec: ImageSpec,
        codes: Tensor,
        *,
        width: int = 64,
        noise_channels: int = 32,
        style_size: int = 0,
        bound_contrast: bool = True,
    ) -> None:
        super().__init__(spec, codes, style_size, bound_contrast)
        axes, least = spec.axes, min(spec.sides)
        self.shuffle = 4 if spec.is_large and least >= LARGE_IMAGE else 2
        self.margin = SMALL_MARGIN if least < SMALL_IMAGE and spec.is_image else 0
        sides = [math.ceil((side + 2 * self.margin) / self.shuffle) for side in spec.sides]
        self.ups = max(0, math.ceil(math.log2(min(sides) / 7)))
        self.start = tuple(math.ceil(side / 2**self.ups) for side in sides)
        self.register_buffer("sides", torch.tensor(self.start, dtype=torch.float32), persistent=False)
        self.noise_map = (noise_channels, *self.start)
        self.noise_size = style_size + axes + math.prod(self.noise_map)
        code_size = self.code_size
        widths = [width * 2 ** min(2, self.ups - level) for level in range(self.ups + 1)]
        self.widths = widths
        self.layout = nn.Linear(code_size, widths[0] * math.prod(self.start), bias=False)
        self.detail = _convolution(axes, noise_channels, widths[0], 3, bias=False)
        assert isinstance(self.detail.weight, Tensor)
        nn.init.normal_(self.detail.weight, std=DETAIL / math.sqrt(3**axes * noise_channels))
        self.norm = ConditionalNorm(widths[0], code_size)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(_Block(axes, inputs, outputs, code_size) for inputs, outputs in pairs)
        self.refine = _Block(axes, widths[-1], widths[-1], code_size)
        self.to_pixels = _convolution(axes, widths[-1], spec.channels * self.shuffle**axes, 3)

    @property
    def window(self) -> tuple[int, ...] | None:
        """See `Generator.window`; the first map of a large image shifts circularly, so that any part is as good."""
        if not self.spec.is_large:
            return None
        return tuple(side * 2**self.ups * self.shuffle for side in self._window_cells)

    @property
    def _window_cells(self) -> tuple[int, ...]:
        """Sides of a window in the first map."""
        return tuple(max(2, round(WINDOW * side)) for side in self.start)

    def synthesize(self, noise: Tensor, code: Tensor) -> Tensor:
        """See `Generator.synthesize`."""
        axes = self.spec.axes
        drawn, detail = noise.split([axes, noise.shape[1] - axes], dim=1)
        share = torch.special.ndtr(drawn)  # from 0 to 1, its ends included
        if code.dim() > 2:  # the map says what is where, and its regions lie at random
            local = self.layout.weight.view(self.widths[0], *self.start, self.code_size)
            layout = torch.einsum("c...e,ne...->nc...", local, F.interpolate(code, self.start, mode="nearest"))
        else:
            layout = self.layout(code).unflatten(1, (self.widths[0], *self.start))
            if not self.margin:
                layout = shifted(layout, (share * self.sides).long())
        detail = detail.unflatten(1, self.noise_map)
        if self.windowed and self.training and code.dim() == 2:
            layout, detail = cut(layout, self._window_cells), cut(detail, self._window_cells)
        x = layout + self.detail(detail)
        x = F.leaky_relu(self.norm(x, code), LEAK)
        for block in self.blocks:
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"), code)
        x = self.refine(x, code)
        pixels = shuffled(self.to_pixels(x).contiguous(), self.shuffle)
        if not self.margin:
            return blurred(pixels)
        if code.dim() > 2:
            return cut(pixels, self.spec.sides, self.margin)
        return shifted(pixels, -(share * (2 * self.margin + 1)).long().clamp(max=2 * self.margin))


def cut(x: Tensor, sides: Sequence[int], start: int = 0) -> Tensor:
    """Return the part of maps [N, C, ...] that begins at `start` along each axis, and has these sides at most."""
    for axis, side in enumerate(sides, 2):
        x = x.narrow(axis, start, min(side, x.shape[axis] - start))
    return x


def shuffled(x: Tensor, factor: int) -> Tensor:
    """Make channels into finer maps, as the pixel shuffle of images does, along any number of axes.

    Args:
        x: [N, C * factor^A, ...] with A axes.
        factor: by which each axis grows.

    Returns:
        [N, C, ...].
    """
    axes = x.dim() - 2
    if axes == 2:
        return F.pixel_shuffle(x, factor)
    parts = x.unflatten(1, (-1, *[factor] * axes))
    order = [0, 1, *(place for axis in range(axes) for place in (2 + axes + axis, 2 + axis))]
    finer: Tensor = parts.permute(order).reshape(len(x), -1, *(side * factor for side in x.shape[2:]))
    return finer


def shifted(x: Tensor, steps: Tensor) -> Tensor:
    """Shift each map circularly.

    Args:
        x: [N, C, ...] with A axes.
        steps: along each axis, such as down and to the right, int64 [N, A].

    Returns:
        As x.
    """
    axes = x.dim() - 2
    places = [torch.arange(len(x), device=x.device).view(-1, *[1] * axes)]
    for axis, (side, step) in enumerate(zip(x.shape[2:], steps.unbind(1), strict=True)):
        sources = (torch.arange(side, device=x.device) - step[:, None]) % side
        places.append(sources.view(len(x), *(-1 if other == axis else 1 for other in range(axes))))
    moved: Tensor = x.movedim(1, -1)[tuple(places)].movedim(-1, 1)
    return moved


GENERATORS: dict[str, Callable[..., Generator]] = {"unet": UNet, "light": LightDecoder}


def label_codes(classes: int, weight: Tensor | None, size: int, generator: torch.Generator) -> Tensor:
    """Codes by which the generator tells labels apart, zero mean and unit variance in every component.

    Where the teacher's last weight is known, a label's code is its row, centred and whitened: classes that the teacher
    finds alike get codes alike, and no two start out the same.

    Args:
        classes: number of labels.
        weight: of the layer that makes the logits, [classes, features], or None for random codes.
        size: the longest code.
        generator: for the random ones.

    Returns:
        [classes, E] with E = min(size, classes - 1, features) or, for random codes, min(size, classes).
    """
    if weight is None or classes < 2:
        return torch.randn(classes, min(size, classes), generator=generator)
    centred = (weight - weight.mean(0)).double().cpu()
    vectors, values, _ = torch.linalg.svd(centred, full_matrices=False)
    rank = max(1, int((values > 1e-6 * values[0]).sum()))
    vectors = vectors[:, : min(size, rank)]
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))  # fixes the sign the SVD leaves open
    whitened: Tensor = vectors * signs * math.sqrt(classes)
    return whitened.float()


def make_generator(name: str, spec: ImageSpec, codes: Tensor, **settings: int) -> Generator:
    """Build a generator by name.

    Raises:
        InputError: the name is not known.
    """
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    return GENERATORS[name](spec, codes, **settings)

"""The values that travel between the parts: what an image is, a batch of them, and where they come from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from zsq.errors import InputError

LARGE_IMAGE = 96
"""Shorter side in pixels from which images count as large."""

SIDES = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""Names of the sizes beside the channels, by their number."""

SHAPES = "[C, L] (signals), [C, H, W] (images) and [C, D, H, W] (volumes)"

REACH = 8.0
"""Standard deviations within which the numbers of a synthetic signal or volume stay."""

PIXELS_AT_ONCE = 2**20
"""Pixels of the images that go through a network together."""

OutputKind = Literal["classes", "embedding", "values"]
"""What an output means: a class (of an image, or at every position), a direction, or numbers."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor that a network gives."""

    name: str
    """Its name: as the network's dict says, or by kind and number."""
    kind: OutputKind
    """`classes` are logits over the first axis behind the batch (a single one: of yes against no); of an `embedding`
    the direction counts, along the same axis; `values` are anything else."""
    shape: tuple[int, ...] = ()
    """Its shape for one image, without the batch: [classes] or [C, H, W], for instance; found when it is loaded."""

    @property
    def size(self) -> int:
        """Values for one image."""
        return math.prod(self.shape)

    @property
    def classes(self) -> int:
        """Number of classes that are told apart; 0 where there are none."""
        if self.kind != "classes":
            return 0
        return max(2, self.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """What a network takes and gives: shape, normalisation, number of classes, and outputs.

    It takes images, [C, H, W], whose pixels are in [0, 1]; or signals, [C, L], or volumes, [C, D, H, W], which hold any
    numbers. What is normalised is standardised: ``mean`` and ``std`` are those of the training data.

    Raises:
        InputError: a size is below 1, or ``mean``/``std`` do not hold one value a channel, for images on the scale of
            [0, 1].
    """

    channels: int
    """Channels: 1, 3, 4 or any number."""
    height: int = 0
    """Image height in pixels; 0 for signals, which have none."""
    width: int
    """Image width in pixels, or length of a signal."""
    depth: int = 0
    """Slices of a volume; 0 for images and signals, which have none."""
    axes: Literal[1, 2, 3] = 2
    """Axes beside the channels: 1 for signals, 2 for images, 3 for volumes."""
    classes: int = 0
    """Number of classes that labels tell apart: the length of the logits, of an image or at every position; 0 where no
    output is of classes."""
    mean: tuple[float, ...]
    """Per-channel mean, of images on the scale of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per-channel standard deviation, of images on the scale of pixels in [0, 1]."""
    resize: int | None = None
    """Shorter side in pixels to which a file is resized before the centre crop; None crops only."""
    outputs: tuple[Output, ...] = ()
    """What the network gives, in order; empty for a classifier, which gives one vector of `classes` logits."""

    @classmethod
    def of_shape(cls, shape: Sequence[int], **others: Any) -> "ImageSpec":
        """Return the spec of inputs of this shape: [C, L], [C, H, W] or [C, D, H, W].

        Raises:
            InputError: it has other axes, or see `ImageSpec`.
        """
        axes = len(shape) - 1
        if axes not in SIDES:
            raise InputError(f"a network's input is {list(shape)}; {SHAPES} are taken.")
        sides: dict[str, Any] = dict(zip(SIDES[axes], shape[1:], strict=True))
        return cls(channels=shape[0], axes=cast("Literal[1, 2, 3]", axes), **sides, **others)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes beside the channels: [L], [H, W] or [D, H, W]."""
        return tuple(getattr(self, name) for name in SIDES[self.axes])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, [C, ...]."""
        return self.channels, *self.sides

    @property
    def is_image(self) -> bool:
        """Whether inputs are images, of pixels in [0, 1]; else signals or volumes of any numbers."""
        return self.axes == 2

    @property
    def shape_text(self) -> str:
        """The shape as the command line takes it, such as `3x224x224`."""
        return "x".join(map(str, self.shape))

    @property
    def is_large(self) -> bool:
        """Whether inputs count as large: fewer of them tell as much, and cost as much."""
        if self.is_image:
            return min(self.sides) >= LARGE_IMAGE
        return math.prod(self.sides) >= LARGE_IMAGE**2

    @property
    def images_at_once(self) -> int:
        """Inputs that go through a network together where nothing is learnt; the maps of many large ones are slow."""
        return max(1, min(100, PIXELS_AT_ONCE // math.prod(self.sides)))

    def __post_init__(self) -> None:
        self._check_shape()
        if self.classes < 0:
            raise InputError(
                f"image spec: classes is {self.classes}; it must be at least 1, or 0 where there are none."
            )
        self._check_statistics()

    def _check_shape(self) -> None:
        for name in ("channels", *SIDES[self.axes]):
            if getattr(self, name) < 1:
                raise InputError(f"image spec: {name} is {getattr(self, name)}; it must be at least 1.")
        for name in set(SIDES[3]) - set(SIDES[self.axes]):
            if getattr(self, name) != 0:
                raise InputError(
                    f"image spec: {name} is {getattr(self, name)}; inputs of {self.axes} axes have none, so it is 0."
                )
        if self.resize is not None and not self.is_image:
            raise InputError(f"image spec: resize is {self.resize}; only images are resized. Say none.")
        if self.resize is not None and self.resize < min(self.height, self.width):
            raise InputError(
                f"image spec: resize is {self.resize}, below the crop of {self.height}x{self.width}; "
                "resize to at least the crop, or say none."
            )

    def _check_statistics(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise InputError(
                    f"image spec: {name} has {len(getattr(self, name))} values for {self.channels} channels; "
                    f"give one value a channel, such as {','.join(['0.5'] * self.channels)}."
                )
        for name, most in (("mean", 1), ("std", 10)):
            limit = most if self.is_image else math.inf
            if not all(math.isfinite(value) and value <= limit for value in getattr(self, name)):
                raise InputError(
                    f"image spec: {name} is {getattr(self, name)}, but pixels are in [0, 1]; "
                    "divide what is on the scale of [0, 255] by 255."
                )
        if min(self.std) <= 0:
            raise InputError(f"image spec: std is {self.std}; every value must be above 0.")

    def normalize(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], or a signal's or volume's numbers, [N, C, ...], to what the network takes."""
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Map network inputs [N, C, ...] back to pixels, in [0, 1] where they are those of an image, or to numbers."""
        mean, std = self._statistics(images)
        return images * std + mean

    def bounded(self, values: Tensor) -> Tensor:
        """Map any numbers [N, C, ...] to valid inputs: pixels by a sigmoid, others to within `REACH` deviations."""
        if self.is_image:
            return self.normalize(torch.sigmoid(values))
        return REACH * torch.tanh(values / REACH)

    def unbounded(self, images: Tensor, margin: float) -> Tensor:
        """Map valid inputs to the numbers of which `bounded` makes them, after bringing them into its range.

        Args:
            images: [N, C, ...].
            margin: least distance from the ends of the range, as a share of it.
        """
        if self.is_image:
            return self.denormalize(images).clamp(margin, 1 - margin).logit()
        return REACH * torch.atanh((images / REACH).clamp(2 * margin - 1, 1 - 2 * margin))

    @property
    def ends(self) -> Tensor:
        """Least and largest value of each channel of a valid input, float [2, C]."""
        if self.is_image:
            levels = torch.tensor([0.0, 1.0]).view(2, *[1] * (1 + self.axes)).expand(2, *self.shape)
            return self.normalize(levels).flatten(2)[..., 0]
        return torch.tensor([-REACH, REACH])[:, None].expand(2, self.channels)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map network inputs [N, C, H, W] back to pixels, uint8 [N, H, W, C]."""
        pixels = self.denormalize(images).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def to_raw(self, images: Tensor) -> Tensor:
        """Map network inputs to what a data set holds: pixels, uint8 [N, H, W, C], or numbers, float [N, C, ...]."""
        return self.to_pixels(images) if self.is_image else self.denormalize(images)

    def from_raw(self, raw: Tensor) -> Tensor:
        """Map what a data set holds to network inputs, float [N, C, ...]."""
        return self.normalize(raw.permute(0, 3, 1, 2).float() / 255 if self.is_image else raw.float())

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        make = _kept_by_channel if images.is_cuda else _by_channel
        mean, std = (make(tuple(values), self.axes, images.dtype, images.device) for values in (self.mean, self.std))
        return mean, std


def _by_channel(values: tuple[float, ...], axes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values as [1, C, 1, ...]."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, *[1] * axes)


@cache
def _kept_by_channel(values: tuple[float, ...], axes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the same tensor each time, since bringing values to a GPU waits for it."""
    with torch.inference_mode(False):  # usable in training, whoever asks first
        return _by_channel(values, axes, dtype, device)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a source gives: images as the network takes them, and what is known of them."""

    images: Tensor
    """Normalised images, float [N, C, H, W]; where processes share a batch, this one's share of the N."""
    labels: Tensor
    """Wanted or true classes, int64 [N]: always those of the whole batch."""
    teacher_logits: Tensor | None = None
    """Logits of the teacher for the whole batch, float [N, classes], where already computed."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars worth logging of the source's own learning step."""

    def split(self, parts: int) -> "list[Batch]":
        """Return the images in `parts` batches whose sizes differ by one at most, without the losses."""
        if parts == 1:
            return [Batch(self.images, self.labels, self.teacher_logits)]
        logits = [None] * parts if self.teacher_logits is None else self.teacher_logits.tensor_split(parts)
        rows = zip(self.images.tensor_split(parts), self.labels.tensor_split(parts), logits, strict=True)
        return [Batch(*row) for row in rows]


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the images of several, losses averaged; all know the teacher's logits, or none."""
    if len(batches) == 1:
        return batches[0]
    logits = [batch.teacher_logits for batch in batches if batch.teacher_logits is not None]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(logits) if logits else None,
        averaged([batch.losses for batch in batches], [len(batch.labels) for batch in batches]),
    )


def averaged(losses: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Return the losses of a batch whose parts, of so many images each, have these."""
    if len(losses) == 1:
        return losses[0]
    shares = [count / sum(counts) for count in counts]
    return {
        name: torch.stack([share * part[name] for share, part in zip(shares, losses, strict=True)]).sum()
        for name in losses[0]
    }


@dataclass(frozen=True, slots=True)
class Statistics:
    """What batch norm says of a folded network's values: takes the place of images in calibration."""

    ranges: dict[str, tuple[Tensor, Tensor]]
    """Smallest and largest value, each [1], by the name of the node in the folded graph."""
    input_means: dict[str, Tensor]
    """Mean of each input channel [I] of a layer, by the name of the layer's node."""
    input_stds: dict[str, Tensor] = field(default_factory=dict)
    """Standard deviation of each input channel [I] of a layer, by the name of the layer's node."""


class SampleSource(Protocol):
    """What stands in for the training images."""

    data_free: bool
    """Whether no real image was used."""
    true_labels: bool
    """Whether somebody has looked at the images to label them, so that a student may learn from the labels."""

    @property
    def asks_labels(self) -> bool:
        """Whether images are asked for by label, so that it means something how many the teacher recognises."""
        ...

    def sample(self, count: int, batch_size: int = 100, name: str = "sample") -> Iterator[Batch]:
        """Stream `count` images for calibration; two calls give the same images, unless `name` is another."""
        ...

    def sample_labels(self, labels: Tensor) -> Tensor | None:
        """Return one image for each label [N], [N, C, H, W]; None where a source cannot be asked for a label."""
        ...

    def batch(self, step: int, student: nn.Module | None) -> Batch:
        """Return the batch of distillation step `step`; a source that learns on the way does so here."""
        ...

    def halve(self) -> bool:
        """Learn from later batches in twice as many parts where that is possible; return whether it was."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a resumed or copied source needs, flat."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...

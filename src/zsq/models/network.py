"""A network by name, and what is said about its weights and images: where a teacher comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional

from zsq.errors import InputError, TeacherError
from zsq.models.options import option, text
from zsq.types import SIDES, ImageSpec, Output, OutputKind


def parse_shape(value: str) -> tuple[int, ...]:
    """Read `3x32x32`, of a signal `12x256`, or of a volume `1x16x64x64`.

    Raises:
        InputError: it is something else.
    """
    sizes = value.lower().split("x")
    if len(sizes) - 1 not in SIDES or not all(size.isdecimal() and len(size) <= DIGITS for size in sizes):
        raise InputError(
            f"--input is '{value}'; channels x height x width are expected, such as 3x32x32, of signals 12x256, of "
            "volumes 1x16x64x64."
        )
    return tuple(map(int, sizes))


DIGITS = 9
"""Most digits of a size."""


def parse_resize(value: str) -> int | Literal["none"]:
    """Read a number of pixels, or `none`.

    Raises:
        InputError: it is neither.
    """
    if value.lower() == "none":
        return "none"
    try:
        return int(value)
    except ValueError:
        raise InputError(f"--resize is '{value}'; a whole number or none is expected.") from None


def numbers(name: str) -> Callable[[str], tuple[float, ...]]:
    """Return the function that reads `0.5,0.5,0.5`.

    Raises (when called):
        InputError: it is something else; the text names the option.
    """

    def parse(value: str) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            raise InputError(
                f"--{name} is '{value}'; numbers separated by commas are expected, one a channel."
            ) from None

    return parse


def parse_outputs(value: str) -> tuple[Output, ...]:
    """Read `embedding`, `classes,values` or `heat=values,size=values`.

    Raises:
        InputError: it is something else.
    """
    found = []
    for part in value.split(","):
        name, equals, kind = part.strip().rpartition("=")
        if kind not in get_args(OutputKind) or (equals and not name):
            raise InputError(
                f"--outputs is '{value}'; a kind is expected ({', '.join(get_args(OutputKind))}), or one for each "
                "output, in order or by name, such as heat=values,size=values."
            )
        found.append(Output(name, kind, ()))  # type: ignore[arg-type]
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network to quantize, by name; command line, recipe, run folder and Python say it in these words."""

    model: Positional[str]
    """digits, shapes_mobilenet, pytorchcv:NAME, timm:NAME, torchvision:NAME, FILE.py:FACTORY, MODULE:FACTORY or a
    torch.export program, FILE.pt2."""
    weights: Annotated[str | None, option("FILE")] = None
    """Weights file (safetensors or PyTorch checkpoint), or `random`; unset, those that MODEL brings."""
    input: Annotated[tuple[int, ...] | None, text("CxHxW", parse_shape), option("CxHxW")] = None
    """Image shape such as 3x32x32; of signals such as 12x256, of volumes such as 1x16x64x64; known for zoos."""
    classes: Annotated[int | None, option("N")] = None
    """Number of classes; known for zoos, and found out where --outputs says that there are any."""
    outputs: Annotated[tuple[Output, ...] | None, text("KIND|NAME=KIND,...", parse_outputs), option("KIND,...")] = None
    """What the network gives: classes (of an image or at every position), embedding or values; several in order or by
    name. Unset, --classes tells."""
    mean: Annotated[tuple[float, ...] | None, text("A,B,C", numbers("mean")), option("A,B,C")] = None
    """Mean of each channel, of images with pixels in [0, 1]."""
    std: Annotated[tuple[float, ...] | None, text("A,B,C", numbers("std")), option("A,B,C")] = None
    """Standard deviation of each channel, of images with pixels in [0, 1]."""
    resize: Annotated[int | Literal["none"] | None, text("N|none", parse_resize), option("N|none")] = None
    """Shorter side in pixels before the centre crop, or none; unset, what MODEL says."""

    def spec_over(self, default: ImageSpec) -> ImageSpec:
        """Return a model's image spec with what is said here; its resize grows or shrinks with the crop."""
        if self.classes is not None and self.classes < 1:
            raise InputError(f"--classes is {self.classes}; it must be at least 1. --outputs says what else there is.")
        shape = self.input or default.shape
        resize = None if self.resize == "none" else self.resize
        if self.resize is None and default.resize is not None:
            resize = round(default.resize * min(shape[1:]) / min(default.sides))
        return ImageSpec.of_shape(
            shape,
            classes=self.classes or (0 if self.outputs else default.classes),
            outputs=default.outputs if self.outputs is None else self.outputs,
            mean=tuple(self.mean or default.mean),
            std=tuple(self.std or default.std),
            resize=resize,
        )

    def spec_alone(self) -> ImageSpec:
        """Return the image spec of a model that brings none: pixels in [0, 1] unless mean and std are given.

        Raises:
            TeacherError: the shape is not given, or one of mean and std without the other.
        """
        if self.input is None:
            raise TeacherError(
                f"'{self.model}' does not say what images it takes: give --input CxHxW, with --mean and "
                "--std if it was trained on normalised pixels; signals are CxL, volumes CxDxHxW."
            )
        if (self.mean is None) != (self.std is None):
            given, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise TeacherError(f"'{self.model}' gets --{given} and no --{other}; give both, or neither.")
        channels = self.input[0]
        return self.spec_over(ImageSpec.of_shape(self.input, mean=(0.0,) * channels, std=(1.0,) * channels))

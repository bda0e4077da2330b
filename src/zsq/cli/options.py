"""Options that several commands of the command line share."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from zsq.errors import InputError
from zsq.models.teacher import Teacher, load_teacher
from zsq.runs.console import say_line


def unset(metavar: str, name: str | None = None) -> Any:
    """Describe an option that is absent by default, so that its help shows no "None"."""
    return arg(name=name, metavar=metavar, help_behavior_hint="")


Text = Annotated[str | None, unset("NAME")]
Numbers = Annotated[str | None, unset("A,B,C")]
Count = Annotated[int | None, unset("N")]
Time = Annotated[str | None, unset("TIME")]
File = Annotated[Path | None, unset("FILE")]
Folder = Annotated[Path, arg(metavar="DIR")]
FromRun = Annotated[Path | None, unset("DIR", name="from")]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Where the network comes from and what images it takes."""

    model: Positional[str]
    """digits, pytorchcv:NAME, timm:NAME, torchvision:NAME, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY."""
    weights: Annotated[str | None, unset("FILE")] = None
    """Weights file (safetensors or PyTorch checkpoint), or `random`; unset, those that MODEL brings."""
    input: Annotated[str | None, unset("CxHxW")] = None
    """Image shape such as 3x32x32; known for zoos."""
    classes: Count = None
    """Number of classes; known for zoos."""
    mean: Numbers = None
    """Mean of each channel, pixels in [0, 1]."""
    std: Numbers = None
    """Standard deviation of each channel, pixels in [0, 1]."""
    resize: Annotated[str | None, unset("N|none")] = None
    """Shorter side in pixels before the centre crop, or none; unset, what MODEL says."""

    def load(self) -> Teacher:
        """Return the teacher."""
        resize: Any = "zoo"
        if self.resize is not None:
            resize = None if self.resize.lower() == "none" else _whole("resize", self.resize)
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not mix with a result
            teacher = load_teacher(
                self.model,
                weights=self.weights,
                input=_shape(self.input),
                classes=self.classes,
                mean=_floats("mean", self.mean),
                std=_floats("std", self.std),
                resize=resize,
            )
        spec = teacher.spec
        if not any(spec.mean) and set(spec.std) == {1.0} and self.mean is None and self.std is None:
            say_line("pixels go into the network as they are, from 0 to 1; --mean and --std normalise them")
        return teacher


@dataclass(frozen=True, kw_only=True)
class RunOptions(TeacherOptions):
    """What stands in for the training data, and how long it may take."""

    out: Folder
    """Folder of what is written."""
    method: Text = None
    """What stands in for the training data; see `zsq methods`. Default zscgan."""
    recipe: File = None
    """TOML file of settings, such as a run's settings.toml."""
    budget: Time = None
    """Wall-clock time to fill, such as 90s, 5m or 1h; 10m without recipe and chosen steps."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.NAME=VALUE")] = ()
    """A setting, such as method.steps=500 or quantizer.range_rule=minmax; may be repeated. `zsq methods` lists them."""
    from_run: FromRun = None
    """Use the generator that another run has fitted."""
    seed: Count = None
    """Of every random draw; unset, that of the recipe or of the run that is resumed, else 0."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    resume: bool = False
    """Continue what --out holds."""
    overwrite: bool = False
    """Discard what --out holds."""

    def shared(self) -> dict[str, Any]:
        """Return what all of these commands pass on as it is."""
        return {
            "out": self.out,
            "method": self.method,
            "recipe": self.recipe,
            "settings": self.set,
            "budget": self.budget,
            "from_run": self.from_run,
            "seed": self.seed,
            "device": self.device,
            "resume": self.resume,
            "overwrite": self.overwrite,
        }


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(RunOptions):
    """A run whose training several processes can share."""

    devices: Annotated[int, arg(metavar="N")] = 1
    """Processes on this machine that share the training, one a GPU; torchrun sets its own number."""


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--{name} is '{text}'; a whole number or none is expected.") from None


def _floats(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} is '{text}'; numbers separated by commas are expected, one a channel.") from None


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise InputError(f"--input is '{text}'; channels x height x width are expected, such as 3x32x32.")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])

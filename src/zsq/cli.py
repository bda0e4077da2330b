"""The command line: parse, call the library, print; one handler turns every expected fault into one line."""

import functools
import inspect
import json
import operator
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    Positional,
    PositionalMetavarFromFieldName,
    UseAppendAction,
    arg,
    subcommand,
)

from zsq import doctor
from zsq.console import TerminalProgress, say
from zsq.datasets import open_dataset
from zsq.errors import InputError, ZsqError, unknown_name
from zsq.evaluate import Evaluation, evaluate_many
from zsq.experiment import quantize
from zsq.methods import METHODS
from zsq.quantize import QUANTIZERS
from zsq.report import percent, summary_rows, table
from zsq.runs import pick_device, stored_spec
from zsq.samples import synthesize
from zsq.teachers import Teacher, known_models, load_teacher
from zsq.verification import OnnxClassifier


def _unset(metavar: str, name: str | None = None) -> Any:
    """Describe an option that is absent by default, so that its help shows no "None"."""
    return arg(name=name, metavar=metavar, help_behavior_hint="")


Text = Annotated[str | None, _unset("NAME")]
Numbers = Annotated[str | None, _unset("A,B,C")]
Count = Annotated[int | None, _unset("N")]
Time = Annotated[str | None, _unset("TIME")]
File = Annotated[Path | None, _unset("FILE")]
Folder = Annotated[Path, arg(metavar="DIR")]
FromRun = Annotated[Path | None, _unset("DIR", name="from")]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Where the network comes from and what images it takes."""

    model: Positional[str]
    """digits, pytorchcv:NAME, timm:NAME, torchvision:NAME, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY."""
    weights: Annotated[str | None, _unset("FILE")] = None
    """Weights file (safetensors or PyTorch checkpoint), or `random`; unset, those that MODEL brings."""
    input: Annotated[str | None, _unset("CxHxW")] = None
    """Image shape such as 3x32x32; known for zoos."""
    classes: Count = None
    """Number of classes; known for zoos."""
    mean: Numbers = None
    """Mean of each channel, pixels in [0, 1]."""
    std: Numbers = None
    """Standard deviation of each channel, pixels in [0, 1]."""
    resize: Annotated[str | None, _unset("N|none")] = None
    """Shorter side in pixels before the centre crop, or none; unset, what MODEL says."""

    def load(self) -> Teacher:
        """Return the teacher."""
        resize: Any = "zoo"
        if self.resize is not None:
            resize = None if self.resize.lower() == "none" else _whole("resize", self.resize)
        return load_teacher(
            self.model,
            weights=self.weights,
            input=_shape(self.input),
            classes=self.classes,
            mean=_floats("mean", self.mean),
            std=_floats("std", self.std),
            resize=resize,
        )


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
    seed: int = 0
    """Of every random draw."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    overwrite: bool = False
    """Discard the run or the images that --out holds."""


@dataclass(frozen=True, kw_only=True)
class Quantize(RunOptions):
    """Quantize a network without its training data and write verified files.

    Examples:
      zsq quantize digits --budget 1m --data digits --out runs/digits
      zsq quantize digits --bits 4 --from runs/digits --out runs/digits4
      zsq quantize pytorchcv:resnet18 --data imagenet/val --out runs/r18
      zsq quantize net.py:build --weights net.pth --input 3x32x32 --classes 10 \\
          --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --quantizer qat --bits W4A8 \\
          --budget 10m --data test.npz --out runs/net
    """

    quantizer: Text = None
    """ptq (calibration only) or qat (distillation as well). Default ptq."""
    bits: Annotated[str | None, _unset("N|WnAn")] = None
    """8, 6, 4, any width from 2 to 8, or W4A8. Default 8."""
    data: Annotated[str | None, _unset("SET")] = None
    """Labelled images on which teacher and result are evaluated: digits, FILE.npz or a folder."""
    resume: bool = False
    """Continue the run that --out holds."""
    checkpoint_every: Count = None
    """Steps between checkpoints; unset, every 30 seconds."""
    json: bool = False
    """Print the record as one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        with TerminalProgress() as progress:
            result = quantize(
                self.load(),
                out=self.out,
                bits=self.bits,
                method=self.method,
                quantizer=self.quantizer,
                recipe=self.recipe,
                settings=self.set,
                budget=self.budget,
                from_run=self.from_run,
                data=self.data,
                seed=self.seed,
                device=self.device,
                resume=self.resume,
                overwrite=self.overwrite,
                checkpoint_every=self.checkpoint_every,
                progress=progress,
                say=say,
            )
        if self.json:
            print(json.dumps(result.record))
            return
        for name, text in summary_rows(result.record):
            console.print(f"{name + ':':24} {text}", soft_wrap=True)
        console.print(f"{'folder:':24} {result.folder}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Synthesize(RunOptions):
    """Write synthetic images for use in any tool: an .npz (images, labels) and a picture with one row a class.

    Examples:
      zsq synthesize digits --method zscgan --count 1000 --budget 1m --out images
      zsq synthesize digits --from runs/digits --count 10000 --out images
    """

    count: int = 1000
    """Number of images."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        with TerminalProgress() as progress:
            written = synthesize(
                self.load(),
                out=self.out,
                count=self.count,
                method=self.method,
                recipe=self.recipe,
                settings=self.set,
                budget=self.budget,
                from_run=self.from_run,
                seed=self.seed,
                device=self.device,
                overwrite=self.overwrite,
                progress=progress,
                say=say,
            )
        for path in written:
            console.print(str(path), soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TeacherOptions):
    """Measure top-1, top-5 and agreement of a run's model.onnx, or of a float network.

    Examples:
      zsq evaluate runs/digits --data digits
      zsq evaluate digits --data digits --json
    """

    model: Positional[str]
    """Folder of a run, or a network as for `zsq quantize`."""
    data: Annotated[str, arg(metavar="SET")]
    """Labelled images: digits, FILE.npz, or a folder with metadata.csv or one folder a class."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where the float network computes."""
    json: bool = False
    """Print one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        found = self._measure()
        if self.json:
            print(json.dumps({name: value.as_dict() for name, value in found.items()}))
            return
        columns = ("network", "top-1 %", "95 % interval", "top-5 %", "agreement %", "correct", "images")
        console.print(table(f"{self.model} on {self.data}", columns, [_row(*item) for item in found.items()]))

    def _measure(self) -> dict[str, Evaluation]:
        with TerminalProgress() as progress:

            def show(done: int, total: int) -> None:
                progress.update("evaluate", done, total, {})

            if Path(self.model).is_dir() and self.model != "digits":
                file = OnnxClassifier(Path(self.model) / "model.onnx")
                data = open_dataset(self.data, stored_spec(Path(self.model)))
                return evaluate_many({"model.onnx": file}, data, progress=show)
            teacher = self.load().to(pick_device(self.device))
            data = open_dataset(self.data, teacher.spec)
            return evaluate_many({teacher.name: teacher.network}, data, progress=show)


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods and quantizers, or the settings of one.

    Examples:
      zsq methods
      zsq methods zscgan
    """

    name: Annotated[Positional[str | None], arg(help_behavior_hint="")] = None
    """Method or quantizer whose settings are shown."""

    def run(self, console: Console) -> None:
        """Print them."""
        known: dict[str, Any] = {**METHODS, **QUANTIZERS}
        if self.name is None:
            rows = [("--method", name, kind.summary) for name, kind in METHODS.items()]
            rows += [("--quantizer", name, (kind.__doc__ or "").splitlines()[0]) for name, kind in QUANTIZERS.items()]
            for option, name, text in rows:
                console.print(f"{option:12} {name:12} {text}", soft_wrap=True)
            return
        if self.name not in known:
            raise unknown_name("method or quantizer", self.name, known)
        section = "method" if self.name in METHODS else "quantizer"
        for setting, default, text in doctor.settings_of(known[self.name]):
            line = f"--set {section}.{setting}={default}"
            console.print(f"{line:52} {text}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the networks that can be named.

    Examples:
      zsq models
      zsq models resnet20
    """

    search: Annotated[Positional[str], arg(help_behavior_hint="")] = ""
    """Show zoo networks whose name contains this."""

    def run(self, console: Console) -> None:
        """Print them."""
        for group in known_models():
            state = "" if group.installed else "not usable here: "
            console.print(f"{group.form:26} {state}{group.reason}", soft_wrap=True)
            if self.search and ":" in group.form:
                for name in group.names:
                    if self.search in name:
                        console.print(f"  {group.form.split(':')[0]}:{name}")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, devices, and a small quantization from end to end.

    Examples:
      zsq doctor
    """

    def run(self, console: Console) -> None:
        """Print what was found; an expected fault if something does not work."""
        for name, text in doctor.report():
            console.print(f"{name + ':':24} {text}", soft_wrap=True)


COMMANDS: dict[str, Any] = {
    "quantize": Quantize,
    "synthesize": Synthesize,
    "evaluate": EvaluateOptions,
    "methods": Methods,
    "models": Models,
    "doctor": Doctor,
}


def _described(kind: type, with_examples: bool) -> str:
    """Return a command's docstring line by line, or its summary alone for the list of commands."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return text if with_examples else text.partition("\n\n")[0]


def parse(arguments: list[str] | None = None) -> Any:
    """Return the command that the arguments ask for, ready to run; exits 2 on wrong usage."""
    asked = (sys.argv[1:] if arguments is None else arguments)[:1]
    forms = tuple(
        Annotated[kind, subcommand(name, description=_described(kind, with_examples=asked == [name]))]
        for name, kind in COMMANDS.items()
    )
    any_of: Any = functools.reduce(operator.or_, forms)
    return tyro.cli(
        any_of,
        prog="zsq",
        description="Quantize a pretrained image classifier without any of its training data.",
        args=arguments,
        config=(FlagCreatePairsOff, DisallowNone, PositionalMetavarFromFieldName),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 1 on an expected fault, 2 on wrong usage."""
    command = parse(arguments)
    try:
        command.run(Console(markup=False, emoji=False, highlight=False))
    except ZsqError as error:
        _stop(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # the disk is full, a folder may not be written
        _stop(f"{error.filename or 'writing'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        print("Stopped; --resume continues.", file=sys.stderr)
        sys.exit(130)


def _stop(text: str) -> NoReturn:
    print(f"Error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(1)


def _row(name: str, found: Evaluation) -> list[str]:
    low, high = found.top1_interval
    shares = [percent(found.top1), f"{low:.2f} to {high:.2f}", percent(found.top5), percent(found.teacher_agreement)]
    return [name, *shares, str(found.top1_correct), str(found.num_images)]


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

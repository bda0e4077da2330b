"""The command line: parse, call the library, print; one handler turns every expected fault into one line."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg, subcommand

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

Numbers = Annotated[str | None, arg(metavar="A,B,C")]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Where the network comes from and what images it takes."""

    model: Positional[str]
    """digits, pytorchcv:NAME, timm:NAME, torchvision:NAME, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY."""
    weights: str | None = None
    """Weights file (safetensors or PyTorch checkpoint), or `random`; unset, those that MODEL brings."""
    input: Annotated[str | None, arg(metavar="CxHxW")] = None
    """Image shape such as 3x32x32; known for zoos."""
    classes: int | None = None
    """Number of classes; known for zoos."""
    mean: Numbers = None
    """Mean of each channel, pixels in [0, 1]."""
    std: Numbers = None
    """Standard deviation of each channel, pixels in [0, 1]."""
    resize: Annotated[str | None, arg(metavar="N|none")] = None
    """Shorter side in pixels before the centre crop, or none; unset, what MODEL says."""

    def load(self) -> Teacher:
        """Return the teacher."""
        resize: Any = "zoo"
        if self.resize is not None:
            resize = None if self.resize.lower() == "none" else _integers("resize", self.resize, ",")[0]
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
class Quantize(TeacherOptions):
    """Quantize a network without its training data and write verified files.

    Examples:
      zsq quantize digits --budget 1m --data digits --out runs/digits
      zsq quantize examples/cifar10.py:cifar10_resnet20 --weights resnet20.safetensors --quantizer qat --bits 4 --out r4
      zsq quantize pytorchcv:resnet18 --bits 8 --data imagenet/val --out runs/resnet18
      zsq quantize digits --bits 4 --from runs/digits --out runs/digits4
    """

    out: Path
    """Folder of the run."""
    method: str | None = None
    """What stands in for the training data; see `zsq methods`. Default zscgan."""
    quantizer: str | None = None
    """ptq (calibration only) or qat (distillation as well). Default ptq."""
    bits: str | None = None
    """8, 6, 4, any width from 2 to 8, or W4A8. Default 8."""
    recipe: Path | None = None
    """TOML file of settings, such as a run's settings.toml."""
    budget: str | None = None
    """Wall-clock time to fill, such as 90s, 5m or 1h; 10m without recipe and chosen steps."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.NAME=VALUE")] = ()
    """A setting, such as method.steps=500 or quantizer.range_rule=minmax; may be repeated. `zsq methods` lists them."""
    from_run: Annotated[Path | None, arg(name="from", metavar="DIR")] = None
    """Use the generator that another run has fitted."""
    seed: int = 0
    """Of every random draw."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    data: str | None = None
    """Labelled images on which teacher and result are evaluated: digits, FILE.npz or a folder."""
    resume: bool = False
    """Continue the run that --out holds."""
    overwrite: bool = False
    """Discard the run that --out holds."""
    checkpoint_every: int | None = None
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
            console.print(f"{name + ':':24} {text}", soft_wrap=True, highlight=False, markup=False)
        console.print(f"{'folder:':24} {result.folder}", soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Synthesize(TeacherOptions):
    """Write synthetic images for use in any tool: an .npz (images, labels) and a picture with one row a class.

    Examples:
      zsq synthesize digits --method zscgan --count 1000 --budget 1m --out images
      zsq synthesize digits --from runs/digits --count 10000 --out images
    """

    out: Path
    """Folder for images.npz and samples.png."""
    count: int = 1000
    """Number of images."""
    method: str | None = None
    """See `zsq methods`. Default zscgan."""
    recipe: Path | None = None
    """TOML file of settings."""
    budget: str | None = None
    """Wall-clock time to fill; 10m without recipe and chosen steps."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="method.NAME=VALUE")] = ()
    """A setting; may be repeated."""
    from_run: Annotated[Path | None, arg(name="from", metavar="DIR")] = None
    """Use the generator that another run has fitted."""
    seed: int = 0
    """Of every random draw."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    overwrite: bool = False
    """Replace the images that --out holds."""

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
            console.print(str(path), soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TeacherOptions):
    """Measure top-1, top-5 and agreement of a run's model.onnx, or of a float network.

    Examples:
      zsq evaluate runs/digits --data digits
      zsq evaluate digits --data digits --json
    """

    model: Positional[str]
    """Folder of a run, or a network as for `zsq quantize`."""
    data: str
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

            if Path(self.model).is_dir():
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

    name: Positional[str | None] = None
    """Method or quantizer whose settings are shown."""

    def run(self, console: Console) -> None:
        """Print them."""
        known: dict[str, Any] = {**METHODS, **QUANTIZERS}
        if self.name is None:
            rows = [("--method", name, kind.summary) for name, kind in METHODS.items()]
            rows += [("--quantizer", name, (kind.__doc__ or "").splitlines()[0]) for name, kind in QUANTIZERS.items()]
            for option, name, text in rows:
                console.print(f"{option:12} {name:12} {text}", soft_wrap=True, highlight=False, markup=False)
            return
        if self.name not in known:
            raise unknown_name("method or quantizer", self.name, known)
        section = "method" if self.name in METHODS else "quantizer"
        for setting, default, text in doctor.settings_of(known[self.name]):
            line = f"--set {section}.{setting}={default}"
            console.print(f"{line:52} {text}", soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the networks that can be named.

    Examples:
      zsq models
      zsq models resnet20
    """

    search: Positional[str] = ""
    """Show zoo networks whose name contains this."""

    def run(self, console: Console) -> None:
        """Print them."""
        for group in known_models():
            state = "" if group.installed else "not usable here: "
            console.print(f"{group.form:26} {state}{group.reason}", soft_wrap=True, highlight=False, markup=False)
            if self.search and ":" in group.form:
                for name in group.names:
                    if self.search in name:
                        console.print(f"  {group.form.split(':')[0]}:{name}", highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, devices, and a small quantization from end to end.

    Examples:
      zsq doctor
    """

    def run(self, console: Console) -> None:
        """Print what was found; an expected fault if something does not work."""
        for name, text in doctor.report():
            console.print(f"{name + ':':24} {text}", soft_wrap=True, highlight=False, markup=False)


Command = (
    Annotated[Quantize, subcommand("quantize")]
    | Annotated[Synthesize, subcommand("synthesize")]
    | Annotated[EvaluateOptions, subcommand("evaluate")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 1 on an expected fault, 2 on wrong usage."""
    command: Any = tyro.cli(
        Command,
        prog="zsq",
        description="Quantize a pretrained image classifier without any of its training data.",
        args=arguments,
        config=(FlagCreatePairsOff,),
    )
    try:
        command.run(Console())
    except ZsqError as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped; --resume continues.", file=sys.stderr)
        sys.exit(130)


def _row(name: str, found: Evaluation) -> list[str]:
    low, high = found.top1_interval
    return [
        name,
        percent(found.top1),
        f"{low:.2f} to {high:.2f}",
        percent(found.top5),
        percent(found.teacher_agreement),
        str(found.top1_correct),
        str(found.num_images),
    ]


def _integers(name: str, text: str, separator: str) -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise InputError(f"--{name} is '{text}'; whole numbers separated by '{separator}' are expected.") from None


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
    sizes = _integers("input", text.lower(), "x")
    if len(sizes) != 3:
        raise InputError(f"--input is '{text}'; channels x height x width are expected, such as 3x32x32.")
    return sizes[0], sizes[1], sizes[2]

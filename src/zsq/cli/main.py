"""The command line: parse, call the library, print; one handler turns every expected fault into one line."""

import functools
import inspect
import json
import operator
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    Positional,
    PositionalMetavarFromFieldName,
    arg,
    subcommand,
)

from zsq.cli import doctor
from zsq.cli.allocate import Allocate
from zsq.cli.compare import Compare
from zsq.cli.launcher import LOST, STOPPED, SUPERVISED, run_workers, watch_starter
from zsq.cli.options import Count, File, ParallelOptions, TeacherOptions, Text, unset
from zsq.data.datasets import LabelledImages, open_dataset
from zsq.errors import InputError, LostProcessError, ZsqError, unknown_name
from zsq.evaluation.accuracy import Evaluation, Predict, evaluate_many
from zsq.export.verify import OnnxClassifier
from zsq.methods import METHODS
from zsq.models.teacher import known_models
from zsq.quantization import QUANTIZERS
from zsq.reports.pictures import percent, summary_rows, table
from zsq.runs.console import TerminalProgress, say_line
from zsq.runs.folder import pick_device, versions
from zsq.runs.quantize import quantize
from zsq.runs.synthesize import synthesize
from zsq.runtime import distributed
from zsq.types import ImageSpec


@dataclass(frozen=True, kw_only=True)
class Quantize(ParallelOptions):
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
    bits: Annotated[str | None, unset("N|WnAn")] = None
    """8, 6, 4, any width from 2 to 8, W4A8, or a file such as `zsq allocate` writes. Default 8."""
    data: Annotated[str | None, unset("SET")] = None
    """Labelled images on which teacher and result are evaluated: digits, FILE.npz or a folder."""
    checkpoint_every: Count = None
    """Steps between checkpoints; unset, every 30 seconds, or in 2 % of the time."""
    json: bool = False
    """Print the record as one JSON object."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        result = quantize(
            self.load(),
            bits=self.bits,
            quantizer=self.quantizer,
            data=self.data,
            checkpoint_every=self.checkpoint_every,
            **self.shared(),
        )
        if not distributed.is_main():
            return
        if self.json:
            print(json.dumps(result.record))
            return
        for name, text in summary_rows(result.record):
            console.print(f"{name + ':':24} {text}", soft_wrap=True)
        console.print(f"{'folder:':24} {result.folder}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Synthesize(ParallelOptions):
    """Write synthetic images for use in any tool: an .npz (images, labels) and a picture with one row a class.

    Examples:
      zsq synthesize digits --method zscgan --count 1000 --budget 1m --out images
      zsq synthesize digits --from runs/digits --count 10000 --out images
    """

    count: int = 1000
    """Number of images."""

    def run(self, console: Console) -> None:
        """Do it and print the outcome."""
        written = synthesize(self.load(), count=self.count, **self.shared())
        for path in written if distributed.is_main() else ():
            console.print(str(path), soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TeacherOptions):
    """Measure top-1, top-5 and agreement of a quantized file, of a float network, or of both side by side.

    Examples:
      zsq evaluate runs/digits --data digits
      zsq evaluate runs/digits/model.onnx --data digits --json
      zsq evaluate digits --file runs/digits --data digits
    """

    model: Positional[str]
    """Folder of a run, its model.onnx, or a network as for `zsq quantize`."""
    file: File = None
    """Beside a network: folder of a run or .onnx file that is compared with it."""
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

            path = Path(self.model)
            if (path.is_dir() and self.model != "digits") or path.suffix == ".onnx":
                self._check_alone()
                file = _open_file(path)
                return evaluate_many({"model.onnx": file}, self._open(file.spec), progress=show)
            beside = None if self.file is None else _open_file(self.file)
            teacher = self.load().to(pick_device(self.device))
            if beside is not None and replace(beside.spec, resize=None) != replace(teacher.spec, resize=None):
                raise InputError(f"{self.file} takes {beside.spec}, and {teacher.name} {teacher.spec}.")
            data = self._open(teacher.spec)
            networks: dict[str, Predict] = {teacher.name: teacher.network}
            if beside is None:
                return evaluate_many(networks, data, progress=show)
            return evaluate_many(networks | {"model.onnx": beside}, data, teacher=teacher.network, progress=show)

    def _open(self, spec: ImageSpec) -> LabelledImages:
        data = open_dataset(self.data, spec)
        if data.notice:
            say_line(data.notice)
        return data

    def _check_alone(self) -> None:
        """Refuse what is said of a network where there is none."""
        for name in ("weights", "input", "classes", "mean", "std", "resize", "file"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"--{name} goes with a network, and {self.model} is a quantized file, which knows its images; "
                    f"zsq evaluate NETWORK --file {self.model} measures both."
                )


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
                console.print(f"{option:12} {name:17} {text}", soft_wrap=True)
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
        matches = 0
        for group in known_models():
            state = "" if group.installed else "not usable here: "
            console.print(f"{group.form:26} {state}{group.reason}", soft_wrap=True)
            if self.search and ":" in group.form:
                found = [name for name in group.names if self.search in name]
                matches += len(found)
                for name in found:
                    console.print(f"  {group.form.split(':')[0]}:{name}")
        if self.search and not matches:
            console.print(f"no zoo network that can be used here has '{self.search}' in its name")


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


WORKER = (sys.executable, "-m", "zsq")
"""What starts this command line in a process of its own."""

COMMANDS: dict[str, Any] = {
    "quantize": Quantize,
    "synthesize": Synthesize,
    "evaluate": EvaluateOptions,
    "compare": Compare,
    "allocate": Allocate,
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
        description="Quantize a pretrained image classifier without any of its training data.\n\n"
        "`zsq COMMAND --help` has examples, `zsq --version` names the versions.",
        args=arguments,
        config=(FlagCreatePairsOff, DisallowNone, PositionalMetavarFromFieldName),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 1 on an expected fault, 2 on wrong usage."""
    try:
        if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
            print(", ".join(f"{name} {number}" for name, number in versions().items()))
            return
        try:
            command = parse(arguments)
        finally:
            sys.stdout.flush()  # help that nobody reads is a fault here, not at exit
        watch_starter()
        if isinstance(command, ParallelOptions) and _needs_workers(command.devices, command.device):
            sys.exit(run_workers([*WORKER, *(sys.argv[1:] if arguments is None else arguments)], command.devices))
        command.run(Console(markup=False, emoji=False, highlight=False))
    except LostProcessError as error:
        if SUPERVISED in os.environ:
            sys.exit(LOST)
        _stop(str(error))
    except ZsqError as error:
        _stop(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # the disk is full, a folder may not be written
        _stop(f"{error.filename or 'writing'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)


def _needs_workers(devices: int, device: str) -> bool:
    """Whether this process is to start those that do the work.

    Raises:
        InputError: the machine cannot hold so many, or others have been started already.
    """
    distributed.check_devices(devices, "cpu" if devices <= 1 else pick_device(device).type)
    if not distributed.launched():
        return devices > 1
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if devices not in (1, here):
        raise InputError(f"--devices is {devices} and torchrun started {here} processes here; leave --devices out.")
    return False


def _stop(text: str) -> NoReturn:
    print(f"Error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(1)


def _open_file(path: Path) -> OnnxClassifier:
    return OnnxClassifier(path / "model.onnx" if path.is_dir() else path)


def _row(name: str, found: Evaluation) -> list[str]:
    low, high = found.top1_interval
    shares = [percent(found.top1), f"{low:.2f} to {high:.2f}", percent(found.top5), percent(found.teacher_agreement)]
    return [name, *shares, str(found.top1_correct), str(found.num_images)]

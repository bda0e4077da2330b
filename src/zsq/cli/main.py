"""The command line: parse, call the library, print; one handler turns every expected fault into one line."""

import functools
import inspect
import operator
import os
import sys
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from tyro.conf import DisallowNone, FlagCreatePairsOff, PositionalMetavarFromFieldName, subcommand

from zsq.cli.allocate import Allocate
from zsq.cli.compare import Compare
from zsq.cli.doctor import Doctor
from zsq.cli.evaluate import Evaluate
from zsq.cli.export import Export
from zsq.cli.launcher import LOST, STOPPED, SUPERVISED, run_workers, watch_starter
from zsq.cli.methods import Methods
from zsq.cli.models import Models
from zsq.cli.quantize import Quantize
from zsq.cli.report import Report
from zsq.cli.synthesize import Synthesize
from zsq.errors import InputError, LostProcessError, ZsqError
from zsq.runs.console import lines_on
from zsq.runtime import distributed
from zsq.runtime.device import pick_device
from zsq.runtime.versions import versions

WORKER = (sys.executable, "-m", "zsq")
"""What starts this command line in a process of its own."""

COMMANDS: dict[str, Any] = {
    "quantize": Quantize,
    "synthesize": Synthesize,
    "evaluate": Evaluate,
    "export": Export,
    "compare": Compare,
    "allocate": Allocate,
    "report": Report,
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
        if isinstance(command, Quantize | Synthesize) and _needs_workers(command):
            words = sys.argv[1:] if arguments is None else arguments
            sys.exit(run_workers([*WORKER, *words], command.devices))
        with lines_on():
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


def _needs_workers(command: Quantize | Synthesize) -> bool:
    """Whether this process is to start those that do the work.

    Raises:
        InputError: the machine cannot hold so many, or others have been started already.
    """
    devices, device = command.devices, command.request.device
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

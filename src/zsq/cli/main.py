"""The command line: parse, call the library, print; one handler turns every expected fault into one line."""

import contextlib
import functools
import inspect
import operator
import os
import sys
import traceback
from dataclasses import replace
from typing import Annotated, Any, NoReturn

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, PositionalMetavarFromFieldName, subcommand

from zsq.cli.allocate import Allocate
from zsq.cli.compare import Compare
from zsq.cli.completion import script_of_shell
from zsq.cli.doctor import Doctor
from zsq.cli.evaluate import Evaluate
from zsq.cli.export import Export
from zsq.cli.launcher import LOST, STOPPED, run_workers, watch_starter
from zsq.cli.methods import Methods
from zsq.cli.models import Models
from zsq.cli.names import DEBUG, NAMES, SUPERVISED, VERBOSE, WRONG_USAGE, misspelled, without_anywhere
from zsq.cli.output import PlainConsole, open_streams, print_error
from zsq.cli.quantize import Quantize
from zsq.cli.report import Report
from zsq.cli.synthesize import Synthesize
from zsq.errors import InputError, LostProcessError, ZsqError, speaks_shell
from zsq.graph.trace import first_line
from zsq.runs.console import lines_on
from zsq.runs.origin import lacking, resumed
from zsq.runs.request import Request
from zsq.runtime import distributed
from zsq.runtime.device import pick_device
from zsq.runtime.memory import LESS_MEMORY, lacks_memory
from zsq.runtime.quiet import leave_stdout
from zsq.runtime.signals import kept_interrupts

WORKER = (sys.executable, "-P", "-m", "zsq")
"""What starts this command line in a process of its own, which imports nothing from the current folder by itself."""

KINDS = (Quantize, Synthesize, Evaluate, Export, Compare, Allocate, Report, Methods, Models, Doctor)

COMMANDS: dict[str, Any] = dict(zip(NAMES, KINDS, strict=True))


def _described(kind: type, with_examples: bool) -> str:
    """Return a command's docstring line by line, or its summary alone for the list of commands."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return text if with_examples else text.partition("\n\n")[0]


def parse(arguments: list[str] | None = None) -> Any:
    """Return the command that the arguments ask for, ready to run; exits 2 on wrong usage."""
    asked = (sys.argv[1:] if arguments is None else arguments)[:1]
    if error := misspelled(asked):
        print_error(str(error))
        sys.exit(WRONG_USAGE)
    forms = tuple(
        Annotated[kind, subcommand(name, description=_described(kind, with_examples=asked == [name]))]
        for name, kind in COMMANDS.items()
    )
    any_of: Any = functools.reduce(operator.or_, forms)
    return tyro.cli(
        any_of,
        prog="zsq",
        description="Quantize a trained network without any of its training data.\n\n"
        "`zsq COMMAND --help` has examples, `zsq --version` names the versions,\n"
        "`zsq --install-completion` sets up the shell. In any command, -v says more of the work,\n"
        "and --debug shows the traceback of a fault.",
        args=arguments,
        config=(FlagCreatePairsOff, DisallowNone, PositionalMetavarFromFieldName),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 1 on a fault, 2 on wrong usage."""
    with speaks_shell(), kept_interrupts():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    open_streams()
    given = sys.argv[1:] if arguments is None else arguments
    words = without_anywhere(given)
    try:
        _run(words, verbose=any(word in VERBOSE for word in given))
        sys.stdout.flush()  # a disk that is full is a fault here, not at exit
    except LostProcessError as error:
        if SUPERVISED in os.environ:
            sys.exit(LOST)
        _stop(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        leave_stdout()
        sys.exit(1)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever it is, the user gets one line
        if DEBUG in given:
            traceback.print_exc()
        if isinstance(error, OSError) and not isinstance(error, ZsqError):
            leave_stdout()
        _stop(_said(error, words))


def _run(words: list[str], *, verbose: bool) -> None:
    """Do what the words ask for, and say more of it if asked to."""
    if words == ["--install-completion"]:
        _install_completion()
        return
    try:
        command = _complete(parse(words))
    finally:
        sys.stdout.flush()  # help that nobody reads is a fault here, not at exit
    watch_starter()
    if isinstance(command, Quantize | Synthesize) and _needs_workers(command):
        sys.exit(run_workers([*WORKER, *words, *(VERBOSE[:1] if verbose else ())], command.devices))
    with lines_on(verbose=verbose):
        command.run(PlainConsole())


def _said(error: Exception, words: list[str]) -> str:
    """Return what is wrong, in one line."""
    if isinstance(error, ZsqError):
        return str(error)
    if isinstance(error, OSError):  # the disk is full, a folder may not be written
        return f"{error.filename or 'writing'}: {error.strerror or error}."
    if lacks_memory(error):
        return f"the machine has too little memory for this ({first_line(error)}); {LESS_MEMORY}."
    where = f"zsq {words[0]}" if words else "zsq"
    return (
        f"{where} met what it does not expect: {type(error).__name__}: {first_line(error)}. {DEBUG} shows where; "
        "please report it with that output and the one of zsq doctor."
    )


def _install_completion() -> None:
    """Write the completion script of the user's shell."""
    shell, path, hint = script_of_shell()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(SystemExit):
        parse(["--tyro-write-completion", shell, str(path)])
    print(f"{path}: {hint}")


def _complete(command: Any) -> Any:
    """Return a command with the folder of `--resume DIR` where it belongs; exits 2 where an argument is missing."""
    if not isinstance(command, Quantize | Synthesize | Allocate):
        return command
    request: Request = resumed(command.request)
    if reason := lacking(request):
        print_error(reason)
        sys.exit(WRONG_USAGE)
    return replace(command, request=request)  # type: ignore[arg-type]


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
    print_error(text)
    sys.exit(1)

"""The one family of faults that a user can cause and fix; the command line prints each as one line."""

import difflib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

ZIP_FAULTS = (
    OSError,
    SyntaxError,  # as numpy raises for a header that ends early
    tokenize.TokenError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)
"""What reading a damaged zip file raises: an npz, or weights."""

_FLAG = re.compile(
    r"(?P<command>\bzsq [a-z]+ .*?(?=\. |; |, or |\.?$))"  # is typed into a shell, and stays as it is
    r"|(?<![\w/-])--(?P<name>[a-z][a-z-]*)"
    r"(?:[ ](?P<value>[A-Z]+(?:x[A-Z]+)*(?![\w])|\d+|qat|ptq|cpu|random|real|zscgan"
    r"|onnxruntime|openvino|litert|executorch|tensorrt"
    r"|[a-z]+\.[a-z_]+(?:=\w+)?|\w+=[a-z]+(?:,\w+=[a-z]+)*|[^\s,;()]*/[^\s,;()]*))?"
)
"""A flag with its value, if it has one, in the text of a fault."""

_ARGUMENTS = {"from": "from_run", "set": "settings", "images": "num_images", "job-set": "job_options"}
"""Arguments that are not named as their flags are."""

_SWITCHES = ("resume", "overwrite")

_in_shell: list[bool] = []
"""As many entries as command lines are at work in this process."""


@contextmanager
def speaks_shell() -> Iterator[None]:
    """Let faults name flags, as the command line does, and not arguments of Python."""
    _in_shell.append(True)
    try:
        yield
    finally:
        _in_shell.pop()


def in_python(text: str) -> str:
    """Return a text that names flags with arguments of Python in their place; commands stay as they are.

    >>> in_python("--resume continues it, --out names another; --set method.batch_size=16 or --quantizer qat may help.")
    "resume=True continues it, out names another; settings={'method.batch_size': 16} or quantizer='qat' may help."
    >>> in_python("Run it with zsq compare a.toml --out DIR. Or give --from DIR.")
    'Run it with zsq compare a.toml --out DIR. Or give from_run=DIR.'
    """
    return _FLAG.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    """Return the argument that a flag stands for."""
    if match["command"]:
        return match["command"]
    name, value = match["name"], match["value"]
    known = _ARGUMENTS.get(name, name.replace("-", "_"))
    if name in _SWITCHES:
        return f"{known}=True" + (f", out={_literal(value)}" if value else "")
    if value is None:
        return known
    if name == "set" and "." in value:
        setting, _, to = value.partition("=")
        return f"{known}={{'{setting}': {_literal(to) if to else '...'}}}"
    return f"{known}={_literal(value)}"


def _literal(value: str) -> str:
    """Return a value as Python writes it; what is to be filled in stays."""
    return value if value.isdigit() or value.replace("x", "").isupper() else repr(value)


class ZsqError(Exception):
    """Base of every expected fault: its text says what is wrong, with the value, and what would work.

    The text names arguments of Python, and flags where the command line is at work.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if _in_shell else in_python(text)


class InputError(ZsqError, ValueError):
    """An argument, setting, recipe, file or data set does not fit."""


class TeacherError(InputError):
    """A network or its weights cannot serve as the teacher."""


class NumericsError(ZsqError, ArithmeticError):
    """A loss or statistic is no longer finite; the run stops where it happened."""


class ExportError(ZsqError, RuntimeError):
    """An exported file does not compute what the simulation computes."""


class StorageError(ZsqError, OSError):
    """A file cannot be written: the disk is full, or the folder takes no files."""


class LostProcessError(ZsqError, RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


class MissingExtraError(ZsqError, ImportError):
    """An optional library is not installed; the text names the extra that brings it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a mistyped name, quoting the nearest known one.

    >>> print(unknown_name("method", "zs-cgan", ["noise", "zscgan"]))
    Unknown method 'zs-cgan'. Did you mean 'zscgan'? Known: noise, zscgan.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return InputError(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")

"""The one family of faults that a user can cause and fix; the command line prints each as one line."""

import difflib
from collections.abc import Iterable


class ZsqError(Exception):
    """Base of every expected fault: its text says what is wrong, with the value, and what would work."""


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

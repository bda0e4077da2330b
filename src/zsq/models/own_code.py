"""The user's own Python: a function of a file or of an installed module."""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from zsq.errors import TeacherError, unknown_name
from zsq.graph.trace import FOREIGN_FAULTS, first_line

Loaded = TypeVar("Loaded")


def own_function(place: str, name: str, what: str) -> Callable[..., Any]:
    """Return a function by its name.

    Args:
        place: `path/to/file.py` or `package.module`.
        name: of the function there.
        what: it is called in errors, such as "factory".

    Raises:
        InputError: there is none of this name.
        TeacherError: the file is not there, or does not import.
    """
    module = _file_module(Path(place)) if place.endswith(".py") else _named_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"{what} of {place}", name, own)
    found: Callable[..., Any] = function
    return found


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise TeacherError(f"no such file: {path}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"zsq_model_{path.stem}_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    loader = spec.loader
    _import(lambda: loader.exec_module(module), str(path), path.resolve().parent)
    return module


def _named_module(name: str) -> ModuleType:
    return _import(lambda: importlib.import_module(name), name, Path.cwd())


def _import(load: Callable[[], Loaded], name: str, folder: Path) -> Loaded:
    try:
        with _importing_from(folder):
            return load()
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"{name} does not import: {first_line(error)}") from error


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))

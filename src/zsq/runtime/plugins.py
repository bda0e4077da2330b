"""Classes that other packages add to zsq's own, found through entry points and checked before they are used."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib import metadata
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from zsq.errors import InputError


class Registry(Mapping[str, Any]):
    """Classes by name: zsq's own, then those that installed packages register.

    A package registers a class under its name in its pyproject.toml::

        [project.entry-points."zsq.methods"]
        toy = "zsq_toy:Toy"

    Entry points are read on first use, which takes milliseconds. A package is imported only when its class is asked for
    or the registry is iterated over. Iteration leaves out a class that cannot be used, with one warning in the log of
    `group`. Asking for such a class by name, be it with `[]`, `in` or `get`, raises InputError.

    Args:
        group: entry point group, and name of the logger.
        kind: what a class is called in messages, such as `method`.
        base: the class from which each is derived.
        own: zsq's own classes, each with a `name`. A plugin cannot replace them.

    Raises:
        InputError: a class that was asked for by name cannot be used; the message says why.
    """

    def __init__(self, group: str, *, kind: str, base: type, own: Iterable[Any]) -> None:
        self.group, self.kind, self.base = group, kind, base
        self._own: dict[str, Any] = {found.name: found for found in own}
        self._usable: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._warned: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        entries = self._entries
        if name in self._own:
            return self._own[name]
        self._load(entries[name])
        if name in self._faults:
            raise InputError(self._faults[name])
        return self._usable[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        for name, entry in sorted(self._entries.items()):
            self._load(entry)
            if name in self._usable:
                yield name
            else:
                self._warn(self._faults[name])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def _entries(self) -> dict[str, metadata.EntryPoint]:
        """Entry points by name, without those that take the name of one of zsq's own classes."""
        try:
            found = metadata.entry_points(group=self.group)
        except Exception as error:  # noqa: BLE001 - one damaged package, of whatever purpose, must not stop zsq
            self._warn(f"Plugins are ignored: the entry points of an installed package are damaged: {_told(error)}.")
            return {}
        entries: dict[str, metadata.EntryPoint] = {}
        for entry in found:
            if entry.name in self._own:
                self._warn(f"{self._subject(entry)} is ignored: zsq has a {self.kind} of that name.")
            elif entry.name in entries:
                other = _package(entries[entry.name])
                self._faults[entry.name] = f"{self._subject(entry)} cannot be used: {other} registers it, too."
            else:
                entries[entry.name] = entry
        return entries

    def _load(self, entry: metadata.EntryPoint) -> None:
        """Import a class unless that was done before, and note that it is usable, or why not."""
        if entry.name in self._usable or entry.name in self._faults:
            return
        try:
            found = entry.load()
            fault = next(_faults(found, entry.name, self.base), None)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the package's code does on import
            fault = f"loading {entry.value} raises {_told(error)}"
        if fault is None:
            self._usable[entry.name] = found
        else:
            self._faults[entry.name] = f"{self._subject(entry)} cannot be used: {fault}."

    def _subject(self, entry: metadata.EntryPoint) -> str:
        return f"{self.kind.capitalize()} '{entry.name}' of {_package(entry)}"

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logging.getLogger(self.group).warning("%s", text)


def _faults(found: Any, name: str, base: type) -> Iterator[str]:
    """Yield why an object cannot serve as the class of that name."""
    parameters = getattr(found, "__dataclass_params__", None)
    if not isinstance(found, type) or parameters is None or not parameters.frozen:
        yield f"{found!r} is not a frozen dataclass"
        return
    if not issubclass(found, base):
        yield f"{found.__name__} is no subclass of {base.__module__}.{base.__name__}"
        return
    for member, hint in get_type_hints(base).items():
        if get_origin(hint) is ClassVar:
            yield from _value_faults(found, member, get_args(hint)[0])
    for member in sorted(getattr(base, "__abstractmethods__", ())):
        yield from _call_faults(found, member, getattr(base, member))
    if found.name != name:  # type: ignore[attr-defined]
        yield f"{found.__name__}.name is '{found.name}', not '{name}'"  # type: ignore[attr-defined]


def _value_faults(found: type, member: str, hint: Any) -> Iterator[str]:
    if not hasattr(found, member):
        yield f"{found.__name__} has no '{member}'"
        return
    value = getattr(found, member)
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        yield f"{found.__name__}.{member} is {value!r}: {error.errors()[0]['msg']}"


def _call_faults(found: type, member: str, wanted: Callable[..., Any]) -> Iterator[str]:
    method = getattr(found, member)
    if not callable(method) or method is wanted:
        yield f"{found.__name__} has no method '{member}'"
        return
    parameters = inspect.signature(wanted).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    placed = [p.name for p in parameters if p.name not in named]
    try:
        inspect.signature(method).bind(*placed, **dict.fromkeys(named))
    except TypeError as error:
        call = ", ".join([*placed[1:], *(f"{name}=..." for name in named)])
        yield f"{found.__name__} cannot be called as {member}({call}): {error}"


def _package(entry: metadata.EntryPoint) -> str:
    """Return name and version of the package that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _told(error: BaseException) -> str:
    """Return an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())

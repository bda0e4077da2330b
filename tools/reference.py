"""Write the reference pages of the documentation from the code: command line, settings, Python, record.

    python tools/reference.py [--check]

`--check` writes nothing and fails where a committed page is stale.
"""

import argparse
import contextlib
import inspect
import io
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal
from unittest import mock

from zsq.runs.docstrings import field_texts
from zsq.runs.record import Record

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
WIDTH = 80
"""Columns of the help texts."""

DRAWN = re.compile(r"[\s\u2500-\u257f]+")
"""Spaces and lines of boxes: how a help text is laid out, which a release of tyro may change."""

NOTE = "<!-- Written by tools/reference.py: change the code, then run `make docs`. -->\n"


def command_line() -> str:
    """Return the help of each command."""
    from zsq.cli import main

    parts = [
        "# Command line",
        "What `zsq COMMAND --help` prints. `zsq --version` names the versions of zsq and what it runs on.",
        _block("text", _help([])),
    ]
    for name in main.COMMANDS:
        parts += [f"## zsq {name}", _block("text", _help([name]))]
    return _page(parts)


def settings() -> str:
    """Return a table of settings for each method and quantizer."""
    from zsq.methods import METHODS
    from zsq.quantization import QUANTIZERS

    parts = [
        "# Settings",
        "`--set method.NAME=VALUE` and `--set quantizer.NAME=VALUE` change one setting, and a recipe holds them as "
        "tables `[method]` and `[quantizer]`. `zsq methods NAME` prints the same list. Each method has a "
        "[page of its own](../methods/index.md) with equations and the source of each default.",
    ]
    for section, known in (("method", METHODS), ("quantizer", QUANTIZERS)):
        parts.append(f"## {section.capitalize()}s")
        for name, kind in known.items():
            parts += [f"### {name}", _summary(kind), _settings_table(section, kind)]
    return _page(parts)


def python() -> str:
    """Return signature and docstring of every public name."""
    import zsq

    groups: dict[str, list[tuple[str, Any]]] = {
        "Functions": [],
        "Classes": [],
        "Methods and quantizers": [],
        "Errors": [],
        "Constants": [],
    }
    settings_of_runs = {*zsq.METHODS.values(), zsq.PTQ, zsq.QAT}
    for name in sorted(zsq.__all__, key=str.lower):
        value = getattr(zsq, name)
        if not inspect.isclass(value):
            group = "Functions" if callable(value) else "Constants"
        elif issubclass(value, Exception):
            group = "Errors"
        else:
            group = "Methods and quantizers" if value in settings_of_runs else "Classes"
        groups[group].append((name, value))
    parts = ["# Python", "`import zsq` gives these names. Everything else is internal and may change."]
    for title, members in groups.items():
        parts.append(f"## {title}")
        if title == "Methods and quantizers":
            parts.append("Settings as objects; fields and defaults are in [Settings](settings.md).")
            parts.append(_table(("name", "what it does"), [(f"`{name}`", _summary(kind)) for name, kind in members]))
        elif title == "Errors":
            errors = [(f"`{name}`", f"`{kind.__mro__[1].__name__}`", _summary(kind)) for name, kind in members]
            parts.append(_table(("name", "base", "raised when"), errors))
        elif title == "Constants":
            rows = [(f"`{name}`", f"`{type(value).__name__}`: {', '.join(map(str, value))}") for name, value in members]
            parts.append(_table(("name", "holds"), rows))
        else:
            for name, value in members:
                parts += _member(name, value)
    return _page(parts)


def record() -> str:
    """Return the keys of `result.json`."""
    kind: Any = Record
    parts = ["# Record", "`result.json` holds one object with these keys.", f"## {kind.__name__}", _summary(kind)]
    waiting, seen = [kind], {kind}
    while waiting:
        current = waiting.pop(0)
        if current is not kind:
            parts += [f"## {current.__name__}", _summary(current)]
        rows = []
        for name, hint, text in _keys(current):
            rows.append((f"`{name}`", _alternatives(_type_name(hint)), text))
            found = [part for part in _parts(hint) if _has_keys(part) and part not in seen]
            waiting += found
            seen.update(found)
        parts.append(_table(("key", "type", "what it is"), rows))
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": command_line,
    "settings.md": settings,
    "python.md": python,
    "record.md": record,
}


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {name: make() for name, make in PAGES.items()}


def stale() -> list[str]:
    """Return the names of committed pages that no longer say what the code says; layout alone does not count."""

    def held(path: Path) -> str:
        return DRAWN.sub(" ", path.read_text()) if path.exists() else ""

    return [name for name, text in pages().items() if held(FOLDER / name) != DRAWN.sub(" ", text)]


def _help(arguments: list[str]) -> str:
    """Return what `zsq ... --help` prints, without colours."""
    from zsq.cli import main

    text = io.StringIO()
    environment = {"COLUMNS": str(WIDTH), "LINES": "1000", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        main.parse([*arguments, "--help"])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _member(name: str, value: Any) -> Iterator[str]:
    """Yield heading, signature and docstring of a function or class, and a class's own members."""
    yield f"### {name}"
    signature = _signature(name, value)
    if signature:
        yield _block("py", signature)
    if not _is_synthetic_docstring(name, value):
        yield _docstring(value)
    if not inspect.isclass(value):
        return
    if is_dataclass(value):
        texts = field_texts(value)
        hints = typing.get_type_hints(value, include_extras=False)
        rows = [(f"`{f.name}`", _alternatives(_type_name(hints[f.name])), texts.get(f.name, "")) for f in fields(value)]
        yield _table(("field", "type", "what it is"), rows)
    found = []
    for member_name, member in vars(value).items():
        if member_name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        text = inspect.cleandoc(inspect.getdoc(member) or "").partition("\n\n")[0]
        shown = member_name if isinstance(member, property) else f"{member_name}{_parameters(member)}"
        found.append((f"`{shown}`", " ".join(text.split())))
    if found:
        yield _table(("member", "what it does"), found)


def _is_synthetic_docstring(name: str, value: Any) -> bool:
    """Whether a docstring is the signature that `dataclass` writes where there is none."""
    return (inspect.getdoc(value) or "").startswith(f"{name}(")


def _signature(name: str, value: Any) -> str:
    if getattr(value, "_is_protocol", False):
        return ""
    try:
        signature = inspect.signature(value, eval_str=True)
    except ValueError:
        return ""
    lines, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("*,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {_type_name(parameter.annotation)}{default},")
    returned = signature.return_annotation
    end = "" if inspect.isclass(value) or returned is signature.empty else f" -> {_type_name(returned)}"
    one_line = f"zsq.{name}({' '.join(lines).rstrip(',')}){end}"
    if len(one_line) <= 88:
        return one_line
    return "\n".join([f"zsq.{name}(", *(f"    {line}" for line in lines), f"){end}"])


def _parameters(function: Any) -> str:
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return f"({', '.join(names)})"


def _docstring(value: Any) -> str:
    """Return a docstring as Markdown: sections of Google's style become lists."""
    lines = inspect.cleandoc(inspect.getdoc(value) or "").splitlines()
    result: list[str] = []
    section = ""
    for line in lines:
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            section = line[:-1]
            result += ["", f"**{'Arguments' if section == 'Args' else section}**", ""]
        elif not line.strip():
            result.append("")
        elif section and line.startswith("    "):
            entry = re.match(r"    (\S[^:]*): (.*)", line)
            if section == "Returns" or not entry or line.startswith("     "):
                result.append(f"  {line.strip()}" if section != "Returns" else line.strip())
            else:
                names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
                result.append(f"- {names}: {entry[2]}")
        else:
            section = ""
            result.append(line)
    return "\n".join(result).replace("``", "`")


def _settings_table(section: str, kind: type) -> str:
    texts = field_texts(kind)
    hints = typing.get_type_hints(kind)
    rows = []
    for field in fields(kind):
        value = field.default
        default = "" if value is MISSING else "none" if value is None else str(value) or '""'
        kind_of_value = _type_name(hints[field.name]).replace("'", "")
        names = f"`{section}.{field.name}`", _alternatives(kind_of_value)
        rows.append((*names, default and f"`{default}`", texts.get(field.name, "")))
    return _table(("setting", "type", "default", "what it does"), rows)


def _keys(kind: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield name, type and description of each key that a dataclass writes: fields that it shows, then properties."""
    texts, hints = field_texts(kind), typing.get_type_hints(kind)
    for field in fields(kind):
        if field.repr:  # others are not written
            yield field.name, hints[field.name], texts.get(field.name, "")
    for name, member in vars(kind).items():
        if isinstance(member, property):
            hint = typing.get_type_hints(member.fget)["return"]
            yield name, hint, inspect.cleandoc(member.__doc__ or "").partition("\n\n")[0]


def _has_keys(kind: Any) -> bool:
    return inspect.isclass(kind) and is_dataclass(kind)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def _type_name(hint: Any) -> str:
    """Return a type as a user writes it, without modules."""
    if hint is NoneType:
        return "None"
    if typing.get_origin(hint) is Literal:
        return " | ".join(repr(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return _type_name(typing.get_args(hint)[0])
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " | ".join(_type_name(inner) for inner in arguments)
    return _clean(hint.__name__ if inspect.isclass(hint) and not arguments else str(hint))


def _alternatives(type_name: str) -> str:
    """Return a type for a table, where a bar would end the cell: `int` or `None`."""
    parts = [""]
    for piece in type_name.split(" | "):
        opened = parts[-1].count("[") - parts[-1].count("]")
        if opened:
            parts[-1] += f" or {piece}"
        else:
            parts.append(piece)
    return " or ".join(f"`{part}`" for part in parts[1:])


def _clean(text: str) -> str:
    """Leave out the modules of names, and quotes around whole annotations."""
    return re.sub(r"\b(?:[a-z_][a-z_0-9]*\.)+(?=[A-Za-z])", "", text)


def _summary(kind: type) -> str:
    doc = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return "" if doc.startswith(f"{kind.__name__}(") else " ".join(doc.split())


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    cells = [[cell.replace("|", "\\|").replace("``", "`") for cell in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _page(parts: list[str]) -> str:
    text = "\n\n".join([*parts[:1], NOTE.strip(), *(part.strip("\n") for part in parts[1:] if part.strip())])
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a page is stale")
    if parser.parse_args().check:
        if found := stale():
            raise SystemExit(f"Stale: {', '.join(found)} in docs/reference; run make docs.")
        return
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()

"""What stands below the fields of a dataclass: the help of commands and settings is made of it."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any


def field_texts(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, by its name; inherited ones included."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in ("builtins", "typing", "abc"):
            texts |= _own_texts(base)
    return texts


def settings_of(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and docstring of each setting of a method or quantizer."""
    texts = field_texts(kind)
    for field in fields(kind):
        default: Any = "" if field.default is MISSING else field.default
        yield field.name, "none" if default is None else str(default), texts.get(field.name, "")


def _own_texts(kind: type) -> dict[str, str]:
    """Return the string that stands below each annotated name of a class; none where its source cannot be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for above, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and is_text:
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[above.target.id] = " ".join(str(below.value.value).split())
    return texts

"""Settings that check themselves: each field's type says what values it takes, whoever makes the object."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from os import PathLike
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from zsq.errors import InputError


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, (int, float, PathLike)) else value


Text = Annotated[str, BeforeValidator(_as_text)]
"""Text; a number or a path is read as its text."""
Made = TypeVar("Made")

UNION_TAGS = ("constrained-", "literal[")
"""How pydantic names the members of a union among the places of an error."""

LARGEST = 1e30
"""Largest number that a rate, a factor or a temperature may be: far above what makes sense, and a float32 still."""

MANY = 10**9
"""Largest count."""

Count = Annotated[int, Field(ge=1, le=MANY)]
CountOrZero = Annotated[int, Field(ge=0, le=MANY)]
BatchSize = Annotated[int, Field(ge=2, le=MANY, description="batch statistics need at least 2 images")]
Width = Annotated[int, Field(ge=2, le=8, description="widths from 2 to 8 work")]
"""Bits of an integer."""
Factor = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
"""Of a loss, which 0 leaves out; or of a standard deviation."""
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
AtLeastOne = Annotated[float, Field(ge=1, le=LARGEST, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

OUTSIDE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Pydantic's names of the faults of a value of the right kind outside of its range."""


def validated(kind: type[Made], values: Mapping[str, Any], place: str) -> Made:
    """Return a dataclass made of what a file says, each value of its field's type; keys that it lacks are left out.

    Args:
        kind: the dataclass.
        values: by the names of its fields.
        place: file and part of it, for the error.

    Raises:
        InputError: a value is missing or of another type, or the object refuses them.
    """
    try:
        made: Made = _adapter(kind).validate_python(dict(values))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise InputError(f"{place}: {where}{first['msg'].removeprefix('Value error, ').rstrip('.')}.") from error
    return made


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class Checked:
    """Base of frozen dataclasses of settings, whose fields are converted to their types and checked when made.

    Raises:
        InputError: a value is of another kind or out of range, such as ``method.steps is -1; it must be at least 0.``
    """

    __slots__ = ()

    section: ClassVar[str]
    """Table of a recipe in which the settings stand, which errors name in front of a setting."""

    def __post_init__(self) -> None:
        for name, (hint, adapter) in _fields(type(self)).items():  # type: ignore[arg-type]
            try:
                value = adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                raise InputError(_said(f"{self.section}.{name}", hint, error)) from error
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Check what concerns several fields, or what a type cannot say."""


@cache
def _fields(kind: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Return type and validator of each field."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: (hints[field.name], TypeAdapter(hints[field.name])) for field in fields(kind)}


def _said(where: str, hint: Any, error: ValidationError) -> str:
    """Return what is wrong with a value, and what would work."""
    first = error.errors()[0]
    value = first["input"]
    where = ".".join([where, *(str(part) for part in first["loc"] if not str(part).startswith(UNION_TAGS))])
    if first["type"] == "finite_number" or (isinstance(value, float) and not math.isfinite(value)):
        return f"{where} is {value}; a finite number is expected."
    if first["type"] in OUTSIDE:
        return f"{where} is {value}; {_range(hint, too_large=first['type'].startswith('less'))}."
    return f"{where} is {value!r}: {first['msg']}."


def _range(hint: Any, *, too_large: bool) -> str:
    """Return what the limits of a type are; it may stand in a union or be that of a dictionary's values."""
    limited = _limited(hint)
    assert limited is not None
    given: dict[str, float] = {}
    for limit in limited.metadata:
        if isinstance(limit, (Ge, Gt, Le, Lt)):
            given |= asdict(limit)
    if given.get("le") in (LARGEST, MANY):  # a bound against overflow, which says nothing of what is too small
        most = given.pop("le")
        if too_large:
            return f"it must be at most {most:g}"
    if limited.description is not None:
        return limited.description
    if "le" in given or "lt" in given:
        low = f"[{given['ge']}" if "ge" in given else f"({given['gt']}"
        high = f"{given['le']}]" if "le" in given else f"{given['lt']})"
        return f"it must lie in {low}, {high}"
    if "ge" in given:
        return f"it must be at least {given['ge']}"
    return f"it must be above {given['gt']}"


def _limited(hint: Any) -> FieldInfo | None:
    """Return the limits that stand in a type."""
    for part in get_args(hint):
        found = part if isinstance(part, FieldInfo) else _limited(part)
        if found is not None:
            return found
    return None

"""How fields of requests look on the command line; the fields themselves are declared once, where they belong."""

from collections.abc import Callable
from typing import Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from zsq.errors import InputError, ZsqError


def option(metavar: str, *, name: str | None = None, required: bool = False) -> Any:
    """Describe an option: its placeholder in the help, and its name where it is not the field's.

    Args:
        metavar: such as `FILE`.
        name: such as `from`.
        required: show that it must be given; one that may be left out shows no "None" as its default.
    """
    return arg(name=name, metavar=metavar, help_behavior_hint=None if required else "")


def text(metavar: str, read: Callable[[str], Any] = str) -> Any:
    """Describe an option whose field takes more kinds of values than a text from which one of them is read.

    Args:
        metavar: such as `CxHxW`.
        read: raises InputError where the text does not do.
    """

    def value(texts: list[str]) -> Any:
        try:
            return read(texts[0])
        except InputError as error:
            raise ZsqError(str(error)) from error  # a ValueError would be told in the parser's own words

    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=value, is_instance=_anything, str_from_instance=_texts
    )


def _anything(instance: Any) -> bool:
    del instance
    return True


def _texts(instance: Any) -> list[str]:
    return [str(instance)]

"""Text of names that others have chosen, shown so that a terminal does nothing with it."""

import unicodedata

STEERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows."""

ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that are shown as Python writes them: control, halves of pairs, separators of lines."""


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return a text in which what steers a terminal is written out.

    >>> printable("a\x1b[31m.png")
    'a\\x1b[31m.png'
    """
    return "".join(character if character in keep else _shown(character) for character in text)


def _shown(character: str) -> str:
    if character in STEERING or unicodedata.category(character) in ESCAPED:
        return character.encode("unicode_escape").decode()
    return character

"""What is known of the command line before anything is imported that takes time: commands, statuses, markers."""

from zsq.errors import InputError, unknown_name

NAMES = (
    "quantize",
    "synthesize",
    "evaluate",
    "export",
    "compare",
    "allocate",
    "report",
    "methods",
    "models",
    "doctor",
)

DEBUG, VERBOSE = "--debug", ("-v", "--verbose")
"""Words that may stand anywhere in the command line: show the traceback of a fault; say more of the work."""

SUPERVISED = "ZSQ_SUPERVISED"
"""Variable of the environment that processes of `--devices` have."""

WRONG_USAGE = 2
"""Exit status where arguments are missing or unknown."""


def without_anywhere(words: list[str]) -> list[str]:
    """Return the command line without the words that may stand anywhere.

    >>> without_anywhere(["quantize", "-v", "digits", "--debug"])
    ['quantize', 'digits']
    """
    return [word for word in words if word != DEBUG and word not in VERBOSE]


def misspelled(words: list[str]) -> InputError | None:
    """Return the error where the first word is no command.

    >>> print(misspelled(["quantise", "digits"]))  # doctest: +ELLIPSIS
    Unknown command 'quantise'. Did you mean 'quantize'? Known: allocate, ...
    """
    if not words or words[0].startswith("-") or words[0] in NAMES:
        return None
    return unknown_name("command", words[0], NAMES)

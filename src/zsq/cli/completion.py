"""Completion of the command line in a shell: where its script goes."""

import os
from pathlib import Path

from zsq.errors import InputError

PLACES = {
    "bash": (".local/share/bash-completion/completions/zsq", "new shells complete zsq, where bash-completion is there"),
    "zsh": (
        ".zfunc/_zsq",
        "new shells complete zsq once ~/.zshrc has: fpath+=~/.zfunc; autoload -U compinit; compinit",
    ),
}
"""File of each shell below the home folder, and what to say of it."""


def script_of_shell() -> tuple[str, Path, str]:
    """Return the user's shell, the file of its script, and what to say once it is written.

    Raises:
        InputError: the shell is another one.
    """
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in PLACES:
        raise InputError(
            f"the shell is '{shell or 'unknown'}', and completion is for {' and '.join(PLACES)}; zsq "
            "--tyro-print-completion SHELL prints its script."
        )
    place, hint = PLACES[shell]
    return shell, Path.home() / place, hint

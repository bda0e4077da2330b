"""What a user may choose of a file beside its target."""

from dataclasses import dataclass

from zsq.export.pixels import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Form of a file's input and of what it stores."""

    pixels: Layout | None = None
    """Layout of the uint8 pixels that it takes; None for normalised images."""
    batch: int | None = None
    """Images that it takes at once; None for any number."""
    packed: bool = False
    """Whether weights of 4 bits or fewer lie two to a byte, where the target's file can hold them so."""


PLAIN = FileOptions()
"""Normalised images, any number of them, one weight a byte."""

"""Image files, opened as nothing else and no larger than a bound."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may read, whatever a file is named: others start programs (EPS: Ghostscript) or open URLs."""

READ_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for a file that is no readable image."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Yield a file as Pillow opens it, in one of `FORMATS`.

    Raises:
        OSError: it is no file (pipes and devices are none), or of another format.
        DecompressionBombWarning, DecompressionBombError: it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not path.is_file():
        raise OSError("it is no regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is damaged
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as file:
            yield file

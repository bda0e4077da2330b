"""The note of what a file takes and gives: its `ImageSpec` as JSON."""

import json
from dataclasses import asdict
from typing import Any

from zsq.types import ImageSpec

KEY = "image_spec"
"""Name of the metadata of an ONNX file that holds the note, and of the file in a pt2 archive but for its ending."""


def to_json(spec: ImageSpec) -> str:
    """Return the note."""
    return json.dumps(asdict(spec), sort_keys=True)


def from_json(text: str) -> ImageSpec:
    """Return what a note says."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    return ImageSpec(**values)

"""Hashes of what results depend on: they decide which cells and fits of a folder are run again."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from zsq.comparison.recipe import Cell
from zsq.models.teacher import Teacher
from zsq.runs.settings import to_tables

ELSEWHERE = ("label", "title", "source", "real", "bits", "quantizer", "methods")
"""What a recipe says of a teacher that changes no result, or stands in the settings of a cell."""

LATER = ("measure", "decode")
"""Keys that older folders do not know: unsaid, they change no hash, so that finished cells stay finished."""


def digest(cell: Cell) -> str:
    """Return the hash of all that the recipe says of a cell's result; titles, and where data lies, are not part."""
    said = asdict(cell.teacher)
    entry = {key: said[key] for key in said if key not in ELSEWHERE and not (key in LATER and said[key] is None)}
    content: dict[str, Any] = {"teacher": entry, "seed": cell.seed, **_fit_content(cell)}
    content["quantizer"] = to_tables(cell.settings)["quantizer"] if cell.quantizer else None
    return _sha256(content)


def fit_digest(cell: Cell, teacher: Teacher) -> str:
    """Return the hash of all that a fit depends on."""
    facts = {"weights_sha256": teacher.weights_sha256, **asdict(teacher.spec)}
    return _sha256({"teacher": facts, "seed": cell.seed, **_fit_content(cell)})


def _fit_content(cell: Cell) -> dict[str, Any]:
    """Return the method's settings, and the distillation that its schedule spans where it has one."""
    learns = bool(cell.settings.method.steps)
    return {
        "method": to_tables(cell.settings)["method"],
        "distill_steps": cell.fit_settings.distill_steps if learns else 0,
    }


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Lines of `cells.jsonl`: what is known of a cell that was run, or why it was skipped."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from zsq.comparison.digests import digest
from zsq.comparison.recipe import Cell
from zsq.runtime.checksums import sealed_values, unsealed_values
from zsq.runtime.files import writing

logger = logging.getLogger(__name__)

Status = Literal["finished", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A cell with a checked and evaluated file; shares are in percent."""

    status: ClassVar[Status] = "finished"

    model: str
    weights: str
    weights_sha256: str
    data_free: bool
    """Whether no real image was used."""
    data: str | None
    """Data set on which accuracy was measured."""
    activation_scope: str
    range_rule: str
    measure: str
    """What scores say: `top-1`, or what suits the network's outputs (`scores_of`)."""
    float_score: float
    score: float
    """Of the file in its runtime."""
    teacher_agreement: float | None
    """How far file and teacher agree on `data`: images for which they name the same class."""
    runtime_agreement: float
    """How far file and simulation agree."""
    label_recognition: float | None
    """Samples of which the teacher recognises the wanted label; None where no label is asked for."""
    samples: dict[str, Any] | None = None
    """Agreement of file and teacher on fresh samples; None where the method makes none."""
    num_eval_images: int
    num_calibration_images: int
    seconds: float
    """Wall clock of the cell without its fit."""
    settings: dict[str, dict[str, Any]]
    versions: dict[str, str]
    interval: tuple[float, float] | None
    """95 % interval of `score`, about other images; None where the measure is no mean over images."""
    fit_seconds: float
    """Wall clock of the fit, which all cells that share it pay once."""
    resumed: bool
    """Whether the cell or its fit was stopped and continued, so that the seconds are not all."""
    model_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A cell with a picture of samples."""

    status: ClassVar[Status] = "finished"

    weights_sha256: str
    figure: str
    """The picture's path, relative to the comparison's folder."""
    fit_seconds: float
    resumed: bool
    label_recognition: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A cell that cannot be run, or that failed."""

    status: ClassVar[Status] = "skipped"

    reason: str


Outcome = Quantized | Drawn | Skipped
"""What came of a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellLine:
    """One line: which cell it is of, by what settings, and what came of it."""

    cell: str
    """Its name."""
    teacher: str
    method: str
    quantizer: str | None
    """Label of the quantizer; None where samples are drawn."""
    bits: str | None
    seed: int
    digest: str
    """Hash of what the recipe said of the result; where it says something else now, the line does not count."""
    outcome: Outcome

    @classmethod
    def of(cls, cell: Cell, outcome: Outcome) -> "CellLine":
        """Return the line of a cell by the settings that it has now."""
        return cls(
            cell=cell.name,
            teacher=cell.teacher.label,
            method=cell.method.label,
            quantizer=cell.quantizer.label if cell.quantizer else None,
            bits=cell.bits or None,
            seed=cell.seed,
            digest=digest(cell),
            outcome=outcome,
        )

    @classmethod
    def from_json(cls, text: str) -> "CellLine":
        """Return the line that `to_json` gave; keys that are not known are left out.

        Raises:
            ValueError: it is no JSON object, not what was written, a key is missing, or a value is of the wrong kind.
        """
        try:
            read = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply.") from error
        values = unsealed_values(read) if isinstance(read, dict) else {}
        if values is None:
            raise ValueError("its content does not match its checksum.")
        status = values.get("status")
        if status not in ("finished", "skipped"):
            raise ValueError(f"status is {status!r}; finished and skipped are known.")
        kind = "skipped" if status == "skipped" else "drawn" if "figure" in values else "quantized"
        values = renamed(values)
        return _LINE.validate_python({**values, "outcome": _OUTCOMES[kind].validate_python(values)})

    @property
    def status(self) -> Status:
        """Whether the cell is finished or was skipped."""
        return self.outcome.status

    @property
    def reason(self) -> str:
        """Why the cell was skipped; empty if it is finished."""
        return self.outcome.reason if isinstance(self.outcome, Skipped) else ""

    def as_dict(self) -> dict[str, Any]:
        """Return the line as plain values, flat."""
        values = asdict(self)
        outcome = values.pop("outcome")
        if isinstance(self.outcome, Quantized) and self.outcome.interval is not None:
            outcome["interval"] = list(self.outcome.interval)
        return {**values, "status": self.status, **outcome}

    def to_json(self) -> str:
        """Return the line as one JSON object, with its checksum."""
        return json.dumps(sealed_values(self.as_dict()))


NAMES_OF_0_2 = {"float_top1": "float_score", "quantized_top1": "score", "top1_interval": "interval"}

_LINE = TypeAdapter(CellLine)
_OUTCOMES: dict[str, TypeAdapter[Any]] = {
    "quantized": TypeAdapter(Quantized),
    "drawn": TypeAdapter(Drawn),
    "skipped": TypeAdapter(Skipped),
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's values by the names of now: lines of zsq 0.2 knew top-1 alone, and are still read."""
    found = {NAMES_OF_0_2.get(key, key): value for key, value in values.items()}
    return found if found.keys() == values.keys() else {"measure": "top-1", **found}


def read_lines(path: Path) -> dict[str, CellLine]:
    """Return the latest line of each cell, by its name; a damaged one, or one that a kill cut short, does not count."""
    found: dict[str, CellLine] = {}
    damaged = 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        if not text.strip():
            continue
        try:
            line = CellLine.from_json(text)
        except ValueError:
            damaged += 1
            continue
        found[line.cell] = line
    if damaged:
        logger.warning(f"{damaged} lines of {path} are damaged or cut short; their cells are run again")
    return found


def append_line(path: Path, line: CellLine) -> None:
    """Write one line at the end, on a line of its own also where a kill cut the last one short."""
    with writing(path):
        cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_short + line.to_json() + "\n")

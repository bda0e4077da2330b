"""Dated lines of what a benchmark measured."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zsq.runtime.versions import versions

RESULTS = Path(__file__).parent / "results"


def append(name: str, measured: dict[str, Any], results: Path = RESULTS) -> dict[str, Any]:
    """Print a record with date, machine and versions, append it to NAME.jsonl in the folder, and return it."""
    record = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine(), **measured, **versions()}
    line = json.dumps(record)
    print(line)
    results.mkdir(exist_ok=True)
    with open(results / f"{name}.jsonl", "a") as file:
        file.write(line + "\n")
    return record

"""Dated lines of what a benchmark measured."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zsq.runs import versions


def append(name: str, measured: dict[str, Any]) -> None:
    """Print a record with date, machine and versions, and append it to benchmarks/results/NAME.jsonl."""
    record = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine(), **measured, **versions()}
    line = json.dumps(record)
    print(line)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    with open(results / f"{name}.jsonl", "a") as file:
        file.write(line + "\n")

"""What checkpoints cost at their default interval of 30 seconds: the seconds of one, and the share of a run's time.

    python benchmarks/checkpoints.py

Saves and loads the state of a generator and of a student in distillation, which holds the generator's too. Appends a
dated line to benchmarks/results/checkpoints.jsonl.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from parts import NETWORKS, Feed, distiller_of, one_batch, random_teacher, source_of
from records import append
from timing import hardware

from zsq.training import Learner, load_tensors, save_tensors

INTERVAL = 30.0
"""Seconds between checkpoints, as in `zsq.training`."""

ROUNDS = 7


def cost(learner: Learner, path: Path) -> dict[str, float]:
    """Return the milliseconds of a save and of a load, their share of the interval, and the file's size."""
    saves, loads = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        save_tensors(path, learner.state_dict(), {"step": "1"})
        saves.append(time.perf_counter() - start)
        start = time.perf_counter()
        learner.load_state_dict(load_tensors(path)[0])
        loads.append(time.perf_counter() - start)
    save = statistics.median(saves)
    return {
        "save_ms": round(1e3 * save, 2),
        "load_ms": round(1e3 * statistics.median(loads), 2),
        "MiB": round(path.stat().st_size / 2**20, 2),
        "percent_of_time": round(100 * save / INTERVAL, 3),
    }


def main() -> None:
    """Measure and record."""
    device, found = torch.device("cpu"), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            teacher = random_teacher(network, device)
            source = source_of(teacher, 4, device)
            distiller = distiller_of(teacher, Feed(one_batch(source), source), device, "learnable")
            distiller.step(0)  # so that the optimizers have moments
            distiller.source = source  # whose state a run's checkpoint holds
            for phase, learner in (("fit", source), ("distill", distiller)):
                found[f"{network} {phase}"] = cost(learner, Path(folder) / "checkpoint.safetensors")
    append("checkpoints", {**hardware(device), "interval_seconds": INTERVAL, "checkpoints": found})


if __name__ == "__main__":
    main()

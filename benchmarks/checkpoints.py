"""What checkpoints cost at their default interval of 30 seconds: the seconds of one, and the share of a run's time.

    python benchmarks/checkpoints.py

Saves and loads the state of a generator, of a student in distillation, which holds the generator's too, and of a pool
of optimised images. Appends a dated line to benchmarks/results/checkpoints.jsonl.
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

from zsq.methods import ZeroQ
from zsq.methods.image_optimization import InversionSource
from zsq.models.teacher import Teacher
from zsq.runtime.files import load_tensors, save_tensors
from zsq.training.checkpoints import CHECKPOINT_SECONDS, CHECKPOINT_SHARE
from zsq.training.learner import Learner
from zsq.training.loop import Run

ROUNDS = 7

POOL, BATCH = 1000, 32
"""Images of a pool, and of those the ones that are being optimised."""


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
        "percent_of_time": round(100 * save / max(CHECKPOINT_SECONDS, save / CHECKPOINT_SHARE), 3),
    }


def pool_of(teacher: Teacher, count: int) -> InversionSource:
    """Return a source in the midst of its last batch of pixels, with `count` images in all."""
    source = ZeroQ(batch_size=BATCH, steps=2).source(teacher, Run())
    source.step(0)  # so that Adam has moments
    older = torch.randn(count - BATCH, *source.pool.shape[1:], generator=torch.Generator().manual_seed(0)).half()
    source._take(torch.cat([older, source.pool]))
    return source


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
            pool = pool_of(teacher, POOL)
            for phase, learner in (("fit", source), ("distill", distiller), (f"{POOL} images", pool)):
                found[f"{network} {phase}"] = cost(learner, Path(folder) / "checkpoint.safetensors")
    append("checkpoints", {**hardware(device), "interval_seconds": CHECKPOINT_SECONDS, "checkpoints": found})


if __name__ == "__main__":
    main()

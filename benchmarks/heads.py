"""How good are files of the bundled networks, of every kind of output and input, with and without real data?

    python benchmarks/heads.py                                   # all bundled networks, seed 0
    python benchmarks/heads.py shapes_unet --seeds 0 1 2 --bits 4

Each network is quantized with zscgan, Gaussian noise and real images, with PTQ and QAT; files answer images of another
seed than the network was trained on. Appends a line a file to benchmarks/results/heads.jsonl, and leaves out those that
it holds. The detector's maps are decoded by `zsq.data.shapes.decode`, and its figure is the average precision at an
overlap of 0.5.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import processor
from records import RESULTS, append

import zsq
from zsq.data import shapes
from zsq.data.datasets import open_dataset
from zsq.evaluation.accuracy import evaluate
from zsq.export.files import open_file
from zsq.models.teacher import Teacher, load_teacher

NETWORKS = ("shapes_mobilenet", "shapes_unet", "shapes_embedder", "shapes_detector", "signals_net")
METHODS = ("zscgan", "noise", "real")
TESTED = 1000
SETTINGS = {"quantizer.num_samples": 256, "method.batch_size": 32}
STEPS, DISTILLED = 400, 200


def data_of(name: str) -> str:
    """Return the data set that a network is of."""
    return "heartbeats" if name == "signals_net" else "shapes"


def figures(teacher: Teacher, predict: Any) -> dict[str, float]:
    """Return what is true of a network's answers to the test images, and how near they are to the teacher's."""
    spec = teacher.spec
    decoder = shapes.decode if teacher.name == "shapes_detector" else None
    data = open_dataset(data_of(teacher.name), spec, limit=TESTED, boxes=decoder is not None)
    found = evaluate(predict, data, teacher=teacher.network, outputs=spec.outputs, decoder=decoder)
    values = {"AP" if measure.name == "AP50" else measure.name: measure.value for measure in found.truths}
    if found.top1 is not None:
        values["top-1"] = found.top1 / 100
    return {name: round(value, 5) for name, value in values.items()} | {
        "agreement": round((found.teacher_agreement or 0) / 100, 5)
    }


def known() -> set[tuple[Any, ...]]:
    """Return network, seed, method, bits and quantizer of the lines that there are."""
    path = RESULTS / "heads.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(line.get(key) for key in ("network", "seed", "method", "bits", "quantizer")) for line in lines}


def rows(name: str, bits: list[str], quantizers: list[str], seed: int, methods: list[str], folder: Path) -> None:
    """Quantize one network in every way that there is no line of."""
    teacher, there = load_teacher(name), known()
    base = {"network": name, "seed": seed, "processor": processor()}
    if (name, seed, "float", None, None) not in there:
        append("heads", base | {"method": "float", **figures(teacher, teacher.network)})
    for method in methods:
        first: Path | None = None
        for width in bits:
            for quantizer in quantizers:
                if (name, seed, method, width, quantizer) in there:
                    continue
                out = folder / f"{name}-{method}-{width}-{quantizer}"
                settings: dict[str, Any] = dict(SETTINGS) if first is None or method != "zscgan" else {}
                settings |= {"quantizer.steps": DISTILLED} if quantizer == "qat" else {}
                settings["quantizer.num_samples"] = SETTINGS["quantizer.num_samples"]
                settings |= {"method.steps": STEPS} if method == "zscgan" and first is None else {}
                settings |= {"method.data": f"{data_of(name)}:train", "method.limit": 1024} if method == "real" else {}
                result = zsq.quantize(
                    teacher,
                    method=method,
                    quantizer=quantizer,
                    bits=width,
                    settings=settings,
                    seed=seed,
                    from_run=first if method == "zscgan" else None,
                    out=out,
                    quiet=True,
                )
                first = first or out
                found = figures(teacher, open_file(out / result.record.file, threads=1))
                line = {"method": method, "bits": width, "quantizer": quantizer, **found}
                append("heads", base | line | {"seconds": round(result.record.seconds)})


def main() -> None:
    """Quantize each network in every way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--bits", nargs="+", default=["8", "4"])
    parser.add_argument("--quantizers", nargs="+", default=["ptq", "qat"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            for name in given.networks:
                rows(name, given.bits, given.quantizers, seed, given.methods, Path(folder) / str(seed))


if __name__ == "__main__":
    main()

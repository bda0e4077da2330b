"""A file for each target: agreement, accuracy, bytes, and latency beside the runtime's own float file.

    python benchmarks/targets.py --data ../shared/data
    python benchmarks/targets.py cifar10 --bits 8 4 --limit 500

Networks: those of NETWORKS below, calibrated by images of natural noise, without distillation. Files for OpenVINO,
LiteRT and ExecuTorch are evaluated and timed there, all others in ONNX Runtime; those for TensorRT are for a GPU, so
that their latency here says nothing of it. The float file of LiteRT is the quantized one's operators on floats. Latency
is the median of single images in turn with the float file, on one thread. Appends a line a file to
benchmarks/results/targets.jsonl and prints the table.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from floatfile import float_litert, write_float
from machine import load, processor
from records import append
from torch import Tensor

from zsq import PTQ, Noise, load_teacher
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.evaluation.accuracy import evaluate_many
from zsq.export.converted import output_step
from zsq.export.executorch import ExecuTorchClassifier, write_float_executorch
from zsq.export.files import open_file, write_file
from zsq.export.litert.runtime import LiteRtClassifier
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.openvino import OpenVinoClassifier
from zsq.export.verify import require, verify_file
from zsq.models.teacher import Teacher
from zsq.quantization.convert import convert
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import quantize_ptq
from zsq.targets import TARGETS, Target
from zsq.training.loop import Run

EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORKS: dict[str, tuple[str, str, str]] = {
    "cifar10": ("cifar10.py:cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz"),
    "mobilenet_v1_025": ("mobilenet_v1.py:mobilenet_v1_025", "imagenet_mobilenet_v1_025", "imagenet/val"),
    "mobilenet_v2": ("mobilenet_v2.py:mobilenet_v2", "imagenet_mobilenet_v2", "imagenet/val"),
}
"""Network, weights and images, below the data folder, by name."""

ROUNDS, CALIBRATION, REFERENCE = 60, 256, 100


def float_file(teacher: Teacher, target: Target, file: Path, folder: Path) -> tuple[Path, Callable[[Tensor], Any]]:
    """Return the float network's file for a target's runtime, written where it is missing, and what runs it."""
    path = folder / f"float{target.suffix}"
    if target.name == "executorch":
        if not path.exists():
            write_float_executorch(teacher.network, teacher.spec, path)
        return path, ExecuTorchClassifier(path, threads=1)
    if target.name == "litert":
        return path, float_litert(file, path)
    if not path.exists():
        write_float(teacher, path)
    runtime = OpenVinoClassifier if target.runs_in == "openvino" else OnnxClassifier
    return path, runtime(path, threads=1)


def measure(teacher: Teacher, target: Target, bits: str, data: Any, folder: Path, source: Any) -> dict[str, Any] | None:
    """Quantize for a target, write, check, evaluate and time the file; None where it cannot hold the width."""
    try:
        settings = PTQ(bits=bits, target=target.name, num_samples=CALIBRATION)
    except InputError:
        return None
    at_once, path = teacher.spec.images_at_once, folder / f"{target.name}-{bits}{target.suffix}"
    student = quantize_ptq(teacher.network, lambda: source.sample(CALIBRATION, at_once), settings, Run())
    converted = convert(student)
    lowered = write_file(converted, teacher.spec, path, target)
    checked = (batch.images for batch in data.batches(at_once))
    found = verify_file(path, student, checked, output_step(converted), threads=1, enough=100, target=target)
    require(found)
    floats, reference = float_file(teacher, target, path, folder)
    file = open_file(path, threads=1)
    measured = evaluate_many({"file": file}, data, teacher=teacher.network, batch_size=at_once)["file"]
    image = next(iter(data.batches(1))).images
    times = timing.interleaved(
        {"file": lambda: file(image), "float": lambda: reference(image)}, ROUNDS, torch.device("cpu")
    )
    ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    plain = plain_kernels(path, student, data) if target.name == "litert" else {}
    return {
        "target": target.name,
        "bits": bits,
        "images": measured.num_images,
        "top1": round(measured.top1 or 0, 2),
        "agreement": round(measured.teacher_agreement or 0, 2),
        "decided_agreement": found.decided_agreement,
        "decided_agreement_target": found.decided_agreement_target,
        "distance_steps": round(
            found.distance_optimized_steps if found.distance_target_steps is None else found.distance_target_steps, 3
        ),
        "bytes": path.stat().st_size,
        "float_bytes": floats.stat().st_size,
        "ms": round(ms["file"], 3),
        "float_ms": round(ms["float"], 3),
        **({} if lowered is None else {"lowered_percent": round(lowered, 1)}),
        **plain,
    }


def plain_kernels(path: Path, student: Student, data: Any) -> dict[str, float]:
    """Return how the reference kernels of LiteRT, which microcontrollers use, compare with the simulation."""
    batch = next(iter(data.batches(REFERENCE)))
    found = LiteRtClassifier(path, optimize=False, threads=1)(batch.images).argmax(1)
    with torch.no_grad():
        simulated = student(batch.images).argmax(1)
    return {
        "reference_images": len(batch.labels),
        "reference_agreement": round(100 * float((found == simulated).float().mean()), 2),
        "reference_top1": round(100 * float((found == batch.labels).float().mean()), 2),
        "simulated_top1": round(100 * float((simulated == batch.labels).float().mean()), 2),
    }


def main() -> None:
    """Measure every network, target and width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs/targets"))
    parser.add_argument("--bits", nargs="+", default=["8", "W4A8", "6", "4"])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--limit", type=int, help="images evaluated")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| network | target | bits | top-1 | agreement | KiB (float) | ms (float) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in given.networks:
        model, weights, images = NETWORKS[name]
        file, resize = given.data / "weights" / f"{weights}.safetensors", "none" if name == "mobilenet_v2" else None
        teacher = load_teacher(str(EXAMPLES / model), weights=file, resize=resize)  # type: ignore[arg-type]
        data = open_dataset(str(given.data / images), teacher.spec, limit=given.limit)
        source = Noise(distribution="natural").fit(teacher, Run()).source
        folder = given.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for target in given.targets:
            for bits in given.bits:
                row = measure(teacher, TARGETS[target], bits, data, folder, source)
                if row is None:
                    continue
                hardware = {"processor": processor(), "load": load()}
                if not given.no_record:
                    append("targets", {"network": name, **row, **hardware})
                lines.append(
                    f"| {name} | {target} | {bits} | {row['top1']} | {row['agreement']} | "
                    f"{row['bytes'] // 1024} ({row['float_bytes'] // 1024}) | {row['ms']:.2f} ({row['float_ms']:.2f}) |"
                )
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Does a file compute the same integers on other processors, in other versions of ONNX Runtime, and in OpenVINO?

    python benchmarks/elsewhere.py RUN [RUN ...] --network NET --weights FILE --data SET [--images 100]
        [--cpus Haswell] [--versions 1.16.3 1.32.0] [--openvino 2026.4.1] [--place 'NAME=COMMAND']

Each RUN is the folder of a finished run, or its file. Processors are emulated by `qemu-x86_64` (package qemu-user):
Haswell has AVX2 and no VNNI. --place names any other interpreter that has the runtime, such as that of another
architecture under `qemu-aarch64 -L SYSROOT`. Each version gets an environment of its own below --environments, made
once. The reference is the runtime of this environment on this processor, on the same images, one at a time. Appends a
line a file and place to benchmarks/results/elsewhere.jsonl.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import processor
from records import append

from zsq import load_teacher
from zsq.data.datasets import open_dataset
from zsq.runs.folder import file_in

SCRIPT = Path(__file__).with_name("elsewhere_run.py")
OLD_NUMPY = (1, 19)
"""The first version of ONNX Runtime that takes numpy 2."""


def environment(folder: Path, package: str, version: str) -> Path:
    """Return the interpreter of an environment that holds one version of a runtime, which is made where missing."""
    place = folder / f"{package}-{version}"
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        old = package == "onnxruntime" and tuple(int(part) for part in version.split(".")[:2]) < OLD_NUMPY
        wanted = [f"{package}=={version}", "numpy<2" if old else "numpy"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        (place / "ready").touch()
    return python


def places(given: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command that runs SCRIPT's arguments in each place, and the runtime at its end by the place's name."""
    found = {"here": [sys.executable]}
    for cpu in given.cpus:
        emulator = shutil.which("qemu-x86_64")
        if emulator is None:
            raise SystemExit("--cpus needs qemu-x86_64; install qemu-user.")
        found[f"{cpu}, emulated"] = [emulator, "-cpu", cpu, sys.executable]
    for text in given.place:
        name, _, command = text.partition("=")
        found[name] = shlex.split(command)
    for package, versions in (("onnxruntime", given.versions), ("openvino", given.openvino)):
        for version in versions:
            found[f"{package} {version}"] = [str(environment(given.environments, package, version))]
    return found


def measured(command: list[str], runtime: str, file: Path, images: Path) -> tuple[np.ndarray | None, float, str]:
    """Return the logits that a place gives, its seconds an image, and why there are none."""
    logits = images.with_name("logits.npy")
    logits.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, str(SCRIPT), str(file), str(images), str(logits), runtime],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, 0.0, (done.stderr.strip().splitlines() or ["no word"])[-1]
    found = np.load(logits)
    return found, float(done.stdout.split()[-1]) / len(found), ""


def main() -> None:
    """Run every file in every place, and record how its logits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--resize")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--cpus", nargs="*", default=[])
    parser.add_argument("--versions", nargs="*", default=[])
    parser.add_argument("--openvino", nargs="*", default=[])
    parser.add_argument("--place", action="append", default=[])
    parser.add_argument("--environments", type=Path, default=Path("runs/environments"))
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    teacher = load_teacher(given.network, weights=given.weights, resize=given.resize)
    batches = list(open_dataset(given.data, teacher.spec, limit=given.images).batches())
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    stored = given.environments / "images.npy"
    stored.parent.mkdir(parents=True, exist_ok=True)
    np.save(stored, np.concatenate([batch.images.numpy() for batch in batches]))
    for run in given.runs:
        reference: np.ndarray | None = None
        for place, command in places(given).items():
            file = file_in(run)
            runtime = (
                "openvino" if place.startswith("openvino") else "litert" if file.suffix == ".tflite" else "onnxruntime"
            )
            logits, seconds, reason = measured(command, runtime, file, stored)
            row = {"network": teacher.name, "run": run.name, "place": place, "images": len(labels)}
            if logits is None:
                row |= {"failed": reason}
            else:
                reference = logits if reference is None else reference
                row |= {
                    "top1": round(100 * float((logits.argmax(1) == labels).mean()), 2),
                    "same_class": round(100 * float((logits.argmax(1) == reference.argmax(1)).mean()), 2),
                    "equal_images": round(100 * float((logits == reference).all(1).mean()), 2),
                    "largest_difference": round(float(np.abs(logits - reference).max()), 4),
                    "ms": round(1000 * seconds, 3),
                }
            if given.no_record:
                print(row, flush=True)
            else:
                append("elsewhere", row | {"processor": processor()})


if __name__ == "__main__":
    main()

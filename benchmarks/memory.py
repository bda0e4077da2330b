"""Peak memory: of steps against one step's own tensors, and of runs against their length.

    python benchmarks/memory.py
    python benchmarks/memory.py --small

A step cannot do with less than what autograd keeps for its backward pass, plus one gradient of the largest of those. A
fresh process counts these, takes steps, and compares them with what its memory grew by (Linux with glibc). Runs of
digits of several lengths must have one peak. Appends a dated line to benchmarks/results/memory.jsonl.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts import Feed, counted, distiller_of, one_batch, random_teacher, source_of
from records import append
from torch import Tensor

RUNS = {
    "100 steps, 1000 images": ("100", "1000"),
    "2000 steps, 1000 images": ("2000", "1000"),
    "100 steps, 10000 images": ("100", "10000"),
}
STEPS = {"cifar10_resnet20": 256, "mobilenet_v1_025": 32}
"""Images a step; enough that activations outweigh code and weights."""

WITHIN = 1.3
"""Most that memory may grow by, as a multiple of a step's own tensors."""

UNFRAGMENTED = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""Lets glibc return every large block at once: what is left are the step's own tensors."""

CHILD = """
import resource, sys, zsq
steps, images, folder = sys.argv[1:]
settings = (f"method.steps={steps}", f"quantizer.num_samples={images}")
zsq.quantize(zsq.load_teacher("digits"), out=folder, settings=settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mebibytes(steps: str, images: str) -> int:
    """Return the peak resident memory of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, steps, images, f"{folder}/run"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def kept_bytes(step: Callable[[], object], parameters: list[Tensor]) -> int:
    """Return the bytes that autograd keeps in one step, each storage once, plus those of the largest again.

    Parameters are not counted: they are there before the step.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    sizes = [size for size, _ in seen.values()]
    return sum(sizes) + max(sizes)


def resident() -> int:
    """Return the bytes that this process holds in memory now, once it has given back what it does not use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_step(network: str, kind: str, batch: int) -> dict[str, float]:
    """Take steps in this process and return what they needed.

    The first steps are taken with two images, so that code and libraries are loaded before memory is read.
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
    teacher = random_teacher(network, device)

    def made(count: int) -> tuple[Callable[[], object], list[Tensor]]:
        source = source_of(teacher, count, device)
        weights = [*source.generator.parameters(), *source.teacher.parameters()]
        if kind == "zscgan":
            return counted(source.step), weights
        distiller = distiller_of(teacher, Feed(one_batch(source)), device, "learnable")
        return counted(distiller.step), [*distiller.student.parameters()]

    warm, _ = made(2)
    for _ in range(2):
        warm()
    step, weights = made(batch)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(4):
        step()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    kept = kept_bytes(step, weights)
    grown = peak - before
    return {"kept_MiB": kept / 2**20, "grown_MiB": grown / 2**20, "ratio": grown / kept}


def measure_steps(small: bool) -> dict[str, Any]:
    """Measure each step in processes of its own: with the allocator's defaults, and without its fragmentation."""
    found: dict[str, Any] = {}
    for network, batch in STEPS.items():
        for kind in ("zscgan", "student"):
            asked = [network, kind, str(batch // 4 if small else batch)]
            values = child(asked, {})
            entry = {"batch": int(asked[2]), **{k: round(v, 2) for k, v in values.items()}}
            entry["ratio_unfragmented"] = round(child(asked, UNFRAGMENTED)["ratio"], 2)
            found[f"{network} {kind}"] = entry
    return found


def child(asked: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Measure a step in a process of its own."""
    command = [sys.executable, __file__, "--child", *asked]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout
    values: dict[str, float] = json.loads(output.splitlines()[-1])
    return values


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="steps of a quarter of the batch, and no whole runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        network, kind, batch = args.child
        print(json.dumps(measure_step(network, kind, int(batch))))
        return
    steps = measure_steps(args.small)
    peaks = {} if args.small else {name: peak_mebibytes(*arguments) for name, arguments in RUNS.items()}
    within = {name: values["ratio"] <= WITHIN for name, values in steps.items()}
    append("memory", {"steps": steps, "bar": WITHIN, "within": within, "peak_MiB": peaks})


if __name__ == "__main__":
    main()

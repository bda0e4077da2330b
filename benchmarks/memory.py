"""Peak memory: of steps against one step's own tensors, and of runs against their length.

    python benchmarks/memory.py
    python benchmarks/memory.py --small
    python benchmarks/memory.py --device cuda

A step cannot do with less than what autograd keeps for its backward pass, plus one gradient of the largest of those. A
fresh process counts these, takes steps, and compares them with what its memory grew by (Linux with glibc); on a GPU,
with what the steps allocate beyond what was there, and with what PyTorch holds, recorded steps included. Runs of
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
from records import RESULTS, append
from timing import hardware
from torch import Tensor

from zsq.runtime.cuda_graphs import WARM_UP
from zsq.runtime.memory import kept_memory

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


def measure_on_gpu(network: str, kind: str, batch: int) -> dict[str, float]:
    """Take steps on the GPU, the last of them replayed, and return what they needed."""
    device = torch.device("cuda")
    step, weights = step_of(network, kind, batch, device)
    kept = kept_bytes(step, weights)
    torch.cuda.empty_cache()
    allocated, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + 4):
        step()
    grown, reserved = torch.cuda.max_memory_allocated() - allocated, torch.cuda.memory_reserved() - held
    sizes = {"kept_MiB": kept / 2**20, "grown_MiB": grown / 2**20, "ratio": grown / kept}
    return sizes | {"held_MiB": reserved / 2**20, "ratio_held": reserved / kept}


def step_of(network: str, kind: str, batch: int, device: torch.device) -> tuple[Callable[[], object], list[Tensor]]:
    """Return a step and the weights that it reads."""
    teacher = random_teacher(network, device)
    source = source_of(teacher, batch, device)
    if kind == "zscgan":
        return counted(source.step), [*source.generator.parameters(), *source.teacher.parameters()]
    distiller = distiller_of(teacher, Feed(one_batch(source)), device, "learnable")
    return counted(distiller.step), [*distiller.student.parameters()]


def measure_step(network: str, kind: str, batch: int) -> dict[str, float]:
    """Take steps in this process and return what they needed.

    The first steps are taken with two images, so that code and libraries are loaded before memory is read.
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
    warm, _ = step_of(network, kind, 2, device)
    for _ in range(2):
        warm()
    step, weights = step_of(network, kind, batch, device)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    with kept_memory():
        for _ in range(4):
            step()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    kept = kept_bytes(step, weights)
    grown = peak - before
    return {"kept_MiB": kept / 2**20, "grown_MiB": grown / 2**20, "ratio": grown / kept}


def measure_steps(small: bool, device: str) -> dict[str, Any]:
    """Measure each step in processes of its own: with the allocator's defaults, and without its fragmentation."""
    found: dict[str, Any] = {}
    for network, batch in STEPS.items():
        for kind in ("zscgan", "student"):
            asked = [network, kind, str(batch // 4 if small else batch), device]
            values = child(asked, {})
            entry = {"batch": int(asked[2]), **{k: round(v, 2) for k, v in values.items()}}
            if device == "cpu":
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to which the line is appended")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        network, kind, batch, device = args.child
        measure = measure_on_gpu if device == "cuda" else measure_step
        print(json.dumps(measure(network, kind, int(batch))))
        return
    steps = measure_steps(args.small, args.device)
    whole = not args.small and args.device == "cpu"
    peaks = {name: peak_mebibytes(*arguments) for name, arguments in RUNS.items()} if whole else {}
    within = {name: values["ratio"] <= WITHIN for name, values in steps.items()}
    measured = {**hardware(torch.device(args.device)), "steps": steps, "bar": WITHIN, "within": within}
    append("memory", measured | {"peak_MiB": peaks}, args.results)


if __name__ == "__main__":
    main()

"""Peak memory against the number of steps and of calibration images: neither may make it grow.

    python benchmarks/memory.py

Runs digits in fresh processes and appends a dated line with the peaks to benchmarks/results/memory.jsonl.
"""

import subprocess
import sys
import tempfile

from records import append

RUNS = {
    "100 steps, 1000 images": ("100", "1000"),
    "2000 steps, 1000 images": ("2000", "1000"),
    "100 steps, 10000 images": ("100", "10000"),
}

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


def main() -> None:
    """Measure and record."""
    peaks = {name: peak_mebibytes(*arguments) for name, arguments in RUNS.items()}
    append("memory", {"peak_MiB": peaks})


if __name__ == "__main__":
    main()

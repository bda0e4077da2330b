"""Accuracy on the real weights and images, against the bars that zsq sets itself; every figure is the ONNX file's.

    python benchmarks/accuracy.py cifar10 --data ../shared/data --out runs/accuracy
    python benchmarks/accuracy.py mobilenet_v1_025 --data ../shared/data --out runs/accuracy

The first cell fits a generator and distils within the budget. The others reuse that generator (`--from`), so that no
result has had more than the budget. A cell whose record exists is not run again. Appends one line a cell to
benchmarks/results/accuracy.jsonl and prints a Markdown table.
"""

import argparse
import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import zsq
from zsq.reports.text_tables import percent
from zsq.runs.console import say_line
from zsq.runs.record import Record

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Network:
    """Where a network and its images lie below the data folder, and what its results must reach."""

    model: str
    weights: str
    test: str
    train: str
    budget: str
    share: str
    """Budget of each cell that reuses the generator."""
    main: tuple[str, str]
    """Bits and scope of the first cell, which fits the generator and distils."""
    distilled: tuple[tuple[str, str], ...]
    """Bits and scope of the further distilled cells."""
    widths: tuple[str, ...]
    bars: dict[str, float]
    """Least top-1 in percent, by quantizer, bits and scope."""


NETWORKS = {
    "cifar10": Network(
        "cifar10.py:cifar10_resnet20",
        "weights/cifar10_resnet20.safetensors",
        "cifar10/test.npz",
        "cifar10/train.npz",
        "10m",
        "4m",
        ("4", "all"),
        (("6", "all"), ("4", "layers")),
        ("8", "6", "4"),
        {"ptq-8-all": 91.8, "ptq-4-all": 80.0, "qat-6-all": 91.5, "qat-4-all": 86.0, "qat-4-layers": 88.0},
    ),
    "mobilenet_v1_025": Network(
        "mobilenet_v1.py:mobilenet_v1_025",
        "weights/imagenet_mobilenet_v1_025.safetensors",
        "imagenet/val",
        "imagenet/calib",
        "20m",
        "8m",
        ("6", "all"),
        (),
        ("8",),
        {"ptq-8-all": 64.92 - 3.5, "qat-6-all": 28.9},
    ),
    "mobilenet_v1_075": Network(
        "mobilenet_v1.py:mobilenet_v1_075",
        "weights/imagenet_mobilenet_v1_075.safetensors",
        "imagenet/val",
        "imagenet/calib",
        "20m",
        "8m",
        ("6", "all"),
        (),
        ("8",),
        {"ptq-8-all": 78.46 - 1.5, "qat-6-all": 64.0},
    ),
}


class Bench:
    """Runs the cells of one network."""

    def __init__(self, name: str, data: Path, out: Path, budget: str | None) -> None:
        self.name, self.network, self.data, self.out = name, NETWORKS[name], data, out / name
        self.budget = budget or self.network.budget
        model = str(EXAMPLES / self.network.model)
        self.teacher = zsq.load_teacher(model, weights=data / self.network.weights)
        self.rows: list[list[str]] = []

    def cell(self, quantizer: str, bits: str, scope: str, method: str, *, rule: str = "auto", budget: str = "") -> Path:
        """Run one cell, or read it where it is finished; return its folder."""
        folder = self.out / f"{quantizer}-{bits}-{scope}-{method}-{rule}"
        if not (folder / "result.json").exists():
            settings = [f"quantizer.activation_scope={scope}", f"quantizer.range_rule={rule}"]
            if method == "real":
                settings.append(f"method.data={self.data / self.network.train}")
            first = self.main_folder()
            say_line(f"\n== {folder}")
            zsq.quantize(
                self.teacher,
                out=folder,
                bits=bits,
                method=method,
                quantizer=quantizer,
                settings=tuple(settings),
                budget=budget or None,
                from_run=first if method == "zscgan" and folder != first else None,
                data=str(self.data / self.network.test),
                resume=True,
            )
        self.report(folder, f"{quantizer}-{bits}-{scope}" if method == "zscgan" and rule == "auto" else "")
        return folder

    def main_folder(self) -> Path:
        """Return the folder of the cell that fits the generator."""
        bits, scope = self.network.main
        return self.out / f"qat-{bits}-{scope}-zscgan-auto"

    def report(self, folder: Path, key: str) -> None:
        """Add a row to the table and a line to the results."""
        record = Record.read(folder)
        bar = self.network.bars.get(key)
        top1 = record.quantized_top1
        assert top1 is not None
        interval = record.evaluation["quantized"].top1_interval
        assert interval is not None
        low, high = interval
        verdict = "" if bar is None else f"{bar:.2f} {'reached' if top1 >= bar else 'MISSED'}"
        self.rows.append(
            [
                f"INT{record.bits} {record.quantizer.upper()}, {record.activation_scope}",
                record.method,
                record.range_rule,
                f"{top1:.2f} ({low:.1f} to {high:.1f})",
                f"{record.simulated_top1:.2f}",
                f"{record.verification.decided_agreement:.2f}",
                percent(record.label_recognition, 0),
                f"{record.seconds:.0f}",
                verdict,
            ]
        )
        line: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "network": self.name, "bar": bar}
        line |= {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        line |= {key: value for key, value in record.as_dict().items() if key not in ("evaluation", "model", "data")}
        line["settings"]["method"].pop("data", None)
        results = Path(__file__).parent / "results" / "accuracy.jsonl"
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self) -> None:
        """Run every cell and print the table."""
        network = self.network
        self.cell("qat", *network.main, "zscgan", budget=self.budget)
        for bits, scope in network.distilled:
            self.cell("qat", bits, scope, "zscgan", budget=network.share)
        for bits in network.widths:
            for method in ("zscgan", "noise", "real"):
                for rule in ("auto", "minmax"):
                    if rule == "auto" or bits != "8":
                        self.cell("ptq", bits, "all", method, rule=rule)
        record = Record.read(self.main_folder())
        print(f"\n{self.name}: float {record.float_top1:.2f} on {record.num_eval_images} images\n")
        head = ["cell", "images", "range rule", "top-1 (95 %)", "simulated", "clear %", "labels %", "s", "bar"]
        for row in [head, ["---"] * len(head), *self.rows]:
            print("| " + " | ".join(row) + " |")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--budget", help="of the first cell, where it shall be less than the bar allows")
    arguments = parser.parse_args()
    Bench(arguments.network, arguments.data, arguments.out, arguments.budget).run()


if __name__ == "__main__":
    main()

"""Write the tables of docs/results.md and docs/results.csv from benchmarks/results/tables.jsonl and heads.jsonl.

    python benchmarks/results_page.py [--check]

Rows that no line of the file holds (see `WRITTEN`) are taken from benchmarks/reports/2026-11-accuracy.md, those of
digits from benchmarks/reports/2026-11-mobile.md. `--check`
writes nothing and fails where page or file are stale.
"""

import argparse
import csv
import io
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.comparison.lines import renamed

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "tables.jsonl"
PAGE, CSV = ROOT / "docs" / "results.md", ROOT / "docs" / "results.csv"
HEADS = ROOT / "benchmarks" / "results" / "heads.jsonl"
BEGIN, END = "<!-- table of benchmarks/results_page.py -->", "<!-- end of table -->"
HEADS_BEGIN, HEADS_END = "<!-- bundled networks of benchmarks/results_page.py -->", "<!-- end of bundled networks -->"

RECIPES = {
    "digits": (),
    "resnet20": (
        "table1a_cores2, table1b_cores2 and table2_cores2, seeds 0 to 2",
        "table1a_cores2 and table1b_cores2",
    ),
    "mobilenet_v1_025": ("table1_gpu", "table1_gpu, on the processor", "table1_gpu, on the processor, kd_weight=1"),
    "mobilenet_v1_075": ("table1_gpu", "table1_gpu, on the processor"),
}
"""Runs that the table shows of each network; where two hold the same seed of a cell, the first counts."""

NETWORKS = {
    "digits": "digits",
    "resnet20": "CIFAR-10 ResNet-20",
    "mobilenet_v1_025": "ImageNet MobileNetV1 0.25",
    "mobilenet_v1_075": "ImageNet MobileNetV1 0.75",
}

METHODS = {
    "zscgan": "zscgan",
    "CE": "zscgan, label term alone",
    "BNS": "zscgan, BN statistics alone",
    "adversarial": "adversarial",
    "zeroq": "zeroq",
    "deepinversion": "deepinversion",
    "knowledge-within": "knowledge-within",
    "dfq": "dfq",
    "noise": "noise",
    "real": "real images",
    "real, distilled": "real images, distilled",
}

MEASURED = {
    "shapes_mobilenet": "top-1",
    "shapes_unet": "mean IoU",
    "shapes_embedder": "verification accuracy",
    "shapes_detector": "AP",
    "signals_net": "top-1",
}
"""The figure of each bundled network, a share, as benchmarks/heads.py names it."""

HEADS_COLUMNS = [(bits, quantizer) for bits in ("8", "4") for quantizer in ("ptq", "qat")]

COLUMNS = [(bits, quantizer) for bits in ("8", "6", "4") for quantizer in ("ptq", "qat")]

WRITTEN: dict[tuple[str, str], dict[tuple[str, str], tuple[float, float | None, int]]] = {
    ("digits", "zscgan"): {
        ("8", "ptq"): (98.78, None, 1),
        ("8", "qat"): (98.78, None, 1),
        ("6", "ptq"): (98.67, None, 1),
        ("6", "qat"): (98.67, None, 1),
        ("4", "ptq"): (98.67, None, 1),
        ("4", "qat"): (98.33, None, 1),
    },
    ("digits", "noise"): {
        ("8", "ptq"): (98.67, None, 1),
        ("6", "ptq"): (98.67, None, 1),
        ("4", "ptq"): (98.78, None, 1),
    },
    ("digits", "real"): {
        ("8", "ptq"): (98.67, None, 1),
        ("6", "ptq"): (98.67, None, 1),
        ("4", "ptq"): (98.89, None, 1),
    },
    ("resnet20", "dfq"): {
        ("8", "ptq"): (92.01, 0.08, 3),
        ("6", "ptq"): (91.75, 0.02, 3),
        ("4", "ptq"): (80.39, 0.89, 3),
    },
}
"""Mean, deviation and seeds of what tables.jsonl does not hold: the run of `make demo`, and DFQ's first seed."""

FLOAT = {"digits": (98.67, 899)}


@dataclass(frozen=True)
class Cell:
    """Runs of one network, method, bit width and quantizer."""

    network: str
    method: str
    bits: str
    quantizer: str
    top1: float
    deviation: float | None
    seeds: int
    date: str = "2026-11-26"
    source: str = "benchmarks/reports/2026-11-accuracy.md"
    num_calibration_images: int | None = None
    label_recognition: float | None = None

    def shown(self) -> str:
        """Return mean and deviation as the table shows them."""
        return f"{self.top1:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


def read() -> tuple[dict[tuple[str, str, str, str], Cell], dict[str, tuple[float, int]]]:
    """Return the cells by network, method, bit width and quantizer, and each network's float top-1 and images."""
    runs: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    floats = dict(FLOAT)
    lines = [renamed(json.loads(line)) for line in LINES.read_text().splitlines()]
    for network, recipes in RECIPES.items():
        for recipe in recipes:
            for line in lines:
                if line["teacher"] != network or line["recipe"] != recipe or line["status"] != "finished":
                    continue
                method = line["cell"].split("/")[1] + (", distilled" if "kd_weight" in recipe else "")
                key = network, method, line["bits"], line["quantizer"]
                runs.setdefault(key, {}).setdefault(line["seed"], line)
                floats[network] = line["float_score"], line["num_eval_images"]
    cells = {key: _cell(key, list(found.values())) for key, found in runs.items()}
    for (network, method), row in WRITTEN.items():
        for (bits, quantizer), figures in row.items():
            cells[network, method, bits, quantizer] = Cell(network, method, bits, quantizer, *figures)
    return cells, floats


def _cell(key: tuple[str, str, str, str], found: list[dict[str, Any]]) -> Cell:
    top1 = [line["score"] for line in found]
    labels = [line["label_recognition"] for line in found if line["label_recognition"] is not None]
    return Cell(
        *key,
        statistics.mean(top1),
        statistics.stdev(top1) if len(top1) > 1 else None,
        len(top1),
        max(line["date"] for line in found),
        "; ".join(dict.fromkeys(line["recipe"] for line in found)),
        found[0]["num_calibration_images"],
        statistics.mean(labels) if labels else None,
    )


def table() -> str:
    """Return the page's table."""
    cells, floats = read()
    heads = ["network and method", *(f"INT{bits} {quantizer.upper()}" for bits, quantizer in COLUMNS)]
    rows = [heads, ["---"] * len(heads)]
    for network, title in NETWORKS.items():
        top1, _ = floats[network]
        rows.append([f"**{title}**, float {top1:.2f}", *[""] * len(COLUMNS)])
        for method, name in METHODS.items():
            row = [cells.get((network, method, *column)) for column in COLUMNS]
            if any(row):
                rows.append([name, *(cell.shown() if cell else "" for cell in row)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def heads_table() -> str:
    """Return the table of the bundled networks: percent, mean and deviation over the seeds that there are."""
    lines = [json.loads(line) for line in HEADS.read_text().splitlines()]

    def shown(network: str, method: str, bits: str | None, quantizer: str | None) -> str:
        wanted = {"network": network, "method": method, "bits": bits, "quantizer": quantizer}
        found = [
            100 * line[MEASURED[network]]
            for line in lines
            if all(line.get(name) == value for name, value in wanted.items())
        ]
        if not found:
            return ""
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 and bits else ""
        return f"{statistics.mean(found):.2f}{spread}"

    heads = ["network and method", *(f"INT{bits} {quantizer.upper()}" for bits, quantizer in HEADS_COLUMNS)]
    rows = [heads, ["---"] * len(heads)]
    for network, measure in MEASURED.items():
        found = [
            [METHODS[method], *(shown(network, method, *column) for column in HEADS_COLUMNS)]
            for method in ("zscgan", "noise", "real")
        ]
        if known := [row for row in found if any(row[1:])]:
            top = shown(network, "float", None, None)
            rows += [[f"**{network}**, {measure}, float {top}", *[""] * len(HEADS_COLUMNS)], *known]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_csv() -> str:
    """Return one row a cell, in the order of the table."""
    cells, floats = read()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    heads = [
        "network",
        "num_eval_images",
        "float_top1",
        "method",
        "bits",
        "quantizer",
        "top1",
        "top1_deviation",
        "seeds",
    ]
    rows.writerow([*heads, "num_calibration_images", "label_recognition", "date", "source"])
    for network in NETWORKS:
        for method in METHODS:
            for bits, quantizer in COLUMNS:
                if cell := cells.get((network, method, bits, quantizer)):
                    top1, images = floats[network]
                    deviation = "" if cell.deviation is None else f"{cell.deviation:.2f}"
                    labels = "" if cell.label_recognition is None else f"{cell.label_recognition:.1f}"
                    first = [network, images, f"{top1:.2f}", method, bits, quantizer, f"{cell.top1:.2f}", deviation]
                    last = ["" if (n := cell.num_calibration_images) is None else n, labels, cell.date, cell.source]
                    rows.writerow([*first, cell.seeds, *last])
    return text.getvalue()


def page() -> str:
    """Return the page with its tables renewed."""
    text = PAGE.read_text()
    for begin, end, found in ((BEGIN, END, table()), (HEADS_BEGIN, HEADS_END, heads_table())):
        text = re.sub(f"{begin}.*{end}", f"{begin}\n\n{found}\n\n{end}", text, flags=re.DOTALL)
    return text


def stale() -> list[str]:
    """Return the names of those files that do not hold what this script would write."""
    return [path.name for path, text in ((PAGE, page()), (CSV, as_csv())) if path.read_text() != text]


def main() -> None:
    """Write both, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where page or file are stale")
    if parser.parse_args().check:
        if found := stale():
            raise SystemExit(f"Stale: {', '.join(found)}; run python benchmarks/results_page.py.")
        return
    PAGE.write_text(page())
    CSV.write_text(as_csv())


if __name__ == "__main__":
    main()

"""How a step's cost grows with image size, batch, depth and number of classes; nothing may grow faster than linearly.

    python benchmarks/growth.py --plot
    python benchmarks/growth.py --small --axes pixels depth

Times the generator's step and the distillation step of CIFAR ResNets with random weights, one axis at a time, and fits
the exponent on a log-log line: 1 is linear. The axis `generators` sets each generator's forward and backward against
the pass of MobileNetV1 0.25, or of another network, at its own image size. Appends a dated line to
benchmarks/results/growth.jsonl; `--plot` draws docs/images/growth.png and needs matplotlib, which `zsq[plots]`
brings.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parts import (
    EXAMPLES,
    NETWORKS,
    Actions,
    Feed,
    counted,
    distiller_of,
    learning_parts,
    one_batch,
    random_teacher,
    source_of,
)
from records import RESULTS, append
from timing import hardware, interleaved, ratio

from zsq.errors import MissingExtraError
from zsq.models.teacher import Teacher, teacher_from_module
from zsq.runtime.device import pick_device

sys.path.insert(0, str(EXAMPLES))
from cifar10 import SPEC, CifarResNet

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"

LINEAR = 1.1
"""Largest exponent that counts as linear: caches that overflow and noise take up the rest."""

STEPS = ("fit", "distillation")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network and batch."""

    side: int = 32
    batch: int
    depth: int = 20
    classes: int = 10

    def teacher(self, device: torch.device) -> Teacher:
        """Return a ResNet with seeded random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = CifarResNet((self.depth - 2) // 6)
            net.fc = torch.nn.Linear(net.fc.in_features, self.classes)
        spec = replace(SPEC, height=self.side, width=self.side, classes=self.classes)
        return teacher_from_module(net, spec).to(device)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured."""

    sides: tuple[int, ...]
    batches: tuple[int, ...]
    depths: tuple[int, ...] = (20, 32, 44)
    classes: tuple[int, ...]
    side_batch: int
    """Images a step where the image size varies, and for MobileNet."""
    batch: int
    """Images a step where depth or classes vary."""
    generators: tuple[tuple[str, int], ...] = (("light", 8), ("light", 16), ("light", 24), ("light", 32), ("unet", 24))
    """Kinds and widths set against MobileNetV1 0.25."""
    against: str = "mobilenet_v1_025"
    steps: int

    def axes(self) -> dict[str, dict[int, Point]]:
        """Return the points of each axis by what they have most of."""
        return {
            "pixels": {side**2: Point(side=side, batch=self.side_batch) for side in self.sides},
            "batch": {batch: Point(batch=batch) for batch in self.batches},
            "depth": {depth: Point(batch=self.batch, depth=depth) for depth in self.depths},
            "classes": {classes: Point(batch=self.batch, classes=classes) for classes in self.classes},
        }


FULL = Grid(
    sides=(32, 48, 64, 96, 128, 160, 224),
    batches=(8, 16, 32, 64, 128),
    classes=(10, 30, 100, 300, 1000),
    side_batch=8,
    batch=64,
    steps=7,
)
SMALL = Grid(
    sides=(32, 64, 128), batches=(4, 8, 16), depths=(20, 44), classes=(10, 100, 1000), side_batch=2, batch=8, steps=3
)


def measure_axis(points: dict[int, Point], steps: int, device: torch.device) -> dict[str, Any]:
    """Time fit and distillation steps at each point in turn, and fit what they grow by."""
    actions: Actions = {}
    for x, point in points.items():
        teacher = point.teacher(device)
        source = source_of(teacher, point.batch, device)
        assert one_batch(source).images.shape == (point.batch, 3, point.side, point.side)
        actions[f"fit {x}"] = counted(source.step)
        source = source_of(teacher, point.batch, device)
        feed = Feed(one_batch(source), source)
        actions[f"distillation {x}"] = counted(distiller_of(teacher, feed, device, "learnable").step)
    times = interleaved(actions, steps, device, warm_up=1)
    found: dict[str, Any] = {"x": list(points)}
    for step in STEPS:
        seconds = [statistics.median(times[f"{step} {x}"]) for x in points]
        units = [point.batch * point.side**2 for point in points.values()]
        fitted = exponent(list(points), seconds)
        found[step] = {
            "milliseconds": [round(1e3 * value, 3) for value in seconds],
            "ns_per_pixel": [round(1e9 * value / unit, 2) for value, unit in zip(seconds, units, strict=True)],
            "exponent": fitted,
            "last_exponent": exponent(list(points)[-2:], seconds[-2:]),
            "at_most_linear": fitted <= LINEAR,
        }
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through (log x, log y)."""
    fitted = statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y])
    return round(fitted.slope, 3)


def measure_generators(grid: Grid, device: torch.device) -> dict[str, Any]:
    """Return each generator's forward and backward over the teacher's forward and gradient to its input."""
    teacher = random_teacher(grid.against, device)
    actions: Actions = {}
    for kind, width in grid.generators:
        source = source_of(teacher, grid.side_batch, device, generator=kind, width=width)
        parts = learning_parts(source, teacher)
        actions |= {f"{kind} {width}": parts["generator"], "teacher": parts["teacher"]}
    times = interleaved(actions, grid.steps, device, warm_up=1)
    return {
        "network": grid.against,
        "batch": grid.side_batch,
        "milliseconds": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "over_teacher": {name: ratio(times, name, ["teacher"]) for name in times if name != "teacher"},
    }


def plot(axes: dict[str, Any], path: Path) -> None:
    """Draw each axis as time a step against size, both logarithmic.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib is not installed: pip install 'zsq[plots]'") from error
    figure = Figure(figsize=(9, 3), layout="constrained")
    for panel, (axis, found) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        x, first = found["x"], found[STEPS[0]]["milliseconds"][0]
        for step in STEPS:
            panel.loglog(x, found[step]["milliseconds"], "o-", label=step, markersize=4)
        panel.loglog(x, [first * value / x[0] for value in x], ":", color="gray", label="linear")
        exponents = ", ".join(f"{found[step]['exponent']:.2f}" for step in STEPS)
        panel.set_title(f"{axis}, exponents {exponents}", fontsize=8)
        panel.set_xticks(x, [str(value) for value in x], rotation=45, fontsize=7)
        panel.set_xticks([], minor=True)
        panel.tick_params(axis="y", which="both", labelsize=7)
    figure.axes[0].set_ylabel("ms a step")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def report(measured: dict[str, Any]) -> str:
    """Say what was measured in lines."""
    lines = [f"{measured['device']}, {measured['threads']} threads"]
    for axis, found in measured["axes"].items():
        lines.append(f"{axis}: {found['x']}")
        for step in STEPS:
            part = found[step]
            verdict = "at most linear" if part["at_most_linear"] else "WORSE THAN LINEAR"
            lines.append(f"  {step:14s} ms {part['milliseconds']}; ns a pixel-image {part['ns_per_pixel']}")
            lines.append(f"  {'':14s} exponent {part['exponent']}, of the last two {part['last_exponent']}: {verdict}")
    if found := measured.get("generators"):
        lines.append(f"{found['network']}, batch {found['batch']}: teacher {found['milliseconds']['teacher']} ms")
        for name, value in found["over_teacher"].items():
            lines.append(f"  {name:14s} {found['milliseconds'][name]} ms, {value} times the teacher")
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*FULL.axes(), "generators"]
    parser.add_argument("--axes", nargs="+", choices=names, default=names, help="what to vary; default: all")
    parser.add_argument("--against", choices=NETWORKS, help="network of the axis generators; default mobilenet_v1_025")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own")
    parser.add_argument("--steps", type=int, help="timed rounds; default 7, and 3 with --small")
    parser.add_argument("--small", action="store_true", help="fewer and smaller points")
    parser.add_argument("--plot", action="store_true", help=f"draw docs/images/{PICTURE.name}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to which the line is appended")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """Time, print, append; return the record."""
    args = arguments(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    grid = grid or (SMALL if args.small else FULL)
    grid = replace(grid, steps=args.steps or grid.steps, against=args.against or grid.against)
    axes = {name: points for name, points in grid.axes().items() if name in args.axes}
    measured: dict[str, Any] = {"small": args.small, "steps": grid.steps, **hardware(device)}
    measured["axes"] = {name: measure_axis(points, grid.steps, device) for name, points in axes.items()}
    if "generators" in args.axes:
        measured["generators"] = measure_generators(grid, device)
    print(report(measured))
    if args.plot and measured["axes"]:
        plot(measured["axes"], PICTURE)
    return append("growth", measured, args.results)


if __name__ == "__main__":
    main()

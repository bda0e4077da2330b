"""Random small networks: do the simulation, the converted network and every runtime give the same?

    python benchmarks/random_networks.py --count 300 --out drawn.jsonl --keep files    # all targets that are installed
    python benchmarks/random_networks.py --again files --out again.jsonl    # the ONNX files, in another ONNX Runtime
    python benchmarks/random_networks.py --table drawn.jsonl again.jsonl    # one row a construct, for the docs

A seed draws inputs of one to three axes, two to four of `CONSTRUCTS`, a head of `HEADS`, widths of weights and
activations, and the granularity of the weights. The network is calibrated on noise and converted, the target's file is
written and run, and what it gives is compared with the simulation as every run compares it (`zsq.export.verify`). A
network that a target refuses in words counts as refused. Appends a line a network and target to --out; --first
continues where another run ended.
"""

import argparse
import copy
import functools
import importlib.metadata
import json
import math
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx._internal.exporter._registration import ONNXRegistry

from zsq.errors import MissingExtraError, ZsqError
from zsq.export.converted import output_step, packed
from zsq.export.files import require_runtime, write_file
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.verify import FAR_NOISES, FAR_STEPS, Verification, require, verify_file
from zsq.models.teacher import Teacher, teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.quantizers import answered_shaken
from zsq.targets import TARGETS, Target
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec, Output

SIDES = {1: (20,), 2: (10, 10), 3: (4, 6, 6)}
WIDTHS = ("8", "8", "7", "6", "5", "4", "3", "W4A8", "W6A8", "W2A8", "W8A6", "W8A4")
CALIBRATED, COMPARED = 64, 150
CLASSES = 5

Draw = random.Random
Make = Callable[[Draw, int, int], nn.Module]
"""Makes a module that keeps the channels of [N, C, ...], from a draw, the channels and the number of other axes."""


class Apply(nn.Module):
    """A function of maps, and of what modules make of the same maps."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.function(x, *(part(x) for part in self.parts))


class OnTokens(nn.Module):
    """What a module makes of tokens [N, L, C], as maps [N, C, ...]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        tokens: Tensor = self.body(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Attention(nn.Module):
    """Attention of two heads over tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        seen: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + seen


def conv(axes: int, inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Module:
    """Return a convolution over so many axes; padded so that its size stays unless it has a stride."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return kind(inputs, outputs, size, padding=options.get("dilation", 1) * (size - 1) // 2, **options)


def norm(axes: int, channels: int) -> nn.Module:
    """Return a batch norm over so many axes, with scales and shifts that do something."""
    made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias, std=0.5)
    return made


def bare(axes: int, channels: int) -> nn.Sequential:
    """Return a convolution and a batch norm."""
    return nn.Sequential(conv(axes, channels, channels), norm(axes, channels))


def block(
    axes: int, inputs: int, outputs: int, size: int = 3, activation: type[nn.Module] = nn.ReLU, **options: Any
) -> nn.Sequential:
    """Return a convolution, a batch norm and an activation."""
    return nn.Sequential(conv(axes, inputs, outputs, size, **options), norm(axes, outputs), activation())


def inverted_bottleneck(_: Draw, c: int, axes: int) -> nn.Module:
    """A residual branch that is wider inside, as MobileNetV2 has."""
    wide = block(axes, 2 * c, 2 * c, groups=2 * c)
    return Apply(torch.add, nn.Sequential(block(axes, c, 2 * c, 1), wide, conv(axes, 2 * c, c, 1), norm(axes, c)))


def joined(*maps: Tensor) -> Tensor:
    """Return the channels of all maps."""
    return torch.cat(maps, 1)


def halves_joined(_: Tensor, *maps: Tensor) -> Tensor:
    """Return the channels of what was made of the maps."""
    return torch.cat(maps, 1)


def halves_exchanged(x: Tensor) -> Tensor:
    """Return the second half of the channels, rectified, and the first."""
    half = x.shape[1] // 2
    return torch.cat([x[:, half:].relu(), x[:, :half]], 1)


def pooled(x: Tensor) -> Tensor:
    """Return the mean over all axes but batch and channels, which stay with length 1."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


def squeeze_excite(draw: Draw, c: int, axes: int) -> nn.Module:
    """Channels scaled by what their means say."""
    gate = draw.choice([nn.Sigmoid, nn.Hardsigmoid])
    shrunk = nn.Sequential(Apply(pooled), conv(axes, c, c // 2, 1), nn.ReLU(), conv(axes, c // 2, c, 1), gate())
    return Apply(torch.mul, shrunk)


def transposed(draw: Draw, c: int, axes: int) -> nn.Module:
    """Maps of twice the size."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    size, extra = draw.choice([(2, 0), (4, 0), (3, 1)])
    made = kind(c, c, size, 2, (size - 1) // 2, extra, groups=draw.choice([1, 2]))
    return nn.Sequential(made, norm(axes, c), nn.ReLU())


def max_pool(draw: Draw, c: int, axes: int) -> nn.Module:
    """The largest of overlapping windows."""
    return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](3, draw.choice([1, 2]), 1)


def average_pool(draw: Draw, c: int, axes: int) -> nn.Module:
    """The mean of overlapping windows."""
    counted = draw.choice([True, False])
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1](3, draw.choice([1, 2]), 1, count_include_pad=counted)


def shuffled(x: Tensor) -> Tensor:
    """Return channels in another order, as ShuffleNets do."""
    return x.reshape(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


CONSTRUCTS: dict[str, Make] = {
    "convolution with bias": lambda d, c, a: nn.Sequential(conv(a, c, c, d.choice([1, 3, 5])), nn.ReLU()),
    "depthwise": lambda d, c, a: block(a, c, c, d.choice([3, 5]), groups=c),
    "grouped": lambda d, c, a: block(a, c, c, groups=d.choice([2, 4])),
    "strided": lambda d, c, a: block(a, c, c, d.choice([1, 3]), stride=2),
    "dilated": lambda _, c, a: block(a, c, c, dilation=2),
    "transposed": transposed,
    "inverted bottleneck": inverted_bottleneck,
    "linear on maps": lambda _, c, a: Apply(torch.add, nn.Linear(SIDES[a][-1], SIDES[a][-1])),
    "linear on tokens": lambda _, c, a: OnTokens(nn.Sequential(nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, c))),
    "residual sum": lambda _, c, a: nn.Sequential(
        Apply(torch.add, nn.Sequential(block(a, c, c), bare(a, c))), nn.ReLU()
    ),
    "concatenation": lambda _, c, a: Apply(
        halves_joined, conv(a, c, c // 2), nn.Sequential(conv(a, c, c // 2), nn.ReLU())
    ),
    "dense concatenation": lambda _, c, a: nn.Sequential(Apply(joined, block(a, c, 4)), conv(a, c + 4, c, 1)),
    "max pool": max_pool,
    "average pool": average_pool,
    "nearest upsampling": lambda _, c, a: nn.Sequential(nn.Upsample(scale_factor=2.0), conv(a, c, c)),
    "pixel shuffle": lambda _, c, a: nn.Sequential(conv(a, c, 4 * c, 1), nn.PixelShuffle(2)),
    "channel shuffle": lambda _, c, a: nn.Sequential(block(a, c, c, groups=2), Apply(shuffled)),
    "slice": lambda _, c, a: nn.Sequential(Apply(halves_exchanged), conv(a, c, c)),
    "padding": lambda _, c, a: nn.Sequential(Apply(lambda x: F.pad(x, (1, 0))), conv(a, c, c)),
    "batch norm in front": lambda _, c, a: Apply(torch.add, nn.Sequential(norm(a, c), nn.ReLU(), conv(a, c, c))),
    "batch norm behind an activation": lambda _, c, a: nn.Sequential(
        conv(a, c, c), nn.ReLU(), norm(a, c), conv(a, c, c, 1)
    ),
    "squeeze and excite": squeeze_excite,
    "product of maps": lambda _, c, a: Apply(lambda _, y, z: y * z, conv(a, c, c), block(a, c, c)),
    "ReLU6": lambda _, c, a: block(a, c, c, activation=nn.ReLU6),
    "SiLU": lambda _, c, a: block(a, c, c, activation=nn.SiLU),
    "GELU": lambda _, c, a: block(a, c, c, activation=nn.GELU),
    "hard swish": lambda _, c, a: block(a, c, c, activation=nn.Hardswish),
    "leaky ReLU": lambda _, c, a: block(a, c, c, activation=nn.LeakyReLU),
    "PReLU": lambda _, c, a: block(a, c, c, activation=nn.PReLU),
    "sigmoid, tanh, ELU": lambda d, c, a: block(a, c, c, activation=d.choice([nn.Sigmoid, nn.Tanh, nn.ELU])),
    "attention": lambda _, c, a: OnTokens(Attention(c)),
    "layer norm": lambda _, c, a: OnTokens(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c))),
}
"""What networks are made of."""

AXES = {"pixel shuffle": (2,), "attention": (1, 2)}
"""Where a construct works on some numbers of axes only, or would take long."""

FIRST = "linear on maps"
"""The construct that needs the size of the input."""

GROWING = ("transposed", "nearest upsampling", "pixel shuffle")
"""Constructs that make maps larger, of which a network gets one."""


class Vector(nn.Module):
    """What a layer makes of the mean of each channel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        made: Tensor = self.layer(x.mean(list(range(2, x.dim()))))
        return made


class Named(nn.Module):
    """A map of numbers and classes, by name."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.size, self.label = conv(axes, channels, 2, 1), Vector(nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"size": self.size(x), "label": self.label(x)}


class Direction(Vector):
    """A vector of unit length."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.normalize(super().forward(x), dim=1)


HEADS: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, Any]]] = {
    "classes": (lambda c, _: Vector(nn.Linear(c, CLASSES)), {"classes": CLASSES}),
    "classes, by a convolution": (
        lambda c, a: nn.Sequential(Apply(pooled), conv(a, c, CLASSES, 1), nn.Flatten(1)),
        {"classes": CLASSES},
    ),
    "classes, batch norm on vectors": (
        lambda c, _: Vector(nn.Sequential(nn.Linear(c, c), norm(1, c), nn.ReLU(), nn.Linear(c, CLASSES))),
        {"classes": CLASSES},
    ),
    "a class at each position": (lambda c, a: conv(a, c, 3, 1), {"classes": 3}),
    "yes or no at each position": (lambda c, a: conv(a, c, 1, 1), {"classes": 2}),
    "embedding": (lambda c, _: Direction(nn.Linear(c, 8)), {}),
    "values": (lambda c, _: Vector(nn.Linear(c, 2)), {"outputs": (Output("", "values"),)}),
    "several outputs": (Named, {"outputs": (Output("size", "values"), Output("label", "classes"))}),
}
"""What networks give, and what is said of it."""


@dataclass(frozen=True)
class Drawn:
    """A random network, and how it is quantized."""

    network: nn.Module
    spec: ImageSpec
    rows: tuple[str, ...]
    """What it is made of: its rows of the table."""
    bits: str
    granularity: Literal["channel", "tensor"]


def drawn(seed: int) -> Drawn:
    """Draw a network, with batch norms that know the statistics of noise, and how it is quantized."""
    draw = random.Random(seed)
    axes = draw.choices([1, 2, 3], [1, 3, 1])[0]
    channels, width = draw.choice([1, 3, 4]), draw.choice([8, 12])
    chosen = _constructs(draw, axes)
    head = draw.choice(list(HEADS))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [CONSTRUCTS[name](draw, width, axes) for name in chosen]
        make_head, said = HEADS[head]
        network = nn.Sequential(block(axes, channels, width), *body, make_head(width, axes))
        with torch.no_grad():
            for step in range(20):
                network(noise(16, (channels, *SIDES[axes]), step))
    spec = ImageSpec.of_shape((channels, *SIDES[axes]), mean=(0.5,) * channels, std=(0.25,) * channels, **said)
    inputs = ("signals", "images", "volumes")[axes - 1]
    granularity: Literal["channel", "tensor"] = "tensor" if draw.random() < 1 / 3 else "channel"
    return Drawn(network.eval(), spec, (*chosen, f"head: {head}", f"input: {inputs}"), draw.choice(WIDTHS), granularity)


def _constructs(draw: Draw, axes: int) -> list[str]:
    """Draw two to four constructs that work on so many axes, at most one of which makes maps larger."""
    able = [name for name in CONSTRUCTS if axes in AXES.get(name, (1, 2, 3))]
    chosen = draw.sample(able, draw.choice([2, 3, 4]))
    growing = [name for name in chosen if name in GROWING]
    chosen = [name for name in chosen if name not in growing[1:]]
    return sorted(chosen, key=lambda name: name != FIRST)


def noise(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise whose mean and deviation differ from image to image, so that a network tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = torch.randn(2, count, shape[0], *[1] * (len(shape) - 1), generator=generator)
    made: Tensor = mean + deviation.exp() * torch.randn(count, *shape, generator=generator)
    return made


def images_of(spec: ImageSpec) -> Tensor:
    """Return what calibrates, and behind it what is compared."""
    return noise(CALIBRATED + COMPARED, spec.shape, seed=0)


def compared(trial: Drawn, teacher: Teacher, target: Target, path: Path) -> tuple[Verification, float]:
    """Quantize a drawn network for a target, and return how its file compares, and its converted network: in steps.

    An ONNX file gets a neighbour with what is needed to run it again: the simulation's answers and their step.

    Raises:
        ZsqError: the target has no form for it, or its file computes something else.
    """
    bits = trial.bits if int(trial.bits[-1]) in target.activation_bits else f"W{trial.bits.lstrip('W')[0]}A8"
    settings = PTQ(bits=bits, target=target.name, weight_granularity=trial.granularity, num_samples=CALIBRATED)
    images = images_of(trial.spec)

    def stream() -> Iterator[Batch]:
        yield Batch(images[:CALIBRATED], torch.zeros(CALIBRATED, dtype=torch.int64))

    student = quantize_ptq(teacher.network, stream, settings, Run())
    converted = convert(student)
    write_file(converted, teacher.spec, path, target)
    step, rest = output_step(converted, teacher.spec.outputs), images[CALIBRATED:]
    with torch.no_grad():
        expected = student(rest)
        difference = (packed(converted)(rest) - expected) / step
    if path.suffix == ".onnx":
        np.savez(path.with_suffix(".npz"), expected=expected.numpy(), step=np.asarray(step))
    found = verify_file(
        path,
        student,
        (rest[:1], *rest[1:].split(50)),
        step,
        outputs=teacher.spec.outputs,
        threads=1,
        target=target,
        shaken=lambda batch: answered_shaken(student, batch),
    )
    if found.num_decided or found.by_distance:  # else the distance alone tells
        require(found)
    return found, float(difference.square().mean().sqrt())


def distances(found: Verification, converted: float, target: Target) -> dict[str, float]:
    """Return the distance from the simulation in steps of the output, root mean square, by what computes."""
    if target.runs_in == "onnxruntime":
        ways = {"literal": found.distance_literal_steps, "optimised": found.distance_optimized_steps}
    else:
        ways = {"own": found.distance_target_steps or found.distance_literal_steps}
    return {"converted": converted} | ways


def tried(trial: Drawn, teacher: Teacher, target: Target, path: Path) -> dict[str, Any]:
    """Try a drawn network on a target, and return what there is to say."""
    try:
        found, converted = compared(trial, teacher, target, path)
    except ZsqError as error:
        said = str(error)
        return {"status": "differs" if "simulation" in said else "refused", "said": said[:300]}
    allowed, distance = max(FAR_STEPS, FAR_NOISES * found.noise_steps), distances(found, converted, target)
    status = "agrees" if max(distance.values()) <= allowed else "differs"
    return {"status": status, "distance": distance, "allowed": allowed, "decided": found.num_decided}


def again(path: Path, spec: ImageSpec) -> dict[str, Any]:
    """Run a file that was kept in the ONNX Runtime of this process, and return what there is to say."""
    with np.load(path.with_suffix(".npz")) as stored:
        expected, step = torch.from_numpy(stored["expected"]), torch.from_numpy(stored["step"])
    rest = images_of(spec)[CALIBRATED:]
    distance = {}
    for way, optimize in (("literal", False), ("optimised", True)):
        file = OnnxClassifier(path, optimize=optimize, threads=1)
        difference = (torch.cat([file(batch) for batch in (rest[:1], *rest[1:].split(50))]) - expected) / step
        distance[way] = float(difference.square().mean().sqrt())
    return {"status": "agrees" if max(distance.values()) <= FAR_STEPS else "differs", "distance": distance}


def installed(names: list[str]) -> list[Target]:
    """Return the targets of these names whose runtime is installed."""
    able = []
    for target in (TARGETS[name] for name in names):
        try:
            require_runtime(target)
        except MissingExtraError as error:
            print(error, file=sys.stderr)
        else:
            able.append(target)
    return able


def table(lines: list[dict[str, Any]]) -> str:
    """Return a row a construct: networks drawn, and the largest distance of each way of computing them."""
    seeds: dict[str, set[int]] = defaultdict(set)
    largest: dict[tuple[str, str], float] = defaultdict(lambda: -math.inf)
    ways: dict[str, None] = {}
    for line in lines:
        for row in line["rows"]:
            seeds[row].add(line["seed"])
            for way, value in line.get("distance", {}).items():
                column = way if way == "converted" else f"{line['runtime']}{', literal' if way == 'literal' else ''}"
                ways[column] = None
                largest[row, column] = max(largest[row, column], value)
    text = [f"| construct | networks | {' | '.join(ways)} |", "|---" * (2 + len(ways)) + "|"]
    for row in sorted(seeds, key=lambda row: (row.partition(": ")[1], row.lower())):
        cells = [f"{largest[row, way]:.2f}" if math.isfinite(largest[row, way]) else "none" for way in ways]
        text.append(f"| {row} | {len(seeds[row])} | {' | '.join(cells)} |")
    return "\n".join(text)


def runtime_of(target: Target) -> str:
    """Return the name and version of what runs a target's file here."""
    title = TARGETS["onnxruntime"].title if target.runs_in == "onnxruntime" else target.title
    return f"{title} {importlib.metadata.version(target.runs_in.replace('_', '-'))}"


def list_operators_once() -> None:
    """Let PyTorch's exporter keep its list of operators, which it makes anew for every file: half a second each."""
    listed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(_: type[ONNXRegistry], /, **options: Any) -> ONNXRegistry:
        registry = copy.copy(listed(**options))
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign, assignment]


def lines_of(seed: int, targets: list[Target], folder: Path) -> Iterator[dict[str, Any]]:
    """Try a seed's network on each target."""
    trial = drawn(seed)
    teacher = teacher_from_module(trial.network, trial.spec)
    for target in targets:
        found = tried(trial, teacher, target, folder / f"{seed}_{target.name}{target.suffix}")
        yield {"seed": seed, "target": target.name, "rows": trial.rows, "bits": trial.bits, **found}


def lines_again(folder: Path) -> Iterator[dict[str, Any]]:
    """Run each ONNX file that was kept."""
    for path in sorted(folder.glob("*.onnx")):
        seed, _, name = path.stem.partition("_")
        if TARGETS[name].runs_in == "onnxruntime":
            trial = drawn(int(seed))
            yield {"seed": int(seed), "target": name, "rows": trial.rows, "bits": trial.bits, **again(path, trial.spec)}


def main() -> None:
    """Try networks, or print the table of what was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("random_networks.jsonl"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    asked = parser.parse_args()
    if asked.table:
        print(table([json.loads(line) for path in asked.table for line in path.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    list_operators_once()
    with tempfile.TemporaryDirectory(prefix="zsq-") as place:
        folder = asked.keep or Path(place)
        folder.mkdir(exist_ok=True)
        seeds = range(asked.first, asked.first + asked.count)
        targets = installed(asked.targets)
        drawn_lines = (line for seed in seeds for line in lines_of(seed, targets, folder))
        for line in lines_again(asked.again) if asked.again else drawn_lines:
            with asked.out.open("a") as file:
                file.write(json.dumps({**line, "runtime": runtime_of(TARGETS[line["target"]])}) + "\n")
            if line["status"] == "differs":
                print(json.dumps(line), file=sys.stderr)


if __name__ == "__main__":
    main()

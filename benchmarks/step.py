"""Each training step against the work in it that cannot be left out, timed in turn in one process.

    python benchmarks/step.py
    python benchmarks/step.py --network mobilenet_v1_025 --batch 32
    python benchmarks/step.py --device cuda --batch 256

ZS-CGAN's step stands against generator, teacher, batch statistics and optimizer, each alone; the distillation step
against that step and the student's own forward and backward; the student's step against the training step of the float
network with its batch norms folded. Weights are random. On a GPU, all sides are CUDA graphs, as zsq's steps are. Prints
ratios with their bars and what each choice of layout, optimizer, precision and compiling brings; appends a dated line
to benchmarks/results/step.jsonl.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from choices import Setup, describe, try_choices
from parts import (
    NETWORKS,
    Actions,
    Feed,
    counted,
    distiller_of,
    float_training,
    folded_teacher,
    learning_parts,
    one_batch,
    random_teacher,
    source_of,
    student_pass,
    trained_weights,
)
from records import RESULTS, append
from timing import hardware, interleaved, milliseconds, ratio, recorded, wait
from torch.utils.flop_counter import FlopCounterMode

from zsq.models.teacher import Teacher
from zsq.runtime.device import pick_device
from zsq.types import Batch

BARS = {"zscgan": 1.10, "distillation": 1.15, "student moving-average": 1.5, "student learnable": 1.8}
"""Most that a step may cost, as a multiple of what stands under it in `sides`."""

PARTS = ("generator", "teacher", "statistics", "optimizer")
SCALES = ("moving-average", "learnable")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="cifar10_resnet20")
    parser.add_argument("--batch", type=int, help="images a step; default 64, and 8 with --small")
    parser.add_argument("--steps", type=int, help="timed rounds; default 30, and 5 with --small")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own")
    parser.add_argument("--small", action="store_true", help="a fraction of a minute; compiles nothing")
    parser.add_argument(
        "--compile-seconds", type=int, help="longest time for trying torch.compile; 0: none; default 300"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to which the line is appended")
    args = parser.parse_args(given)
    args.batch = args.batch or (8 if args.small else 64)
    args.steps = args.steps or (5 if args.small else 30)
    if args.compile_seconds is None:
        args.compile_seconds = 0 if args.small else 300
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def sides(teacher: Teacher, batch: int, device: torch.device) -> tuple[Actions, int]:
    """Return all that is timed, and the floating-point operations of the ZS-CGAN step; both sides do the same work."""
    source = source_of(teacher, batch, device)
    with FlopCounterMode(display=False) as counter:
        source.step(0)
    actions: Actions = {"zscgan": counted(source.step)}
    actions |= recorded(learning_parts(source_of(teacher, batch, device), teacher), device)
    actions |= recorded(folded_teacher(source, teacher), device)
    images = one_batch(source)
    assert len(images.images) == len(images.labels) == batch, (len(images.images), batch)
    actions |= student_sides(teacher, images, device)
    distiller = distiller_of(teacher, Feed(images, source_of(teacher, batch, device)), device, "learnable")
    actions["distillation"] = counted(distiller.step)
    alone = student_pass(distiller_of(teacher, Feed(images), device, "learnable"), images)
    actions |= recorded({"student pass": alone}, device)
    return actions, counter.get_total_flops()


def student_sides(teacher: Teacher, images: Batch, device: torch.device) -> Actions:
    """Return the student's step under both kinds of scales, and the float network's.

    Raises:
        AssertionError: they do not train the same number of weights.
    """
    actions: Actions = {}
    for scales in SCALES:
        distiller = distiller_of(teacher, Feed(images), device, scales)
        actions[f"student {scales}"] = counted(distiller.step)
        train, weights = float_training(teacher, images, distiller.settings)
        actions |= recorded({"float": train}, device)
        assert weights == trained_weights(distiller), (weights, trained_weights(distiller))
    return actions


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return each step's time over that of what stands under it."""
    under = {
        "zscgan": PARTS,
        "distillation": ("zscgan", "student pass"),
        **{f"student {scales}": ("float",) for scales in SCALES},
    }
    return {name: ratio(times, name, names) for name, names in under.items()}


def matmul_rate(device: torch.device, side: int = 8192) -> float:
    """Return the floating-point operations a second that a large bfloat16 product reaches."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times = interleaved({"matmul": lambda: a @ a}, 10, device, warm_up=5)
    wait(device)
    return 2 * side**3 / min(times["matmul"])


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Time, print, append; return the record."""
    args = arguments(given)
    device = pick_device(args.device)
    teacher = random_teacher(args.network, device)
    actions, flops = sides(teacher, args.batch, device)
    times = interleaved(actions, args.steps, device)
    medians, found = milliseconds(times), ratios(times)
    seconds = medians["zscgan"] / 1e3
    measured: dict[str, Any] = {
        "network": args.network,
        "small": args.small,
        "shape": [args.batch, teacher.spec.channels, teacher.spec.height, teacher.spec.width],
        "steps": args.steps,
        **hardware(device),
        "milliseconds": medians,
        "ratios": found,
        "bars": BARS,
        "within": {name: found[name] <= bar for name, bar in BARS.items()},
        "images_per_second": round(args.batch / seconds, 1),
        "gflop_per_second": round(flops / seconds / 1e9, 2),
    }
    if device.type == "cuda":
        rate = matmul_rate(device)
        measured |= {
            "matmul_tflop_per_second": round(rate / 1e12, 1),
            "share_of_matmul": round(flops / seconds / rate, 4),
        }
    setup = Setup(teacher, args.network, args.batch, device, args.steps, args.compile_seconds)
    measured["choices"] = try_choices(setup)
    print(report(measured))
    return append("step", measured, args.results)


def report(measured: dict[str, Any]) -> str:
    """Say what was measured in lines."""
    times, found = measured["milliseconds"], measured["ratios"]
    lines = [f"{measured['network']} {measured['shape']}, {measured['device']}, {measured['threads']} threads"]
    lines += [f"  {name:24s} {value:10.2f} ms" for name, value in times.items()]
    for name, bar in BARS.items():
        verdict = "within" if measured["within"][name] else "ABOVE"
        lines.append(f"  {name:24s} {found[name]:10.3f}x  {verdict} the bar of {bar:.2f}x")
    lines.append(f"  {measured['images_per_second']} images/s, {measured['gflop_per_second']} GFLOP/s")
    if "share_of_matmul" in measured:
        share = 100 * measured["share_of_matmul"]
        lines.append(f"  {share:.1f} % of a bfloat16 product's {measured['matmul_tflop_per_second']} TFLOP/s")
    return "\n".join([*lines, describe(measured["choices"])])


if __name__ == "__main__":
    main()

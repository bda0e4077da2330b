"""Is the INT8 file of any family slower than the float file? One thread of ONNX Runtime, a batch of one.

    python benchmarks/families.py
    python benchmarks/families.py timm:fastvit_t8 torchvision:swin_t --seconds 4

Networks have random weights with settled batch norms, and the size of image that they were made for; grids come from
four images of noise: this is about time, not about accuracy. The two files take turns with the same image. Needs the
libraries that the names begin with. Appends a line a network to benchmarks/results/families.jsonl.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from coverage import OWN_SIDE, plain, settle
from deployed import executed, kinds, session, take_turns
from floatfile import write_float
from machine import load, processor
from records import append
from timing import milliseconds, ratio
from torch import nn

import zsq
from zsq.export.onnx import write_onnx
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import coverage
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run
from zsq.types import Batch

FAMILIES = {
    "torchvision": "efficientnet_b0 swin_t convnext_tiny mobilenet_v2 mobilenet_v3_small resnet18 squeezenet1_1 "
    "shufflenet_v2_x1_0",
    "timm": "fastvit_t8 mobilevit_xxs mobilevitv2_050 edgenext_xx_small poolformer_s12 rexnet_100 efficientvit_b0 "
    "deit_tiny_patch16_224 mixer_s32_224 pvt_v2_b0 levit_128s efficientformer_l1 efficientvit_m0 mambaout_femto "
    "mixnet_s ghostnet_100 cs3darknet_s fasternet_t0 starnet_s1 regnety_002 mobilenetv4_conv_small skresnet18 "
    "repvit_m0_9 hrnet_w18_small",
}
"""Networks by library."""


def build(name: str) -> tuple[nn.Module, zsq.ImageSpec]:
    """Return a network with random weights and settled batch norms, and what it takes."""
    torch.manual_seed(0)
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        network, side = timm.create_model(model, pretrained=False), 0
        side = network.default_cfg["input_size"][1]
    else:
        network, side = plain(library, model), OWN_SIDE
    settle(network, 3, side)
    with torch.no_grad():
        classes = network(torch.zeros(1, 3, side, side)).shape[1]
    return network, zsq.ImageSpec(
        channels=3, height=side, width=side, classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3
    )


def measure(name: str, seconds: float) -> dict[str, object]:
    """Write both files of a network, time them in turn, and return what was found."""
    network, spec = build(name)
    teacher = teacher_from_module(network, spec)
    images = torch.randn(4, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64))
    settings = PTQ(bias_correction=False, range_sigmas=0.0, range_rule="minmax")
    converted = convert(quantize_ptq(teacher.network, lambda: iter([batch]), settings, Run()))
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "zsq")}
        write_float(teacher, files["float"])
        write_onnx(converted, spec, files["zsq"])
        sessions = {kind: session(path) for kind, path in files.items()}
        times = take_turns(sessions, {"images": images[:1].numpy()}, seconds=seconds, least=20)
        operations = kinds(executed(files["zsq"]))
        size = {kind: path.stat().st_size for kind, path in files.items()}
    return {
        "network": name,
        "side": spec.height,
        "median_ms": milliseconds(times),
        "time_over_float": ratio(times, "zsq", ["float"]),
        "rounds": len(times["zsq"]),
        "operations": operations,
        "float_operations_percent": round(coverage(converted, spec).float_operation_share, 2),
        "file_bytes": size,
        "processor": processor(),
        "load": load(),
    }


def main() -> None:
    """Measure every network, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="LIBRARY:NAME; default: all")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a network's timing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks or [f"{kind}:{model}" for kind, text in FAMILIES.items() for model in text.split()]:
        append("families", measure(name, given.seconds))


if __name__ == "__main__":
    main()

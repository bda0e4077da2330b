"""Which networks of the zoos go through from teacher to checked file?

    python benchmarks/coverage.py                          # one network of each family
    python benchmarks/coverage.py timm:resnet18 torchvision:swin_v2_t --seconds 600
    python benchmarks/coverage.py --rehearse               # the quick look: without a fit

Each network gets random weights with settled batch norms, and a process of its own: INT8, three generator steps where
it has batch norm (else noise), three steps of distillation, files and their check. What is tested is constructs, not
accuracy: a network takes the smallest of `SIDES` at which it runs, else its own size. Needs the libraries that the
names begin with; `smp` stands for encoders of segmentation_models_pytorch with a classification head. With
`--rehearse` the network is calibrated on eight images of noise, its file written and checked, and a gradient taken
through the student: all constructs in a third of the time. Appends a line a network to
benchmarks/results/coverage.jsonl and prints the counts.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from machine import processor
from records import append
from torch import nn

import zsq
from zsq.errors import ZsqError
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ, QAT
from zsq.quantization.coverage import Coverage
from zsq.quantization.ptq import quantize_ptq
from zsq.runs.rehearsal import rehearse
from zsq.training.loop import Run
from zsq.types import Batch

FAMILIES = {
    "torchvision": (
        "alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_0 squeezenet1_1 "
        "densenet121 googlenet inception_v3 shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small mnasnet0_5 "
        "efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_32 swin_t swin_v2_t "
        "maxvit_t"
    ),
    "timm": (
        "bat_resnext26ts botnet26t_256 coat_tiny coatnet_0_rw_224 convformer_s18 convmixer_768_32 convnextv2_atto "
        "crossvit_tiny_240 cs3darknet_s cspresnet50 cspdarknet53 darknet53 davit_tiny deit_tiny_patch16_224 dla34 "
        "dm_nfnet_f0 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 "
        "efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf "
        "gernet_s ghostnet_100 ghostnetv2_100 gmixer_24_224 gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny "
        "hgnetv2_b0 hrnet_w18_small inception_next_tiny inception_resnet_v2 inception_v4 lambda_resnet26t "
        "lcnet_050 legacy_senet154 levit_128s mambaout_femto mixer_s32_224 mixnet_s mnasnet_small "
        "mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 "
        "mobilevit_xxs mobilevitv2_050 mvitv2_tiny nf_regnet_b0 nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0 "
        "regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d resnetv2_50 "
        "resnetv2_50x1_bit resnet26t rexnet_100 rexnetr_200 selecsls42 semnasnet_075 seresnet18 skresnet18 "
        "spnasnet_100 starnet_s1 swiftformer_xs tinynet_e tiny_vit_5m_224 tresnet_m twins_svt_small visformer_tiny "
        "vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224"
    ),
    "pytorchcv": (
        "resnet10 preresnet10 resnext14_16x4d seresnet10 sepreresnet10 resneta10 bam_resnet18 cbam_resnet18 "
        "resattnet56 pyramidnet101_a360 diracnet18v2 sharesnet18 densenet121 condensenet74_c4_g4 sparsenet121 "
        "peleenet wrn50_2 drnc26 dpn68 darknet_ref darknet_tiny darknet19 darknet53 channelnet irevnet301 bagnet9 "
        "dla34 fishnet99 xdensenet121_2 dicenet_wd5 hrnet_w18_small_v1 vovnet27s selecsls42 hardnet39ds "
        "squeezenet_v1_0 squeezeresnet_v1_0 sqnxt23_w1 shufflenet_g1_wd4 shufflenetv2_wd2 shufflenetv2b_wd2 "
        "menet108_8x1_g3 mobilenet_wd4 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_wd2 igcv3_wd4 ghostnet "
        "mnasnet_small darts proxylessnas_cpu fbnet_cb xception inceptionv3 inceptionv4 inceptionresnetv2 polynet "
        "nasnet_4a1056 pnasnet5large efficientnet_b0 mixnet_s octresnet10_ad2 "
        "isqrtcovresnet18 resnet20_cifar10 nin_cifar10 ror3_56_cifar10 rir_cifar10 wrn16_10_cifar10 msdnet22 zfnet "
        "alexnet vgg11 bn_vgg11 bninception resnetd50b"
    ),
    "smp": "resnet18 se_resnet50 dpn68 vgg11_bn efficientnet-b0 mobileone_s0 mit_b0 xception timm-skresnet18",
}
"""One network of each family, by library."""

SIDES = (64, 96, 128, 160)
"""Pixels a side that are tried before a network's own: small enough to be quick, and maps stay larger than a pixel."""

OWN_SIDE = 224
"""Pixels a side of a network that does not say."""

LIBRARIES = ("timm", "torchvision", "pytorchcv.model_provider", "segmentation_models_pytorch", "onnxruntime")
"""What is imported once, before the processes begin."""


class Encoder(nn.Module):
    """An encoder that gives maps at several scales, with a classification head on the last."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from segmentation_models_pytorch.encoders import get_encoder

        self.encoder = get_encoder(name, weights=None)
        self.head = nn.Linear(self.encoder.out_channels[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [N, 3, H, W] to logits [N, 10]."""
        logits: torch.Tensor = self.head(self.encoder(x)[-1].mean((2, 3)))
        return logits


def build(name: str) -> tuple[nn.Module, zsq.ImageSpec]:
    """Return a network with random weights and settled batch norms at the smallest size that it takes, and what it
    takes."""
    faults = []
    for network, side in candidates(name):
        try:
            settle(network, 3, side)
            with torch.no_grad():
                found = network(torch.zeros(2, 3, side, side))
        except Exception as error:  # noqa: BLE001 - the next size is tried
            faults.append(error)
            continue
        classes = found.shape[1] if isinstance(found, torch.Tensor) else 1000
        return network, zsq.ImageSpec(
            channels=3, height=side, width=side, classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3
        )
    raise faults[-1]


def candidates(name: str) -> Iterator[tuple[nn.Module, int]]:
    """Yield the network, made anew for each side, the smallest first and its own last."""
    library, _, model = name.partition(":")
    if library == "timm":
        yield from timm_candidates(model)
        return
    for side in SIDES:
        with contextlib.suppress(TypeError, ValueError):
            yield plain(library, model, image_size=side), side
    network = plain(library, model)
    own = 299 if "inception" in model else OWN_SIDE
    yield network, getattr(network, "in_size", (own, own))[0]


def timm_candidates(model: str) -> Iterator[tuple[nn.Module, int]]:
    """Yield a network of timm; transformers must be told the size, others do not take it."""
    import timm

    for side in SIDES:
        for told in ({"img_size": side}, {}):
            with contextlib.suppress(TypeError, ValueError, AssertionError, RuntimeError):
                yield timm.create_model(model, pretrained=False, **told), side
                break
    network = timm.create_model(model, pretrained=False)
    yield network, network.default_cfg["input_size"][1]


def plain(library: str, model: str, image_size: int | None = None) -> nn.Module:
    """Return a network of a library that tells few networks their size."""
    network: nn.Module
    if library == "torchvision":
        import torchvision

        told = {"image_size": image_size} if image_size and model.startswith("vit") else {}
        network = torchvision.models.get_model(model, weights=None, **told)
    elif library == "smp":
        network = Encoder(model)
    else:
        from pytorchcv.model_provider import get_model

        network = get_model(model, pretrained=False)
    return network


@torch.no_grad()
def settle(network: nn.Module, channels: int, side: int) -> None:
    """Draw weights that begin at zero, let batch norms take the statistics of a batch of noise, and end training mode.

    A head of zeros, as MLP-Mixers have before training, gives all images the same logits.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
            module.reset_parameters()
    if norms:
        network(torch.randn(4, channels, side, side))
    network.eval()


def go_through(name: str, *, rehearse_only: bool = False) -> dict[str, Any]:
    """Take one network all the way, or through the rehearsal alone, and return what came of it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        network, spec = build(name)
    except Exception as error:  # noqa: BLE001 - any fault of a library is a row of the table
        traceback.print_exc()
        return {"outcome": "not built", "said": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    take = rehearsed if rehearse_only else quantized
    try:
        row = {"outcome": "rehearsed" if rehearse_only else "passed", **take(network, spec)}
    except ZsqError as error:
        row = {"outcome": "refused", "said": str(error)[:400]}
    except Exception as error:  # noqa: BLE001 - what should have been an error of ours
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row = {"outcome": "traceback", "said": f"{type(error).__name__}: {error} ({where})".splitlines()[0][:400]}
    return {"side": spec.height, **row, "seconds": round(time.perf_counter() - start, 1)}


def quantized(network: nn.Module, spec: zsq.ImageSpec) -> dict[str, Any]:
    """Take a built network all the way."""
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    settings = {"quantizer.num_samples": 16, "quantizer.steps": 3, "method.batch_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        result = zsq.quantize(
            network,
            spec,
            method="zscgan" if has_norm else "noise",
            quantizer="qat",
            settings=settings | ({"method.steps": 3} if has_norm else {}),
            out=Path(folder) / "run",
            quiet=True,
        )
    return {"decided": result.record.verification.num_decided, **shares(result.record.coverage)}


def rehearsed(network: nn.Module, spec: zsq.ImageSpec) -> dict[str, Any]:
    """Write and check the file of the untrained student, and see that its gradients are finite."""
    teacher, run, quantizer = teacher_from_module(network, spec), Run(), QAT(num_samples=8)
    found = rehearse(teacher, quantizer, run)
    images = torch.randn(8, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(1))
    quick = PTQ(range_rule="minmax", range_sigmas=0.0, bias_correction=False, weight_rounding="nearest")
    labels = torch.zeros(len(images), dtype=torch.int64)
    student = quantize_ptq(teacher.network, lambda: iter([Batch(images, labels)]), quick, run, learnable=True)
    student(images[:4]).logsumexp(1).sum().backward()
    faulty = [n for n, p in student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if faulty:
        raise ZsqError(f"gradients are not finite: {', '.join(faulty[:3])} and so on, {len(faulty)} in all.")
    return shares(found)


def shares(found: Coverage | None) -> dict[str, Any]:
    """Return what stays float, in percent, and the kinds of operators that do."""
    if found is None:
        return {}
    kinds = Counter[str]()
    for name, percent in found.float_operations.items():
        kinds[name.partition(" in ")[0].partition(":")[0]] += percent  # type: ignore[assignment]
    return {
        "float_weights_percent": round(found.float_weight_share, 2),
        "float_operations_percent": round(found.float_operation_share, 2),
        "float_kinds": {kind: round(percent, 3) for kind, percent in kinds.most_common()},
    }


def main() -> None:
    """Take every network through, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="LIBRARY:NAME; default: one of each family")
    parser.add_argument("--seconds", type=int, default=900, help="most for one network")
    parser.add_argument("--rehearse", action="store_true", help="without a fit")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    names = given.networks or [f"{kind}:{name}" for kind, text in FAMILIES.items() for name in text.split()]
    counts: Counter[str] = Counter()
    for name in names:
        row = in_process(name, given.seconds, rehearse_only=given.rehearse)
        counts[row["outcome"]] += 1
        if given.no_record:
            print(name, row, flush=True)
        else:
            append("coverage", {"network": name, **row, "processor": processor()})
    print(dict(counts))


def in_process(name: str, seconds: int, *, rehearse_only: bool) -> dict[str, Any]:
    """Return what came of a network in a process of its own, which finds all libraries imported."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send, args=(name, sender, rehearse_only))
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"outcome": "too slow", "said": f"more than {seconds} s"}
        row: dict[str, Any] = receiver.recv()
        return row
    except EOFError:
        child.join()
        return {"outcome": "crashed", "said": f"exit code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def send(name: str, sender: Connection, rehearse_only: bool) -> None:
    """Send what came of a network."""
    sender.send(go_through(name, rehearse_only=rehearse_only))


if __name__ == "__main__":
    main()

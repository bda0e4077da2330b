"""Which networks of the zoos go through from teacher to checked file?

    python benchmarks/coverage.py                          # one network of each family
    python benchmarks/coverage.py timm:resnet18 torchvision:swin_v2_t --seconds 600

Each network gets random weights with settled batch norms, and a process of its own: INT8, three generator steps where
it has batch norm (else noise), three steps of distillation, files and their check. Needs the libraries that the names
begin with. Appends a line a network to benchmarks/results/coverage.jsonl and prints the counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from machine import processor
from records import append
from torch import nn

import zsq
from zsq.errors import ZsqError

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
        "nasnet_4a1056 pnasnet5large efficientnet_b0 efficientnet_edge_small mixnet_s octresnet10_ad2 "
        "isqrtcovresnet18 resnet20_cifar10 nin_cifar10 ror3_56_cifar10 rir_cifar10 wrn16_10_cifar10 msdnet22 zfnet "
        "alexnet vgg11 bn_vgg11 bninception resnetd50b lwopenpose2d_mobilenet_cmupan_coco"
    ),
}
"""One network of each family, by library."""

SIDE = 224
"""Pixels a side, unless the network knows another."""


def build(name: str) -> tuple[nn.Module, zsq.ImageSpec]:
    """Return a network with random weights and settled batch norms, and what it takes."""
    library, _, model = name.partition(":")
    channels, side = 3, SIDE
    if library == "timm":
        import timm

        network = timm.create_model(model, pretrained=False)
        channels, side, _ = network.default_cfg["input_size"]
    elif library == "torchvision":
        import torchvision

        network = torchvision.models.get_model(model, weights=None)
        side = 299 if "inception" in model else SIDE
    else:
        from pytorchcv.model_provider import get_model

        network = get_model(model, pretrained=False)
        side = getattr(network, "in_size", (SIDE, SIDE))[0]
    settle(network, channels, side)
    with torch.no_grad():
        found = network(torch.zeros(1, channels, side, side))
    classes = found.shape[1] if isinstance(found, torch.Tensor) else 1000
    spec = zsq.ImageSpec(channels=channels, height=side, width=side, classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3)
    return network, spec


@torch.no_grad()
def settle(network: nn.Module, channels: int, side: int) -> None:
    """Let batch norms take the statistics of a batch of noise, and leave training mode."""
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
    if norms:
        network(torch.randn(4, channels, side, side))
    network.eval()


def go_through(name: str) -> dict[str, Any]:
    """Take one network all the way, and return what came of it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        network, spec = build(name)
    except Exception as error:  # noqa: BLE001 - any fault of a library is a row of the table
        return {"outcome": "not built", "said": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    small = {"quantizer.num_samples": 16, "quantizer.steps": 3}
    method = {"method.steps": 3, "method.batch_size": 4} if has_norm else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = zsq.quantize(
                network,
                spec,
                method="zscgan" if has_norm else "noise",
                quantizer="qat",
                settings=small | method | ({} if has_norm else {"method.batch_size": 4}),
                out=Path(folder) / "run",
                quiet=True,
            )
        except ZsqError as error:
            return {"outcome": "refused", "said": str(error)[:400], "seconds": round(time.perf_counter() - start, 1)}
        except Exception as error:  # noqa: BLE001 - what should have been an error of ours
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            return {"outcome": "traceback", "said": f"{type(error).__name__}: {error} ({where})".splitlines()[0][:400]}
    found = result.record.coverage
    return {
        "outcome": "passed",
        "seconds": round(time.perf_counter() - start, 1),
        "decided": result.record.verification.num_decided,
        "float_weights_percent": None if found is None else round(found.float_weight_share, 2),
        "float_operations_percent": None if found is None else round(found.float_operation_share, 2),
    }


def main() -> None:
    """Take every network through, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="LIBRARY:NAME; default: one of each family")
    parser.add_argument("--seconds", type=int, default=900, help="most for one network")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(go_through(given.alone)))
        return
    names = given.networks or [f"{kind}:{name}" for kind, text in FAMILIES.items() for name in text.split()]
    counts: Counter[str] = Counter()
    for name in names:
        row = in_process(name, given.seconds)
        counts[row["outcome"]] += 1
        if given.no_record:
            print(name, row, flush=True)
        else:
            append("coverage", {"network": name, **row, "processor": processor()})
    print(dict(counts))


def in_process(name: str, seconds: int) -> dict[str, Any]:
    """Return what came of a network in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--alone", name],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "too slow", "said": f"more than {seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"outcome": "crashed", "said": (done.stderr.strip().splitlines() or ["no word"])[-1][:400]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    main()

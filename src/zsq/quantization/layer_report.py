"""What rounding does to each layer, measured on a few images: noise, use of the integers, share of the damage."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.observe import ObservedTeacher
from zsq.graph.outputs import outputs_of
from zsq.quantization.prepare import Student, prepared_layers, quantized_weight, weight_name, weight_node
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, set_mode
from zsq.training.answers import Answers
from zsq.training.losses import gaussian_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer with the activation that it feeds; None where there is nothing to measure."""

    name: str
    """Of its weight."""
    weight_bits: int
    """Width of its weight."""
    values: int
    """Of its weight."""
    batch_norm_gap: float | None = None
    """KL divergence of the samples' statistics from those that the batch norm behind it stores, nats a channel."""
    weight_use: float
    """Percent of its integers' reach that a channel's weights fill, averaged over channels."""
    activation_use: float | None = None
    """Percent of the integers of the activation behind it that occur in the samples."""
    sqnr: float | None = None
    """Signal over quantization noise of that activation in dB, noise of earlier layers included; None without noise."""
    damage: float
    """Percent: how far the answers move when this layer alone is rounded, over the sum of that over all layers."""


WORK = 3_000_000
"""Positions of inputs, times layers, on which damage and noise are measured: some seconds on one core."""


def measured_images(layers: int, positions: int) -> int:
    """Return on how many images of so many positions damage and noise are measured: one at least."""
    return max(1, WORK // max(1, layers * positions))


@torch.no_grad()
def layer_reports(student: Student, network: GraphModule, images: Tensor) -> tuple[LayerReport, ...]:
    """Measure each layer of a calibrated student against the same student with its quantizers off.

    Args:
        student: its quantizers on; left so.
        network: the float graph with its batch norms.
        images: [N, C, ...] on the student's device, at least one. All of them give the statistics; of damage and noise,
            which take a pass a layer, see `measured_images`.
    """
    layers = prepared_layers(student.network)
    few = images[: measured_images(len(layers), images[0, 0].numel())]
    behind = {layer: _activation_behind(student.network, layer) for layer in layers}
    gaps = _gaps(network, images)
    was_training = student.training
    student.eval()
    try:
        measured = {name: _Noise(student.network.get_submodule(name)) for name in behind.values() if name}
        damages = _damages(student, layers, behind, few)
        for image in few.split(1):
            for mode, take in (("off", "keep"), ("quantize", "compare")):
                set_mode(student, mode)  # type: ignore[arg-type]
                with _watched(measured, take):
                    student(image)
    finally:
        set_mode(student, "quantize")
        student.train(was_training)
    total = sum(damages) or 1.0
    found = []
    for layer, damage in zip(layers, damages, strict=True):
        quantizer, weight = quantized_weight(student.network, layer)
        name = str(weight_node(layer)[1].target)
        noise = measured.get(behind[layer] or "")
        found.append(
            LayerReport(
                name=name,
                weight_bits=quantizer.bits,
                values=weight.numel(),
                batch_norm_gap=gaps.get(name),
                weight_use=_weight_use(quantizer, weight),
                activation_use=noise.use if noise else None,
                sqnr=noise.decibels if noise else None,
                damage=round(100 * damage / total, 4),
            )
        )
    return tuple(found)


def _activation_behind(network: GraphModule, layer: Node) -> str | None:
    """Return the name of the quantizer that rounds what a layer feeds; None where there is none on a single path."""
    node = layer
    while True:
        if len(node.users) != 1:
            called = [user for user in node.users if user.op == "call_module"]
            node = called[0] if len(called) == 1 else layer
        else:
            (node,) = node.users
        if node is layer or node.op == "output":
            return None
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            return str(node.target) if isinstance(module, ActivationQuantizer) else None


def _weight_use(quantizer: WeightQuantizer, weight: Tensor) -> float:
    largest = weight.detach().reshape(len(quantizer.scale), -1).abs().amax(1)
    return round(100 * float((largest / quantizer.scale / quantizer.quant_max).clamp(max=1).mean()), 4)


class _Noise:
    """Sums of one quantizer's signal and noise over images."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        self.quantizer, self.signal, self.noise = quantizer, 0.0, 0.0
        self.kept: Tensor | None = None
        self.seen = torch.zeros(quantizer.quant_max - quantizer.quant_min + 1, dtype=torch.bool)

    def keep(self, value: Tensor) -> None:
        """Take what the float network gives."""
        self.kept = value

    def compare(self, value: Tensor) -> None:
        """Take what the quantized network gives for the same image."""
        assert self.kept is not None
        self.signal += float(self.kept.double().square().sum())
        self.noise += float((value - self.kept).double().square().sum())
        steps = (value / self.quantizer.scale + self.quantizer.zero_point).round().long().flatten().cpu()
        self.seen[(steps - self.quantizer.quant_min).clamp(0, len(self.seen) - 1)] = True
        self.kept = None

    @property
    def decibels(self) -> float | None:
        """Signal over noise."""
        return round(10 * math.log10(self.signal / self.noise), 2) if self.signal and self.noise else None

    @property
    def use(self) -> float:
        """Percent of the integers that occur."""
        return round(100 * float(self.seen.double().mean()), 2)


@contextmanager
def _watched(measured: dict[str, _Noise], take: str) -> Iterator[None]:
    """Hand what quantizers give to their sums."""

    def hook(noise: _Noise) -> Callable[..., None]:
        return lambda module, given, value: getattr(noise, take)(value)

    handles = [noise.quantizer.register_forward_hook(hook(noise)) for noise in measured.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _damages(student: Student, layers: list[Node], behind: dict[Node, str | None], images: Tensor) -> list[float]:
    """Return how far the answers move with each layer alone rounded, with the activation that it feeds."""
    answers = Answers(outputs_of(student.network))
    set_mode(student, "off")
    wanted, found = student(images), []
    for layer in layers:
        names = [str(weight_node(layer)[0].target), *filter(None, [behind[layer]])]
        alone = [student.network.get_submodule(name) for name in names]
        for module in alone:
            module.mode = "quantize"  # type: ignore[assignment]
        found.append(max(0.0, float(answers.distance(wanted, student(images)))))
        for module in alone:
            module.mode = "off"  # type: ignore[assignment]
    return found


def _gaps(network: GraphModule, images: Tensor) -> dict[str, float]:
    """Return the gap of each batch norm that stands right behind a layer, by the name of the layer's weight."""
    norms = batch_norms(network)
    if not norms:
        return {}
    _, statistics = ObservedTeacher(network).to(images.device)(images)
    stored = set(edit.layers(network))
    gaps = {}
    for norm, (mean, var) in zip(norms, statistics, strict=True):
        layer = norm.node.args[0]
        if layer in stored and isinstance(layer, Node):
            kl = gaussian_kl(mean, var + norm.eps, norm.mean, norm.var + norm.eps)
            gaps[weight_name(layer)] = round(float(kl) / len(norm.mean), 6)
    return gaps

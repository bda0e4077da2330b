"""Round each layer's weight so that the error of one value is made up for by those that are rounded after it (GPTQ)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from zsq.graph import edit
from zsq.graph.edit import argument, aten
from zsq.quantization.bias_correction import biased_layers
from zsq.quantization.fake_quantize import grid_integers
from zsq.quantization.prepare import Student, prepared_layers, quantized_weight
from zsq.runtime.random_streams import stream
from zsq.types import Statistics

ROWS = 20_000
"""Inputs of a filter from which its covariance is taken."""

DAMPING = 0.1
"""Share of the mean variance that is added to each input's: images that are few, and not the real ones, tell no more of
the covariances than that. GPTQ takes 0.01 with real data."""

BLOCK = 64
"""Inputs after which an error is spread over all that follow."""

SMALLEST_STD = 1e-5
"""Standard deviation of an input below which images say nothing of its correlations."""

AT_ONCE = 4
"""Images whose patches are held at once."""


def rounded(weight: Tensor, covariance: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the point of the grid that changes a layer's output little, one input after the other.

    Args:
        weight: [G, O, I], groups, outputs and inputs of a group.
        covariance: of the inputs, [G, I, I].
        scale: step of the grid, [G, O].
        quant_min, quant_max: ends of the grid in steps.

    Returns:
        [G, O, I].

    Source: Frantar et al. 2023, GPTQ, algorithm 1; inputs in the order of their variances.
    """
    left, covariance = weight.double(), covariance.double()
    variances = covariance.diagonal(dim1=1, dim2=2)
    damping = variances.mean(1, keepdim=True) * DAMPING
    damping = torch.where(damping > 0, damping, 1.0)
    order = variances.argsort(dim=1, descending=True, stable=True)
    covariance = covariance + torch.diag_embed(damping.expand_as(variances))
    covariance = covariance.gather(1, order[:, :, None].expand_as(covariance))
    covariance = covariance.gather(2, order[:, None, :].expand_as(covariance))
    left = left.gather(2, order[:, None, :].expand_as(left))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    spread = torch.linalg.cholesky(inverse, upper=True)
    step, zero = scale.double(), scale.new_zeros((), dtype=torch.double)
    result = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        end = min(start + BLOCK, left.shape[2])
        errors = torch.empty_like(left[:, :, start:end])
        for i in range(start, end):
            value = left[:, :, i]
            result[:, :, i] = grid_integers(value, step, zero, quant_min, quant_max) * step
            error = (value - result[:, :, i]) / spread[:, i, i, None]
            errors[:, :, i - start] = error
            left[:, :, i:end] -= error[:, :, None] * spread[:, i, None, i:end]
        left[:, :, end:] -= errors @ spread[:, start:end, end:]
    return torch.empty_like(result).scatter_(2, order[:, None, :].expand_as(result), result).to(weight.dtype)


def patches(x: Tensor, layer: Node, weight: Tensor, random: torch.Generator) -> Tensor | None:
    """Return inputs of a layer's filters, [rows, G, I], about `ROWS` of them; None for layers of other kinds.

    Args:
        x: input of the layer, [N, C, H, W] or [..., C].
        layer: a 2d convolution with numbers for its padding, or a linear layer.
        weight: its weight, [G O, I / positions, ...].
        random: chooses positions, the same in all images; on the CPU.
    """
    if layer.target is aten.linear.default:
        return x.reshape(-1, 1, x.shape[-1])
    if layer.target is not aten.conv2d.default:
        return None
    stride, padding, dilation = (argument(layer, index, default) for index, default in ((3, 1), (4, 0), (5, 1)))
    positions = math.prod(layer.meta["val"].shape[2:])
    count = min(positions, max(1, ROWS // len(x)))
    chosen = torch.randperm(positions, generator=random)[:count].to(x.device)
    found = [
        F.unfold(part, weight.shape[2:], dilation, padding, stride)[:, :, chosen].movedim(2, 1)
        for part in x.split(AT_ONCE)
    ]
    return torch.cat(found).reshape(len(x) * count, argument(layer, 6, 1), -1)


def with_stds(covariance: Tensor, stds: Tensor) -> Tensor:
    """Return a covariance [G, I, I] of the same correlations, whose inputs have the given standard deviations.

    Args:
        covariance: of the inputs of filters: positions of a channel follow each other.
        stds: one a channel, [G I / positions].
    """
    groups, inputs = covariance.shape[:2]
    wanted = stds.view(groups, -1).repeat_interleave(groups * inputs // len(stds), 1)
    seen = covariance.diagonal(dim1=1, dim2=2).sqrt()
    factors = torch.where(seen > SMALLEST_STD, wanted / seen, 1.0)
    scaled = covariance * factors[:, :, None] * factors[:, None, :]
    lacking = wanted.square() - scaled.diagonal(dim1=1, dim2=2)
    return scaled + torch.diag_embed(lacking.clamp(min=0))


class _Rounder(Interpreter):
    """Runs the student layer by layer; each layer is rounded by what its rounded predecessors give."""

    def __init__(self, student: Student, known: Statistics | None, seed: int) -> None:
        super().__init__(student.network)
        self.network, self.known, self.seed = student.network, known, seed
        self.layers = set(prepared_layers(student.network))
        self.biases = dict(biased_layers(student))

    def run_node(self, n: Node) -> Any:
        """Run one node; a layer's weight is rounded before."""
        if n in self.layers:
            self._round(n)
        return super().run_node(n)

    def _round(self, layer: Node) -> None:
        quantizer, weight = quantized_weight(self.network, layer)
        assert isinstance(layer.args[0], Node)
        x = self.env[layer.args[0]]
        rows = patches(x, layer, weight, stream(self.seed, f"rounding/{layer.name}", 0))
        if rows is None or quantizer.pair_limit is not None:  # whose pairs are kept for weights as they round
            return
        bias, before = self.biases.get(layer), quantizer(weight)
        mean = rows.mean(0)
        centred = rows - mean if bias is not None else rows  # what is constant, a bias takes
        covariance = torch.einsum("rgi,rgj->gij", centred, centred) / len(rows)
        if bias is not None and self.known is not None:
            covariance = with_stds(covariance, self.known.input_stds[layer.name])
        groups = rows.shape[1]
        scale = quantizer.scale.expand(len(weight)).view(groups, -1)
        flat = weight.reshape(groups, -1, rows.shape[2])
        after = rounded(flat, covariance, scale, quantizer.quant_min, quantizer.quant_max)
        weight.copy_(after.view_as(weight))
        if bias is not None:
            change = after - before.view_as(flat)
            if self.known is None:
                shift = torch.einsum("goi,gi->go", change, mean).flatten()
            else:
                shift = edit.weight_times_mean(change.view_as(weight), self.known.input_means[layer.name])
            stored, *scales = (edit.get_attribute(self.network, str(node.target)) for node in bias.all_input_nodes)
            stored.sub_(shift)
            self.env[bias] = bias.target(stored, *scales)  # type: ignore[operator]
        self.env[layer.args[1]] = quantizer(weight)  # type: ignore[index]


@torch.no_grad()
def round_weights(student: Student, images: Tensor, known: Statistics | None, seed: int) -> None:
    """Replace the student's weights, in place, by points of their grids that change the layers' outputs least.

    Layers' mean outputs stay as they were. Convolutions that are not 2d keep their weights, and so do those whose pairs
    are limited (`pair_sums`).

    Args:
        student: calibrated, its quantizers on.
        images: [N, C, H, W] on the student's device.
        known: means and deviations of the layers' inputs; None: those of the images.
        seed: of the positions that are looked at.
    """
    _Rounder(student, known, seed).run(images)

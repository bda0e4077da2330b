"""All weights of a student, rounded in one launch, and the centred biases that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.runtime.kernels.base import WEIGHT_BLOCK, dense, inner_values, like
from zsq.runtime.kernels.rounding import on_grid

ALIGNMENT = 64
"""Values to whose multiples a rounded weight is moved up: libraries are quickest at addresses such as PyTorch gives."""

READ, WRITE, LENGTH, FIRST, COUNT, SCALE, BIAS, MEAN, INPUTS, INNER, LOW, HIGH = (tl.constexpr(i) for i in range(12))
"""Rows of `Tables.places`."""


@dataclass(frozen=True)
class Layer:
    """What is known of a layer's weight before the first step."""

    weight: Tensor
    """[C, ...]; its values are read at each step."""
    inputs: int | None
    """Channels of the mean input from which its bias follows; None: it has no bias."""
    scales: int
    """C, or 1 for all channels."""
    least: int
    most: int
    factor: float
    """Of the gradients of its scales."""


class Tables:
    """Where each output channel of all layers has its values and what belongs to it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.shapes: list[tuple[torch.Size, tuple[int, ...], int]] = []
        read = write = bias = mean = scale = channels = 0
        rows: list[tuple[int, ...]] = []
        for layer in layers:
            weight = dense(layer.weight)
            count, length, inputs = len(weight), weight[0].numel(), weight.shape[1]
            self.shapes.append((weight.shape, weight.stride(), write))
            per_group = count * inputs // (layer.inputs or inputs)
            for c in range(count):
                centred = (-1, -1) if layer.inputs is None else (bias + c, mean + c // per_group * inputs)
                start = (read + c * length, write + c * length, length, channels, count)
                ends = (inputs, inner_values(weight), layer.least, layer.most)
                rows.append((*start, scale + (c if layer.scales > 1 else 0), *centred, *ends))
            read += weight.numel()
            write += triton.cdiv(weight.numel(), ALIGNMENT) * ALIGNMENT
            channels, scale = channels + count, scale + layer.scales
            if layer.inputs is not None:
                bias, mean = bias + count, mean + layer.inputs
        device = layers[0].weight.device
        factors = [layer.factor for layer in layers for _ in range(len(layer.weight))]
        self.places = torch.tensor(rows, dtype=torch.int32, device=device).T.contiguous()
        self.factors = torch.tensor(factors, device=device)
        self.channels, self.size, self.biases, self.scales = channels, write, bias, scale

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of weights and of biases."""
        return len(self.layers), sum(layer.inputs is not None for layer in self.layers)

    def views(self, values: Tensor) -> list[Tensor]:
        """Return each layer's part of [size] values, of the shape and order of its weight."""
        return [values.as_strided(shape, stride, start) for shape, stride, start in self.shapes]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of dense tensors one after the other, in the order in which they lie in memory."""
    return torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])


@triton.jit
def _largest(values_at: tl.tensor, places_at: tl.tensor, out_at: tl.tensor, block: tl.constexpr) -> None:
    channel, channels = tl.program_id(0), tl.num_programs(0)
    start = tl.load(places_at + READ * channels + channel).to(tl.int64)
    length = tl.load(places_at + LENGTH * channels + channel)
    most = tl.zeros([block], dtype=tl.float32)
    for first in range(0, length, block):
        offsets = first + tl.arange(0, block)
        most = tl.maximum(most, tl.abs(tl.load(values_at + start + offsets, mask=offsets < length, other=0.0)))
    tl.store(out_at + channel, tl.max(most))


@triton.jit
def _scale(
    largest_at: tl.tensor,
    scales_at: tl.tensor,
    places_at: tl.tensor,
    dead: tl.constexpr,
    smallest: tl.constexpr,
    followed: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Return the scale of this program's channel, which is stored where it follows the weight's range."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    index = tl.load(places_at + SCALE * channels + channel)
    if followed:
        steps = (tl.load(places_at + HIGH * channels + channel) - tl.load(places_at + LOW * channels + channel)) + 0.0
        first, count = tl.load(places_at + FIRST * channels + channel), tl.load(places_at + COUNT * channels + channel)
        most = tl.zeros([block], dtype=tl.float32)
        for start in range(0, count, block):
            others = start + tl.arange(0, block)
            most = tl.maximum(most, tl.load(largest_at + first + others, mask=others < count, other=0.0))
        widest = tl.div_rn(tl.max(most) * 2, steps)
        next_index = tl.load(places_at + SCALE * channels + first + count - 1)
        shared = next_index == tl.load(places_at + SCALE * channels + first)
        own = tl.where(shared, widest, tl.div_rn(tl.load(largest_at + channel) * 2, steps))
        scale = tl.maximum(own, tl.maximum(widest * dead, smallest))
        tl.store(scales_at + index, scale)
    else:
        scale = tl.load(scales_at + index)
    return scale


@triton.jit
def _means(mean_at: tl.tensor, places_at: tl.tensor, offsets: tl.tensor, here: tl.tensor) -> tl.tensor:
    """Return the mean input that each value of this program's channel meets."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    first, inputs = tl.load(places_at + MEAN * channels + channel), tl.load(places_at + INPUTS * channels + channel)
    inner = tl.load(places_at + INNER * channels + channel)
    return tl.load(mean_at + first + (offsets // inner) % inputs, mask=here & (first >= 0), other=0.0)


@triton.jit
def _round(
    values_at: tl.tensor,
    out_at: tl.tensor,
    largest_at: tl.tensor,
    scales_at: tl.tensor,
    outputs_at: tl.tensor,
    means_at: tl.tensor,
    biases_at: tl.tensor,
    places_at: tl.tensor,
    dead: tl.constexpr,
    smallest: tl.constexpr,
    followed: tl.constexpr,
    block: tl.constexpr,
) -> None:
    channel, channels = tl.program_id(0), tl.num_programs(0)
    scale = _scale(largest_at, scales_at, places_at, dead, smallest, followed, block)
    read = tl.load(places_at + READ * channels + channel).to(tl.int64)
    write = tl.load(places_at + WRITE * channels + channel).to(tl.int64)
    length, bias = tl.load(places_at + LENGTH * channels + channel), tl.load(places_at + BIAS * channels + channel)
    low, high = tl.load(places_at + LOW * channels + channel), tl.load(places_at + HIGH * channels + channel)
    total = tl.zeros([block], dtype=tl.float32)
    for first in range(0, length, block):
        offsets = first + tl.arange(0, block)
        here = offsets < length
        y = on_grid(tl.load(values_at + read + offsets, mask=here, other=0.0), scale, scale * 0.0, low, high)
        tl.store(out_at + write + offsets, y, mask=here)
        total += y * _means(means_at, places_at, offsets, here)
    if bias >= 0:
        tl.store(biases_at + bias, tl.load(outputs_at + bias) - tl.sum(total))


@triton.jit
def _round_back(
    values_at: tl.tensor,
    given_at: tl.tensor,
    given_biases_at: tl.tensor,
    passed_at: tl.tensor,
    slopes_at: tl.tensor,
    scales_at: tl.tensor,
    factors_at: tl.tensor,
    means_at: tl.tensor,
    places_at: tl.tensor,
    half_step: tl.constexpr,
    block: tl.constexpr,
) -> None:
    channel, channels = tl.program_id(0), tl.num_programs(0)
    scale = tl.load(scales_at + tl.load(places_at + SCALE * channels + channel))
    read = tl.load(places_at + READ * channels + channel).to(tl.int64)
    write = tl.load(places_at + WRITE * channels + channel).to(tl.int64)
    length, bias = tl.load(places_at + LENGTH * channels + channel), tl.load(places_at + BIAS * channels + channel)
    low, high = tl.load(places_at + LOW * channels + channel), tl.load(places_at + HIGH * channels + channel)
    given_bias = tl.load(given_biases_at + bias, mask=bias >= 0, other=0.0)
    sums = tl.zeros([block], dtype=tl.float32)
    for first in range(0, length, block):
        offsets = first + tl.arange(0, block)
        here = offsets < length
        x = tl.load(values_at + read + offsets, mask=here, other=0.0)
        given = tl.load(given_at + read + offsets, mask=here, other=0.0)
        given -= given_bias * _means(means_at, places_at, offsets, here)
        y = on_grid(x, scale, scale * 0.0, low, high)
        steps = tl.div_rn(y - x, scale)
        inside = tl.abs(steps) < half_step
        tl.store(passed_at + write + offsets, tl.where(inside, given, 0.0), mask=here)
        sums += tl.where(inside, steps, tl.div_rn(y, scale)) * given
    tl.store(slopes_at + channel, tl.sum(sums) * tl.load(factors_at + channel))


class RoundWeights(torch.autograd.Function):
    """`quantization.training_view.RoundedWeights`: the weights on their grids, and for each bias the centred one."""

    @staticmethod
    def forward(
        ctx: Any,
        tables: Tables,
        grid: tuple[float, float, float, bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Round.

        Args:
            ctx: of autograd.
            tables: of the layers.
            grid: the least scale over the largest one's, the least scale, half a step, and whether scales are to
                follow the weights.
            tensors: weights, and of the layers with a bias mean outputs and mean inputs, and all scales.
        """
        layers, centred = tables.counts
        weights, outputs = tensors[:layers], tensors[layers : layers + centred]
        means, scales = tensors[layers + centred : layers + 2 * centred], tensors[layers + 2 * centred :]
        dead, smallest, half_step, followed = grid
        values = _flat([dense(weight) for weight in weights])
        mean, output = (_flat(some) if centred else values for some in (means, outputs))
        scale = values.new_empty(tables.scales) if followed else _flat(scales)
        largest = values.new_empty(tables.channels)
        rounded, biases = values.new_empty(tables.size), values.new_empty(tables.biases)
        launch = (tables.channels,)
        if followed:
            _largest[launch](values, tables.places, largest, WEIGHT_BLOCK)
        given = (values, rounded, largest, scale, output, mean, biases, tables.places)
        _round[launch](*given, dead, smallest, followed, WEIGHT_BLOCK)
        if followed:
            torch._foreach_copy_(list(scales), list(scale.split([layer.scales for layer in tables.layers])))
        ctx.save_for_backward(values, scale, mean, *weights)
        ctx.tables, ctx.half_step, ctx.trained = tables, half_step, not followed
        sizes = [len(bias) for bias in outputs]
        return *tables.views(rounded), *(biases.split(sizes) if sizes else ())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights, mean outputs and scales."""
        values, scale, mean, *weights = ctx.saved_tensors
        tables, (layers, centred) = ctx.tables, ctx.tables.counts
        given = _flat([like(grad, dense(weight)) for grad, weight in zip(grads, weights, strict=False)])
        biases = grads[layers:]
        given_biases = _flat([grad.contiguous() for grad in biases]) if centred else values
        passed, slopes = values.new_empty(tables.size), values.new_empty(tables.channels)
        state = (values, given, given_biases, passed, slopes, scale, tables.factors, mean, tables.places)
        _round_back[(tables.channels,)](*state, ctx.half_step, WEIGHT_BLOCK)
        of_scales: list[Tensor | None] = [None] * layers
        if ctx.trained:
            parts = slopes.split([len(layer.weight) for layer in tables.layers])
            of_scales = [
                part if layer.scales > 1 or len(part) == 1 else part.sum(0, keepdim=True)
                for part, layer in zip(parts, tables.layers, strict=True)
            ]
        return None, None, *tables.views(passed), *biases, *[None] * centred, *of_scales

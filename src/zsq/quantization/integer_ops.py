"""Hard swish, hard sigmoid, SiLU, GELU and batch norms that stand alone, on the integers of a grid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.quantization.fake_quantize import quantize_bias

HARD_REACH = 3.0
"""Hard sigmoid, and so the gate of hard swish, opens at minus this and ends at this."""

LARGEST_FACTOR = 127
"""Integer that stands for the factor of a batch norm's channel, whatever the width of the weights."""

LARGEST_OFFSET = 2.0**30
"""Integer of a batch norm's shift that leaves room in int32 for the product beside it."""

SMALLEST_STEP = 1e-20
"""Of a factor: its product with a step of the input is still a float32."""

GATE_LEVELS = 255
"""Steps of a sigmoid's grid, whatever the width of activations: from 0 to 1 in 8 bits, without a sign."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate made of a sigmoid: its 8-bit integers q, clipped and read as (q - margin) / (255 - 2 margin)."""

    slope: float = 1.0
    """Factor of the sigmoid's argument."""
    margin: int = 0
    """Integers at both ends of the grid that count as 0 and as 1."""

    @property
    def span(self) -> int:
        """Steps from 0 to 1."""
        return GATE_LEVELS - 2 * self.margin


SIGMOID = Gate()
"""The gate of SiLU."""

NORMAL = Gate(slope=1.6759, margin=2)
"""The gate of GELU, the normal distribution's function: times x, it is off by 0.0073 at most. The margin cuts the tails
of the sigmoid, which are the heavier ones; without it, the best slope is off by 0.0139, and 1.702 by 0.0203."""


def hardswish_steps(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return 3 and 6 in steps of a grid, rounded: where the gate of `grid_hardswish` opens and ends."""
    return (HARD_REACH / scale).round(), (2 * HARD_REACH / scale).round()


def grid_hardswish(x: Tensor, scale: Tensor) -> Tensor:
    """Hard swish whose gate is clipped on the grid of its input: x * clip(x + 3', 0, 6') / 6.

    3' and 6' are the multiples of `scale` nearest to 3 and 6, so that an integer Clip makes the gate and an integer
    product the result; no kernel computes in float.

    Args:
        x: values on a grid whose range holds -3; any shape.
        scale: step of the grid, [1]; at 0, before calibration, the plain function.

    Returns:
        As x.
    """
    step = scale.detach()
    three, six = hardswish_steps(step)
    gate = torch.minimum((x / step + three).clamp(min=0), six) * (step / 6)
    return x * torch.where(step > 0, gate, torch.nn.functional.hardsigmoid(x))


def grid_hardsigmoid(x: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Hard sigmoid of a layer's output: clip(x + 3', 0, 6) / 6.

    3' is the multiple nearest to 3 of the step of the layer's bias, which holds it in the file. There, the layer's
    rounding clips, and its integers are read on a grid six times as fine: nothing is left to compute.

    Args:
        x: [N, C, ...].
        activation_scale: of the layer's input, [1]; at 0, before calibration, the plain function.
        weight_scale: [C] or [1].

    Returns:
        As x.
    """
    three = quantize_bias(torch.full_like(weight_scale, HARD_REACH), activation_scale, weight_scale)
    return (x + three.detach().view(1, -1, *[1] * (x.dim() - 2))).clamp(0, 2 * HARD_REACH) / (2 * HARD_REACH)


class _GridGate(torch.autograd.Function):
    """`grid_gate`; its gradient is that of the gate before it is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gate = gate
        integers = (x * gate.slope).sigmoid_().mul_(GATE_LEVELS).round_()
        return integers.clamp_(gate.margin, GATE_LEVELS - gate.margin).sub_(gate.margin).div_(gate.span).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,), gate = ctx.saved_tensors, ctx.gate
        sigmoid = torch.sigmoid(x * gate.slope)
        value = sigmoid.mul(GATE_LEVELS).sub_(gate.margin).div_(gate.span)
        slope = sigmoid * (1 - sigmoid) * (gate.slope * GATE_LEVELS / gate.span)
        slope = slope.masked_fill_((value < 0) | (value > 1), 0)
        return grad * torch.addcmul(value.clamp_(0, 1), x, slope), None


def grid_silu(x: Tensor) -> Tensor:
    """SiLU whose sigmoid is rounded to 8 bits: an integer sigmoid and an integer product.

    Args:
        x: any shape.

    Returns:
        As x.
    """
    rounded: Tensor = _GridGate.apply(x, SIGMOID)  # type: ignore[no-untyped-call]
    return rounded


def grid_gelu(x: Tensor) -> Tensor:
    """GELU as the product of x and of an integer sigmoid, stretched and clipped (see `NORMAL`).

    Args:
        x: any shape.

    Returns:
        As x.
    """
    rounded: Tensor = _GridGate.apply(x, NORMAL)  # type: ignore[no-untyped-call]
    return rounded


GATED = {torch.ops.aten.silu.default: grid_silu, torch.ops.aten.gelu.default: grid_gelu}
"""Activation functions that are a product of their input and a gate, and their integer forms."""

GATES: dict[Any, Gate] = {grid_silu: SIGMOID, grid_gelu: NORMAL}
"""The gates of the integer forms."""


def factor_grid(factor: Tensor, shift: Tensor, activation_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers, as float, and steps that stand for a batch norm's factors, each [C].

    They are +-127, and no factor is rounded; but a channel whose shift is very large beside its factor takes a step as
    large as it needs for int32 to hold the shift and the product.

    Args:
        factor, shift: [C].
        activation_scale: step of the grid of the input, [1].
    """
    most = activation_scale.detach() * LARGEST_OFFSET
    needed = torch.where(most > 0, shift.abs() / most.clamp(min=SMALLEST_STEP), most)
    step = torch.maximum(factor.abs() / LARGEST_FACTOR, needed).clamp(min=SMALLEST_STEP)
    return (factor / step).round(), step


def grid_norm(x: Tensor, factor: Tensor, shift: Tensor, activation_scale: Tensor) -> Tensor:
    """Batch norm that stands alone, as the convolution of one integer a channel that the file makes of it.

    Args:
        x: [N, C, ...].
        factor: [C]; kept as it is, see `factor_grid`.
        shift: [C]; rounded to multiples of activation_scale x the factor's step.
        activation_scale: step of the grid of x, [1]; at 0, before calibration, the shift stays as it is.

    Returns:
        As x.
    """
    integers, step = factor_grid(factor, shift, activation_scale)
    shift = quantize_bias(shift, activation_scale, step)
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(by_channel), x, (integers * step).view(by_channel))

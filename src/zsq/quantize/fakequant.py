"""Fake quantization: float tensors that hold only the values an integer file can hold."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsq import parallel
from zsq.gpu import kernels

Mode = Literal["off", "observe", "histogram", "quantize"]

HISTOGRAM_BINS = 2048
MOST_COUNTED = 2**24
"""Values that are counted at a time: `torch.histc` counts in float32, which ends there."""

SMALLEST_SCALE = 1e-8
PIECE = 2**17
"""Values that are rounded at a time: half a MiB, so that all passes over them but the first find them in the cache."""

HALF_STEP = 0.5001
"""What rounding moves a value by at most, in steps, with room for the float's own rounding: beyond lies the outside."""

INT32_LIMIT = float(2**31 - 128)
"""The largest int32 that a float32 holds."""

DEAD_CHANNEL = 2.0**-16
"""Least scale of a channel over the largest of its weight: a channel of zeros needs one that its bias can live on."""


def integer_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of `bits`, two's complement; stored in int8.

    >>> integer_range(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def affine_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid spans [low, high] and holds 0 exactly; an end within half a step of 0 becomes 0.

    The zero point is rounded first and the scale then widened so that no other end is cut off. Keeping the scale, as is
    often done, puts every pixel of an image in [-1, 1] halfway between two grid points. What is always 0 gets the scale
    1: the next layer's bias is held in steps of it, and would saturate with the smallest.

    Args:
        low, high: ends of the range, any equal shape.
        bits: width of the integers.

    Returns:
        Scale and zero point (a float holding an integer), of the same shape.
    """
    quant_min, quant_max = integer_range(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = (quant_min - low / scale).round().clamp(quant_min, quant_max)
    below = torch.where(zero_point > quant_min, -low / (zero_point - quant_min), 0)
    above = torch.where(zero_point < quant_max, high / (quant_max - zero_point), 0)
    scale = torch.maximum(below, above).clamp(min=SMALLEST_SCALE)
    return torch.where(low < high, scale, 1.0), zero_point


def grid_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, out: Tensor | None = None
) -> Tensor:
    """Return the integers of a grid nearest to x, as float: those simulated and those stored."""
    return torch.div(x, scale, out=out).round_().add_(zero_point).clamp_(quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` in passes over memory that the processor's vector units do whole, piece by piece in its cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, factor: float
    ) -> Tensor:
        offset, y = zero_point.round(), torch.empty_like(x)
        for x_piece, y_piece in _pieces(scale, x, y):
            grid_integers(x_piece, scale, offset, quant_min, quant_max, out=y_piece).sub_(offset).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        trained, passed = any(ctx.needs_input_grad[1:3]), torch.empty_like(x)
        grad_scale, lost = torch.zeros_like(scale), scale.new_zeros(())
        for x_piece, y_piece, given, inside in _pieces(scale, x, y, grad, passed):
            steps = (y_piece - x_piece).div_(scale)
            torch.ops.aten.hardtanh_backward(given, steps, -HALF_STEP, HALF_STEP, grad_input=inside)
            if trained:
                outside = given - inside
                grad_scale += _inner(inside, steps, scale) + _inner(outside, y_piece, scale) / scale
                lost += outside.sum()
        if not trained:
            return passed, None, None, None, None, None
        grad_zero = lost * scale * -ctx.factor if ctx.needs_input_grad[2] else None
        return passed, grad_scale * ctx.factor, grad_zero, None, None, None


def _pieces(scale: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return tensors of one shape in the same small, flat parts where they share a scale and lie alike in memory."""
    first = tensors[0]
    if first.is_cuda:  # no cache to keep them in, and every part would cost a start
        return [tensors]
    dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    if scale.numel() > 1 or not dense or any(tensor.stride() != first.stride() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.as_strided((tensor.numel(),), (1,)).split(PIECE) for tensor in tensors), strict=True)


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum a * b over all but the dimensions that `like` has; no temporary for flat tensors."""
    return torch.dot(a, b).view(like.shape) if a.dim() == b.dim() == 1 else (a * b).sum_to_size(like.shape)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, factor: float = 1.0
) -> Tensor:
    r"""Round to a grid and back to float, literally as the file does, division included.

    .. math:: y = s\,(clip(round(x/s) + z, q_{min}, q_{max}) - z)

    Gradients: straight through inside the grid and none outside for x; for the scale (y - x) / s inside and y / s
    outside, for the zero point -s outside, both times `factor`. PyTorch's own CPU kernels took twice as long
    on activations (benchmarks/fakequant.py), and its GPU kernels read the scale back to the host.

    Args:
        x: any shape.
        scale: [1], or [C, 1, ...] for one grid a channel of x [C, ...].
        zero_point: [1]; it is rounded.
        quant_min, quant_max: the smallest and the largest integer.
        factor: of the gradients of scale and zero point.

    Returns:
        As x.

    Source: Esser et al. 2020, LSQ, section 2.1; Bhalgat et al. 2020, LSQ+, section 3.1.
    """
    scale = scale.view(1) if scale.numel() == 1 else scale
    if (fused := kernels(x)) is not None:
        if scale.numel() == 1:
            return fused.FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, factor, HALF_STEP)
        return fused.FakeQuantizeChannels.apply(x, scale.flatten(), quant_min, quant_max, factor, HALF_STEP)
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, factor)


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor per tensor, affine.

    Args:
        bits: width of the integers.
        learnable: train scale and zero point (LSQ+) instead of following a moving average of the range.
        averaging: weight of the newest batch in that moving average.

    Attributes:
        mode: `observe` records the range, `histogram` counts values within it, `quantize` rounds, `off` passes on.
        scale, zero_point: the grid, each [1]; scale is 0 until a range is set.
        low, high: the range seen, each [1].
        reach: what the range holds at least, at most 0; `grid_hardswish` needs its input's to hold -3.
        low_factor, high_factor: what calibration made of the range seen, each [1]; moving averages keep it.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter
    low: Tensor
    high: Tensor
    low_factor: Tensor
    high_factor: Tensor
    histogram: Tensor
    smallest: Tensor

    def __init__(self, bits: int, *, learnable: bool, averaging: float = 0.01) -> None:
        super().__init__()
        self.bits, self.learnable, self.averaging = bits, learnable, averaging
        self.quant_min, self.quant_max = integer_range(bits)
        self.mode: Mode = "off"
        self.register_buffer("smallest", torch.tensor(SMALLEST_SCALE), persistent=False)
        self.average_ranges = False
        self.reach = 0.0
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=learnable)
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=learnable)
        self.register_buffer("low", torch.full((1,), math.inf))
        self.register_buffer("high", torch.full((1,), -math.inf))
        self.register_buffer("low_factor", torch.ones(1))
        self.register_buffer("high_factor", torch.ones(1))
        self.register_buffer("histogram", torch.zeros(HISTOGRAM_BINS, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        if self.mode == "quantize":
            return self._quantize(x)
        if self.mode == "observe":
            self._observe(x, self.averaging if self.average_ranges else None)
        elif self.mode == "histogram":
            low, high = self.low.item(), self.high.item()
            if low < high:
                for values in x.detach().float().flatten().split(MOST_COUNTED):
                    self.histogram += torch.histc(values, HISTOGRAM_BINS, low, high)
        return x

    def choose_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high], chosen from the range seen; moving averages scale with it."""
        self.low_factor.copy_(torch.where(self.low != 0, low / self.low, 1))
        self.high_factor.copy_(torch.where(self.high != 0, high / self.high, 1))
        self.set_range(low, high)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high]."""
        scale, zero_point = affine_grid(low.view(1).clamp(max=self.reach), high.view(1), self.bits)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def _observe(self, x: Tensor, averaging: float | None) -> None:
        low, high = _seen(x)
        widest = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if averaging is not None:
            known = torch.isfinite(self.low)  # not read here: on a GPU, that would wait for the device
            low, high = (torch.lerp(old, new, averaging) for old, new in ((self.low, low), (self.high, high)))
            widest = torch.where(known, low, widest[0]), torch.where(known, high, widest[1])
        self.low.copy_(widest[0])
        self.high.copy_(widest[1])

    def _quantize(self, x: Tensor) -> Tensor:
        if self.training and not self.learnable:
            if (fused := kernels(x)) is not None:
                fused.follow(self, _seen(x), SMALLEST_SCALE)
            else:
                self._observe(x, self.averaging)
                self.set_range(self.low * self.low_factor, self.high * self.high_factor)
        factor = 1 / math.sqrt(max(1, x[0].numel()) * self.quant_max)
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max, factor)


@torch.no_grad()
def _seen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of all processes, each [1]."""
    if (fused := kernels(x)) is not None:
        return parallel.widest(*fused.ends(x.detach()))
    low, high = torch.aminmax(x.detach())
    return parallel.widest(low.view(1), high.view(1))


class WeightQuantizer(nn.Module):
    """Quantizes one weight, symmetric, per output channel or per tensor.

    Args:
        weight: [C, ...].
        bits: width of the integers.
        per_channel: one scale a channel instead of one for all.
        learnable: train the scales (LSQ) instead of following the weight's range.

    Attributes:
        scale: [C] or [1].
        smallest: least value of a scale, [].
    """

    scale: nn.Parameter
    zero_point: Tensor
    smallest: Tensor

    def __init__(self, weight: Tensor, bits: int, *, per_channel: bool, learnable: bool) -> None:
        super().__init__()
        self.bits, self.per_channel, self.learnable = bits, per_channel, learnable
        self.quant_min, self.quant_max = integer_range(bits)
        self.mode: Mode = "off"
        channels, device = weight.shape[0] if per_channel else 1, weight.device
        self.scale = nn.Parameter(torch.ones(channels, device=device), requires_grad=learnable)
        self.register_buffer("zero_point", torch.zeros(1, device=device))
        self.register_buffer("smallest", torch.tensor(SMALLEST_SCALE, device=device), persistent=False)
        self.factor = 1 / math.sqrt(weight.numel() / channels * self.quant_max)
        self.set_range(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Map the weight to one of the same shape on the grid."""
        if self.mode != "quantize":
            return weight
        if self.training and not self.learnable:
            self.set_range(weight.detach())
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        return fake_quantize(weight, scale, self.zero_point, self.quant_min, self.quant_max, self.factor)

    def set_range(self, weight: Tensor) -> None:
        """Take the scales that span the weight's largest magnitudes."""
        dims = [*range(1 if self.per_channel else 0, weight.dim())]
        largest = torch.linalg.vector_norm(weight.detach(), math.inf, dims).view(-1)
        self.set_scale(largest * 2 / (self.quant_max - self.quant_min))

    def set_scale(self, scale: Tensor) -> None:
        """Take these scales, [C] or [1], raised to what keeps int32 biases from saturating."""
        with torch.no_grad():
            torch.mul(scale.max(), DEAD_CHANNEL, out=self.smallest).clamp_(min=SMALLEST_SCALE)
            torch.maximum(scale, self.smallest, out=self.scale)


def quantize_bias(bias: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Round a bias to int32 multiples of input scale x weight scale, as the file stores it; gradients pass straight.

    Args:
        bias: [C].
        activation_scale: of the layer's input, [1]; at 0, before calibration, the bias stays as it is.
        weight_scale: [C] or [1].

    Returns:
        [C].
    """
    if (fused := kernels(bias)) is not None:
        return fused.RoundBias.apply(bias, activation_scale.detach(), weight_scale.detach(), INT32_LIMIT)
    scale = (activation_scale * weight_scale).detach()
    rounded = torch.where(scale > 0, bias_integers(bias.detach(), scale) * scale, bias)
    return bias + (rounded - bias).detach()


def bias_integers(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the integers of a bias, [C], as float; saturated to int32."""
    return saturated((bias / scale).round())


def saturated(integers: Tensor) -> Tensor:
    """Limit float integers to what int32 holds."""
    return integers.clamp(-INT32_LIMIT, INT32_LIMIT)


def quantizers(network: nn.Module) -> list[ActivationQuantizer | WeightQuantizer]:
    """List the quantizers of a student, in the order of the graph."""
    return [module for module in network.modules() if isinstance(module, (ActivationQuantizer, WeightQuantizer))]


def set_mode(network: nn.Module, mode: Mode) -> None:
    """Switch the quantizers: weights are rounded in `quantize` only."""
    for quantizer in quantizers(network):
        quantizer.mode = mode


@contextmanager
def straight_through(student: nn.Module) -> Iterator[None]:
    """Let gradients pass through a student to its images and change nothing of it.

    Within the block the student is in evaluation, so that no quantizer observes, and none of its parameters takes a
    gradient. The backward pass may follow the block, as long as it comes before the student's next update.

    Args:
        student: calibrated, its quantizers on; in training or evaluation, which it is again afterwards.
    """
    was_training = student.training
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        student.train(was_training)


@torch.no_grad()
def constrain(network: nn.Module) -> None:
    """Keep learnt scales positive and zero points on the integers; to be called after each optimizer step."""
    found = quantizers(network)
    torch._foreach_maximum_([q.scale for q in found], [q.smallest for q in found])
    zeros = [q.zero_point for q in found]
    torch._foreach_clamp_min_(zeros, [float(q.quant_min) for q in found])
    torch._foreach_clamp_max_(zeros, [float(q.quant_max) for q in found])
    for quantizer in found:
        if isinstance(quantizer, ActivationQuantizer) and quantizer.reach:
            quantizer.scale.clamp_(min=-quantizer.reach / (quantizer.quant_max - quantizer.quant_min))
            steps = (-quantizer.reach / quantizer.scale).round()
            quantizer.zero_point.copy_(torch.maximum(quantizer.zero_point, quantizer.quant_min + steps))

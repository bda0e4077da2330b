"""Cost of fake quantization with its gradients: zsq's against PyTorch's own CPU kernels, in one process.

    python benchmarks/fakequant.py

Prints the ratios and appends a dated line with versions and hardware to benchmarks/results/fakequant.jsonl.
"""

from collections.abc import Callable

import torch
from records import append
from timing import hardware, interleaved, milliseconds, ratio
from torch import Tensor

from zsq.quantization.fake_quantize import fake_quantize, integer_range

SHAPE = (64, 16, 32, 32)
WEIGHT = (64, 64, 3, 3)
ROUNDS = 30
LOW, HIGH = integer_range(8)


def both(x: Tensor, act: Callable[[Tensor, Tensor], Tensor], scale: Tensor) -> Callable[[], None]:
    """Return the action: forward and backward through a fake quantizer with a trained scale."""
    leaf, trained, upstream = x.clone().requires_grad_(), scale.clone().requires_grad_(), torch.randn_like(x)

    def action() -> None:
        leaf.grad = trained.grad = None
        act(leaf, trained).backward(upstream)

    return action


def main() -> None:
    """Time activations with trained and with fixed scales, and weights."""
    torch.set_num_threads(1)
    x = torch.randn(SHAPE).relu().to(memory_format=torch.channels_last)
    weight = torch.randn(WEIGHT)
    zero, zeros = torch.tensor([-128.0]), torch.zeros(WEIGHT[0])
    scale, scales = x.max().view(1) / 255, weight.abs().flatten(1).amax(1) / 127
    shaped = scales.view(-1, 1, 1, 1)
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    per_channel = torch._fake_quantize_learnable_per_channel_affine
    actions = {
        "learnable": both(x, lambda t, s: fake_quantize(t, s, zero, LOW, HIGH), scale),
        "learnable torch": both(x, lambda t, s: learnable(t, s, zero + 128, 0, 255), scale),
        "fixed": both(x, lambda t, s: fake_quantize(t, s.detach(), zero, LOW, HIGH), scale),
        "fixed torch": both(
            x, lambda t, s: torch.fake_quantize_per_tensor_affine(t, s.detach(), zero.int(), LOW, HIGH), scale
        ),
        "weight": both(weight, lambda t, s: fake_quantize(t, s, zeros[:1], LOW, HIGH), shaped),
        "weight torch": both(weight, lambda t, s: per_channel(t, s, zeros, 0, LOW, HIGH, 1.0), scales),
    }
    device = torch.device("cpu")
    times = interleaved(actions, ROUNDS, device)
    names = ("learnable", "fixed", "weight")
    measured = {"shape": SHAPE, "weight_shape": WEIGHT, **hardware(device), "milliseconds": milliseconds(times)}
    append("fakequant", measured | {"ratios": {name: ratio(times, f"{name} torch", [name]) for name in names}})


if __name__ == "__main__":
    main()

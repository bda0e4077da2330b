"""Cost of batch statistics with their gradient, alone and with batch norm, against PyTorch's own, in one process.

    python benchmarks/moments.py

Prints the ratio and appends a dated line with versions and hardware to benchmarks/results/moments.jsonl.
"""

import time
from collections.abc import Callable

import torch
from records import append

from zsq.graph.moments import moments, observed_norm

SHAPE = (64, 16, 32, 32)
REPEATS = 30


def milliseconds(action: Callable[[], None]) -> float:
    """Return the fastest of several calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    """Time four ways of computing the same."""
    torch.set_num_threads(1)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last).requires_grad_()
    ones = torch.ones(SHAPE[1])
    scale = torch.rand(1, SHAPE[1], 1, 1)
    upstream = torch.randn(SHAPE).to(memory_format=torch.channels_last)

    def ours() -> None:
        mean, var = moments(x)
        (mean.sum() + var.sum()).backward()

    def torchs() -> None:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        (mean.sum() + var.sum()).backward()

    def our_norm() -> None:
        y, (mean, var) = observed_norm(x, scale, scale)
        torch.autograd.backward([y, mean, var], [upstream, ones, ones])

    def torchs_norm() -> None:
        y = torch.nn.functional.batch_norm(x, ones, ones, ones, ones, False)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        torch.autograd.backward([y, mean, var], [upstream, ones, ones])

    times = {f.__name__: round(milliseconds(f), 3) for f in (ours, torchs, our_norm, torchs_norm)}
    measured = {
        "shape": SHAPE,
        "threads": torch.get_num_threads(),
        "milliseconds": times,
        "moments_ratio": round(times["torchs"] / times["ours"], 2),
        "norm_ratio": round(times["torchs_norm"] / times["our_norm"], 2),
    }
    append("moments", measured)


if __name__ == "__main__":
    main()

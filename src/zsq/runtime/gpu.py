"""What a GPU has of its own: kernels beside PyTorch's, and convolutions that round their inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def kernels(x: Tensor) -> ModuleType | None:
    """Return `zsq.runtime.kernels` for a tensor on a GPU; None elsewhere, or without Triton and its C compiler."""
    return _kernels() if x.is_cuda else None


@cache
def _kernels() -> ModuleType | None:
    try:
        from zsq.runtime import kernels as found

        one = torch.ones(1, device="cuda")
        found.FakeQuantize.apply(one, one, one, 0, 1, 1.0, (0.0, 1.0), 0.5)  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception:  # noqa: BLE001  whatever a compiler's import and first run end in
        return None
    return found


@contextmanager
def full_float32() -> Iterator[None]:
    """Let convolutions compute in float32: on a GPU, PyTorch rounds their inputs to 10 bits of mantissa otherwise."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before

"""Which device computes."""

import torch

from zsq.errors import InputError


def pick_device(name: str) -> torch.device:
    """Return the device that `cpu`, `cuda` or `auto` means here.

    Raises:
        InputError: an unknown name, or CUDA where there is none.
    """
    if name not in ("cpu", "cuda", "auto"):
        raise InputError(f"device is '{name}'; cpu, cuda and auto work.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda' and PyTorch sees no CUDA device here; cpu and auto work.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

"""Learning rates, and an optimizer's state as flat tensors."""

import math
from typing import Any

import torch
from torch import Tensor


def cosine(learning_rate: float, step: int, steps: int) -> float:
    """Learning rate at `step` of `steps`, annealed from `learning_rate` to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * learning_rate * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def rate_on(device: torch.device, learning_rate: float) -> Any:
    """Return a learning rate as an optimizer on that device takes it: on a GPU a tensor, which a CUDA graph reads."""
    return torch.tensor(learning_rate, device=device) if device.type == "cuda" else learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's initial learning rate."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each group of parameters by the group's `title`; reading them waits for the device.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> learning_rates(torch.optim.SGD([{"params": [weight], "lr": 0.5}]))
    {'learning_rate': 0.5}
    """
    return {group.get("title", "learning_rate"): float(group["lr"]) for group in optimizer.param_groups}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's moments into named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": v for index, entry in state.items() for key, v in entry.items() if v is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Undo `flatten_optimizer`.

    Moments take their parameter's memory layout again, which files do not keep and fused optimizers rely on.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, stored in flat.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        value = stored.clone()
        if stored.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False).copy_(stored)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

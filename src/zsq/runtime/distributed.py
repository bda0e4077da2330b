"""The processes of a run: which images of a batch are this process's, and what is summed over all of them.

Every process holds the same networks, optimizers and pools. Inside `together`, which the training loop enters, each
takes its share of a batch through the networks. What a loss needs of the whole batch is gathered, so that every process
computes the loss of the whole batch, and the mean of their gradients is its gradient. Elsewhere each works as if alone.
"""

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from zsq.errors import InputError, LostProcessError, ZsqError

LEAST_SHARE = 2
"""Fewest images of a process."""

PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which evaluates alone; a process that ends is noticed at once."""

Value = TypeVar("Value")

_together: ContextVar[bool] = ContextVar("together", default=False)


def launched() -> bool:
    """Whether `torchrun`, or `--devices`, has started this process as one of several."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def start(kind: str) -> torch.device:
    """Join the other processes that were started for this run, if any, and return this one's device.

    Args:
        kind: cpu or cuda.

    Raises:
        InputError: there are fewer GPUs than processes on this machine.
    """
    from lightning_fabric import Fabric  # takes a second
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if not launched():
        return Fabric(accelerator=kind, devices=1, plugins=[LightningEnvironment()]).device
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    check_devices(here, kind)
    fabric = Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=int(os.environ["WORLD_SIZE"]) // here,
        strategy=DDPStrategy(timeout=PATIENCE),
        plugins=[TorchElasticEnvironment()],
    )
    with _losses_named():
        fabric.launch()
    atexit.register(_leave)
    return fabric.device


def _leave() -> None:
    """Close the connections before the interpreter goes: else their threads outlive it for a moment."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_devices(count: int, kind: str) -> None:
    """Check that a machine can hold so many processes.

    Raises:
        InputError: it is below 1, or above the number of GPUs where they are to be used.
    """
    if count < 1:
        raise InputError(f"devices is {count}; it must be at least 1.")
    if kind == "cuda" and count > torch.cuda.device_count():
        raise InputError(f"devices is {count} and PyTorch sees {torch.cuda.device_count()} CUDA devices here.")


@contextmanager
def together() -> Iterator[None]:
    """Work on shares within the block; every process of the run enters it."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def size() -> int:
    """Return the number of processes that share a batch: 1 outside of `together`."""
    return processes() if _together.get() else 1


def processes() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the first process, which writes the files and shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def anywhere(here: bool, device: torch.device) -> bool:
    """Tell whether something is so in any process; all processes call this."""
    if processes() == 1:
        return here
    return bool(_reduce(torch.tensor(float(here), device=device), "max"))


def on_main(work: Callable[[], Value]) -> Value:
    """Return what `work` gives in the first process, which alone does it; all processes call this.

    Raises:
        ZsqError: the fault that `work` met there.
    """
    if processes() == 1:
        return work()
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [work()]
        except LostProcessError:
            raise
        except ZsqError as error:
            outcome = [error]
    with _losses_named():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], ZsqError):
        raise outcome[0]
    return cast(Value, outcome[0])


def share(batch: Tensor) -> Tensor:
    """Return the rows of a batch [N, ...] that are this process's.

    Raises:
        InputError: a process would get fewer than two images.
    """
    count = size()
    if count == 1:
        return batch
    if len(batch) < LEAST_SHARE * count:
        raise InputError(
            f"a batch of {len(batch)} images is too small for {count} processes; batch statistics need at least "
            f"{LEAST_SHARE} images each: --set method.batch_size={LEAST_SHARE * count} or more, or fewer processes."
        )
    first, end = _bounds(len(batch))
    return batch[first:end]


def whole(rows: Tensor, count: int) -> Tensor:
    """Return the batch of `count` rows of which each process gives its share, [n, ...]; differentiable."""
    if size() == 1:
        return rows
    first, end = _bounds(count)
    return total(F.pad(rows, (0, 0) * (rows.dim() - 1) + (first, count - end)))


def pooled(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all processes of what each has `count` values of; differentiable.

    Args:
        mean, var: of this process's values, of one shape [C].
        count: number of values, which may differ between processes.

    Returns:
        Of that shape. Means and variances are combined, not sums of squares, whose difference would lose digits.
    """
    processes_here = size()
    if processes_here == 1:
        return mean, var
    own = torch.cat([torch.full((1,), float(count), device=mean.device), mean, var])
    rank = dist.get_rank()
    every = total(F.pad(own[None], (0, 0, rank, processes_here - rank - 1)))
    counts, means, variances = every.split([1, len(mean), len(mean)], dim=1)
    shares = counts / counts.sum()
    joint = (shares * means).sum(0)
    return joint, (shares * (variances + (means - joint).square())).sum(0)


def widest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value over all processes, of the given shape [C]; not differentiable."""
    if size() == 1:
        return low, high
    lowest, highest = _reduce(torch.cat([-low, high]), "max").chunk(2)
    return -lowest, highest


def reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all processes: the gradient of the whole batch's loss."""
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = _reduce(torch.cat([gradient.flatten() for gradient in gradients])).div_(size())
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def total(x: Tensor) -> Tensor:
    """Sum a tensor over all processes; differentiable, and so is a process's part in the others' losses."""
    summed: Tensor = _Total.apply(x)  # type: ignore[no-untyped-call]
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        del ctx
        return _reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        del ctx
        return _reduce(grad.contiguous().clone())


def _bounds(count: int) -> tuple[int, int]:
    """Return the first row of this process's share of `count`, and the row after its last."""
    rank = dist.get_rank()
    return rank * count // size(), (rank + 1) * count // size()


def _reduce(x: Tensor, by: str = "sum") -> Tensor:
    with _losses_named():
        dist.all_reduce(x, dist.ReduceOp.SUM if by == "sum" else dist.ReduceOp.MAX)
    return x


@contextmanager
def _losses_named() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". This is typically")[0]  # advice that is of no use here
        raise LostProcessError(
            f"a process lost touch with the others, of which one may have ended ({reason})."
        ) from error

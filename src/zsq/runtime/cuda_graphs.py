"""Steps replayed as one CUDA graph: starting hundreds of small kernels takes longer than what they compute."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from zsq.runtime import distributed

WARM_UP = 3
"""Calls before a step is recorded: optimizers make their state, and libraries choose their algorithms."""

WAITS = "synchronizing CUDA operation"
"""What PyTorch's warning of an operation that waits for the GPU says."""

Tensors = TypeVar("Tensors", bound=tuple[Tensor | None, ...])
Losses = dict[str, Tensor]

_all: "weakref.WeakSet[Replays]" = weakref.WeakSet()


@contextmanager
def forgetting() -> Iterator[None]:
    """Give back the memory of all recorded steps at the end of the block."""
    try:
        yield
    finally:
        for replays in list(_all):
            replays.forget()


class Replays:
    """Calls steps, and on one GPU replays each as a CUDA graph once it has been called a few times.

    A step is a function of tensors that does the same work at every call, reads nothing back, draws no random numbers,
    and changes what outlives it in place. It returns a tuple of tensors and its losses, which are scalars. One that
    cannot be recorded goes on being called.

    Args:
        device: on others than GPUs, and where several processes share the run, steps are just called.
        optimizer: of what the steps train; its gradients lie in the memory of the recorded steps.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.on = device.type == "cuda"
        self.optimizer = optimizer
        self._steps: dict[Hashable, _Step] = {}
        _all.add(self)

    def call(
        self, name: Hashable, work: Callable[..., tuple[Tensors, Losses]], *inputs: Tensor | None
    ) -> tuple[Tensors, Losses]:
        """Return what `work` makes of the inputs; tensors of the caller's own, inputs that pass through among them.

        Args:
            name: of the step; calls of one name do the same work.
            work: the step.
            inputs: of the same shapes at every call, or the step is recorded anew.
        """
        if not self.on or distributed.processes() > 1:
            return work(*inputs)
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        step = self._steps.get(name)
        if step is None or step.shapes != shapes:
            step = self._steps[name] = _Step(work, shapes)
        return cast(tuple[Tensors, Losses], step(inputs))

    def forget(self) -> None:
        """Give back the memory of all steps and record them anew.

        To be called where they end, where tensors that they read or write become others, and where a batch goes
        through otherwise.
        """
        if self._steps and self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._steps.clear()


class _Step:
    """One step: called, then recorded, then replayed."""

    def __init__(self, work: Callable[..., Any], shapes: tuple[object, ...]) -> None:
        self.work, self.shapes, self.calls = work, shapes, 0
        self.recordable = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor | None] = []
        self.made: tuple[Tensor | None, ...] = ()
        self.names: tuple[str, ...] = ()
        self.losses: Tensor | None = None
        self.stream = torch.cuda.Stream()  # warm-up and recording are to meet the same streams in the backward pass

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Losses]:
        self.calls += 1
        if self.calls == WARM_UP:
            return self._watched(inputs)
        if self.calls == WARM_UP + 1 and self.recordable:
            self._record(inputs)
        if self.graph is None:
            return self._aside(inputs)
        return self._replay(inputs)

    def _aside(self, inputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Losses]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            made, losses = self.work(*inputs)
        current.wait_stream(self.stream)
        for tensor in (*made, *losses.values()):
            if tensor is not None:
                tensor.record_stream(current)
        return made, losses

    def _watched(self, inputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Losses]:
        """Call the step and see whether it waits for the GPU: recording one that does would leave PyTorch confused."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = self._aside(inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        self.recordable = not any(WAITS in str(warning.message) for warning in seen)
        return found

    def _record(self, inputs: Sequence[Tensor | None]) -> None:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.inputs = [None if given is None else given.detach().clone() for given in inputs]
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                made, found = self.work(*self.inputs)
                losses = torch.stack([value.float() for value in found.values()])
        except RuntimeError:  # two copies of a step do not fit, or something in it cannot be recorded
            torch.cuda.set_stream(before)
            self.inputs = []
            return
        self.graph, self.made, self.names, self.losses = graph, made, tuple(found), losses

    def _replay(self, inputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], Losses]:
        assert self.graph is not None
        made = (*self.made, self.losses)
        passed = {id(held): given for held, given in zip(self.inputs, inputs, strict=True) if held is not None}
        own = [None if tensor is None else passed.get(id(tensor)) for tensor in made]
        for place, tensor in enumerate(made):  # before anything has changed
            if tensor is not None and own[place] is None:
                own[place] = torch.empty_like(tensor)
        for held, given in zip(self.inputs, inputs, strict=True):
            if held is not None and given is not None:
                held.copy_(given.detach())  # else its history would grow by a node a replay
        self.graph.replay()
        for mine, tensor in zip(own, made, strict=True):
            if mine is not None and tensor is not None and id(tensor) not in passed:
                mine.copy_(tensor)
        *tensors, losses = own
        assert losses is not None
        return tuple(tensors), dict(zip(self.names, losses.unbind(), strict=True))

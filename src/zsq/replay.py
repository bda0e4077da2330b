"""Steps replayed as one CUDA graph: starting hundreds of small kernels takes longer than what they compute."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from zsq import parallel
from zsq.types import Batch

WARM_UP = 3
"""Calls before a step is recorded: optimizers make their state, and libraries choose their algorithms."""

Work = Callable[..., Batch]


class Replays:
    """Calls steps, and on one GPU replays each as a CUDA graph once it has been called a few times.

    A step is a function of tensors that does the same work at every call, reads nothing back, draws no random numbers,
    and changes what outlives it in place. One that cannot be recorded goes on being called.

    Args:
        device: on others than GPUs, and where several processes share the run, steps are just called.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self._steps: dict[Hashable, _Step] = {}

    def call(self, name: Hashable, work: Work, *inputs: Tensor | None) -> Batch:
        """Return what `work` makes of the inputs; tensors of the caller's own.

        Args:
            name: of the step; calls of one name do the same work.
            work: the step.
            inputs: of the same shapes at every call, or the step is recorded anew.
        """
        if not self.on or parallel.processes() > 1:
            return work(*inputs)
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        step = self._steps.get(name)
        if step is None or step.shapes != shapes:
            step = self._steps[name] = _Step(work, shapes)
        return step(inputs)

    def forget(self) -> None:
        """Give back the memory of all steps and record them anew.

        To be called where they end, where tensors that they read or write become others, and where a batch goes
        through otherwise.
        """
        self._steps.clear()


class _Step:
    """One step: called, then recorded, then replayed."""

    def __init__(self, work: Work, shapes: tuple[object, ...]) -> None:
        self.work, self.shapes, self.calls = work, shapes, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor | None] = []
        self.made: Batch | None = None
        self.losses: Tensor | None = None
        self.stream = torch.cuda.Stream()  # warm-up and recording are to meet the same streams in the backward pass

    def __call__(self, inputs: Sequence[Tensor | None]) -> Batch:
        if self.calls == WARM_UP:
            self._record(inputs)
        self.calls += 1
        if self.graph is None:
            return self._aside(inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        self.graph.replay()
        return self._result()

    def _aside(self, inputs: Sequence[Tensor | None]) -> Batch:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            made = self.work(*inputs)
        current.wait_stream(self.stream)
        for tensor in (made.images, made.labels, made.teacher_logits, *made.losses.values()):
            if tensor is not None:
                tensor.record_stream(current)
        return made

    def _record(self, inputs: Sequence[Tensor | None]) -> None:
        graph = torch.cuda.CUDAGraph()
        self.inputs = [None if given is None else given.detach().clone() for given in inputs]
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                made = self.work(*self.inputs)
                losses = torch.stack([value.float() for value in made.losses.values()])
        except RuntimeError:  # something in it waits for the device, or two copies of a step do not fit
            return
        self.graph, self.made, self.losses = graph, made, losses

    def _result(self) -> Batch:
        assert self.made is not None
        assert self.losses is not None
        losses = dict(zip(self.made.losses, self.losses.clone().unbind(), strict=True))
        logits = self.made.teacher_logits
        images, labels = self.made.images.clone(), self.made.labels.clone()
        return Batch(images, labels, None if logits is None else logits.clone(), losses)

"""Steps that a GPU replays are just called elsewhere."""

import contextlib
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zsq.runtime.cuda_graphs import WARM_UP, Replays, forgetting
from zsq.runtime.gpu import full_float32, kernels

Made = tuple[tuple[Tensor | None, ...], dict[str, Tensor]]


def test_steps_are_called_where_there_is_no_gpu() -> None:
    replays, given = Replays(torch.device("cpu")), []

    def work(x: Tensor, logits: Tensor | None) -> Made:
        given.append((x, logits))
        return (x + 1, logits), {"loss": x.sum()}

    for value in range(2 * WARM_UP):
        x = torch.full((2,), float(value))
        (made, logits), losses = replays.call("step", work, x, None)
        assert given[-1][0] is x
        assert made.tolist() == [value + 1.0] * 2
        assert logits is None
        assert losses["loss"] == 2 * value
    assert len(given) == 2 * WARM_UP
    replays.forget()


def test_the_processor_has_no_kernels_of_its_own() -> None:
    assert kernels(torch.ones(1)) is None


def test_full_float32_ends_with_its_block() -> None:
    convolutions = torch.backends.cudnn.conv
    before, allowed = convolutions.fp32_precision, torch.backends.cudnn.allow_tf32
    for wanted in (before, "ieee"):
        convolutions.fp32_precision = wanted
        try:
            with full_float32():
                assert convolutions.fp32_precision == "ieee"
            assert convolutions.fp32_precision == wanted
        finally:
            convolutions.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32 == allowed


class FakeGraph:
    """Does on the processor what a CUDA graph does: writes anew what was made while it was recorded."""

    owner: Replays

    def replay(self) -> None:
        step: Any = next(step for step in self.owner._steps.values() if step.graph is self)
        made, losses = step.work(*step.inputs)
        for held, written in zip(step.made, made, strict=True):
            if held is not None:
                held.copy_(written)
        step.losses.copy_(torch.stack(list(losses.values())))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for CUDA's streams and graphs; the list holds the modes in which waiting is watched."""
    modes = ["default"]
    nothing = types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def block(*_: object, **__: object) -> Iterator[None]:
        yield

    fakes = {
        "Stream": lambda: nothing,
        "CUDAGraph": FakeGraph,
        "stream": block,
        "graph": block,
        "current_stream": lambda: nothing,
        "set_stream": lambda stream: None,
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": modes.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    return modes


def calls(replays: Replays, work: Any, count: int, side: int = 2) -> list[Made]:
    FakeGraph.owner = replays
    return [replays.call("step", work, torch.full((side,), float(value)), None) for value in range(count)]


def test_replays_give_what_calls_give(fake_gpu: list[str]) -> None:
    replays = Replays(torch.device("cuda"))

    def work(x: Tensor, logits: Tensor | None) -> Made:
        return (x * 2, x.long(), logits), {"a": x.sum(), "b": x.max()}

    count = 2 * WARM_UP + 3
    recorded = calls(replays, work, WARM_UP + 1)
    step = replays._steps["step"]
    assert step.graph is not None
    made = [*recorded, *calls(replays, work, count)]
    for ((doubled, whole, logits), losses), value in zip(made, [*range(WARM_UP + 1), *range(count)], strict=True):
        assert doubled.tolist() == [2.0 * value] * 2  # kept, though the next replay wrote others
        assert whole.tolist() == [value] * 2
        assert logits is None
        assert {name: loss.item() for name, loss in losses.items()} == {"a": 2.0 * value, "b": float(value)}
    assert replays._steps["step"] is step
    assert fake_gpu == ["default", "warn", "default"]  # watched once
    calls(replays, work, 1, side=3)
    assert replays._steps["step"] is not step  # another shape


def test_what_passes_through_is_what_was_given(fake_gpu: list[str]) -> None:
    replays = Replays(torch.device("cuda"))
    FakeGraph.owner = replays
    for value in range(2 * WARM_UP):
        x = torch.full((2,), float(value), requires_grad=True)
        (passed, whole), losses = replays.call("step", lambda x: ((x, x.detach().long()), {"a": x.detach().sum()}), x)
        assert passed is x
        assert whole.tolist() == [value] * 2
        assert losses["a"] == 2 * value
    (held,) = replays._steps["step"].inputs
    assert held is not None
    assert held.tolist() == x.tolist()
    assert held.is_leaf  # no history of the pixels before


def test_a_step_that_waits_is_not_recorded(fake_gpu: list[str]) -> None:
    replays = Replays(torch.device("cuda"))

    def work(x: Tensor, logits: Tensor | None) -> Made:
        if fake_gpu[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return (), {"a": x.sum()}

    made = calls(replays, work, 2 * WARM_UP)
    assert replays._steps["step"].graph is None
    assert [losses["a"].item() for _, losses in made] == [2 * value for value in range(2 * WARM_UP)]


def test_a_step_whose_recording_fails_is_called(fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    replays = Replays(torch.device("cuda"))
    made = calls(replays, lambda x, logits: ((x,), {"a": x.sum()}), 2 * WARM_UP)
    assert [losses["a"].item() for _, losses in made] == [2 * value for value in range(2 * WARM_UP)]


def test_recorded_steps_and_their_gradients_are_forgotten_at_the_end(fake_gpu: list[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    replays = Replays(torch.device("cuda"), torch.optim.SGD([weight], lr=0.1))
    with contextlib.suppress(ZeroDivisionError), forgetting():
        calls(replays, lambda x, logits: ((x,), {"a": x.sum()}), 2)
        weight.grad = torch.ones(2)
        raise ZeroDivisionError
    assert not replays._steps
    assert weight.grad is None

"""Steps that a GPU replays are just called elsewhere."""

import torch
from torch import Tensor

from zsq.gpu import full_float32, kernels
from zsq.replay import WARM_UP, Replays
from zsq.types import Batch


def test_steps_are_called_where_there_is_no_gpu() -> None:
    replays, given = Replays(torch.device("cpu")), []

    def work(x: Tensor, logits: Tensor | None) -> Batch:
        given.append((x, logits))
        return Batch(x + 1, x.long(), logits, {"loss": x.sum()})

    for value in range(2 * WARM_UP):
        x = torch.full((2,), float(value))
        batch = replays.call("step", work, x, None)
        assert given[-1][0] is x
        assert batch.images.tolist() == [value + 1.0] * 2
        assert batch.teacher_logits is None
    assert len(given) == 2 * WARM_UP
    replays.forget()


def test_the_processor_has_no_kernels_of_its_own() -> None:
    assert kernels(torch.ones(1)) is None


def test_full_float32_ends_with_its_block() -> None:
    before = torch.backends.cudnn.allow_tf32
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before

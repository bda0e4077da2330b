"""A batch that does not fit goes through in parts, with the same gradients where no batch statistics are taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsq.errors import InputError
from zsq.methods import ZSCGAN, Adversarial, Noise, Real, ZeroQ
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import QAT
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller
from zsq.training.loop import Run
from zsq.types import Batch, joined


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


def limit(module: nn.Module, most: int) -> list[int]:
    """Let a network run out of memory above so many images; return the sizes that it has seen."""
    seen: list[int] = []
    forward: Callable[..., object] = module.forward

    def limited(first: Tensor, *rest: Tensor) -> object:
        seen.append(len(first))
        if len(first) > most:
            raise torch.OutOfMemoryError("no memory")
        return forward(first, *rest)

    module.forward = limited  # type: ignore[method-assign]
    return seen


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", [ZSCGAN, Adversarial])
def test_a_generator_learns_in_parts_that_fit(method: type, teacher: Teacher, said: list[str]) -> None:
    run = Run()
    source = method(steps=3, batch_size=16, width=4).source(teacher, run, 0)
    seen = limit(source.teacher, 4)
    run.train("fit", source, 3)
    assert seen == [16, 8, *[4] * 12]
    assert source.parts == 4
    assert len(said) == 2
    assert "goes through in halves" in said[0]
    batch = source.batch(0, None)
    assert batch.images.shape[0] == len(batch.labels) == len(batch.teacher_logits) == 16


def test_the_gradient_is_the_mean_of_the_parts(teacher: Teacher) -> None:
    def fresh() -> object:
        return ZSCGAN(steps=1, batch_size=16, width=4).source(teacher, Run(), 0)

    parts = []
    for half in range(2):
        source = fresh()
        labels, noise = (drawn.chunk(2)[half] for drawn in source.inputs(0))
        losses = source.learnt_from(0, None, labels, noise).losses
        (source.weights["ce"] * losses["ce"] + source.weights["bns"] * losses["bns"]).backward()
        parts.append(gradients(source.generator))
    source = fresh()
    assert source.halve()
    source.step(0)
    for one, other, both in zip(*parts, gradients(source.generator), strict=True):
        torch.testing.assert_close((one + other) / 2, both, rtol=1e-4, atol=1e-6)


def distiller_of(teacher: Teacher, source: object) -> Distiller:
    settings = QAT(bits="6", num_samples=64, steps=4, kd_weight=1.0)
    student = quantize_ptq(teacher.network, lambda: source.sample(64), settings, Run(), learnable=True)
    return Distiller(student, teacher.network, source, settings, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "parts"), [(16, 2), (10, 3), (10, 4)])
def test_a_student_in_parts_has_the_gradients_of_the_whole(teacher: Teacher, batch_size: int, parts: int) -> None:
    whole, halved = (
        distiller_of(teacher, Real(data="digits:train", batch_size=batch_size).fit(teacher, Run()).source)
        for _ in range(2)
    )
    halved.parts = parts
    losses, others = whole.step(0), halved.step(0)
    for name, value in losses.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-6)
    for one, other in zip(gradients(whole.student), gradients(halved.student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_distillation_goes_on_in_parts(teacher: Teacher, said: list[str]) -> None:
    run = Run()
    distiller = distiller_of(teacher, ZSCGAN(steps=0, batch_size=16, width=4).source(teacher, run, 4))
    seen = limit(distiller.trained, 8)
    run.train("distill", distiller, 2)
    assert seen == [16, 8, 8, 8, 8]
    assert (distiller.parts, distiller.source.parts) == (2, 1)  # the generator's network has room
    assert len(said) == 1
    learnt = [state["step"].item() for state in distiller.source.optimizer.state.values()]
    assert set(learnt) == {2.0}  # the step that was taken twice taught the generator once


def test_what_does_not_fit_in_the_smallest_parts_is_a_clear_error(teacher: Teacher) -> None:
    run = Run()
    source = ZSCGAN(steps=3, batch_size=8, width=4).source(teacher, run, 0)
    limit(source.teacher, 1)
    with pytest.raises(
        InputError, match=r"a step does not fit into the memory of cpu; settings={'method.batch_size': N}"
    ):
        run.train("fit", source, 3)
    assert source.parts == 4
    pixels = ZeroQ(steps=1, iterations=1, batch_size=8).fit(teacher, run).source
    limit(pixels.teacher, 4)
    with pytest.raises(InputError, match="does not fit into the memory"):
        run.take(pixels, 0)


@pytest.mark.parametrize("method", [Noise(batch_size=8), ZSCGAN(steps=0, batch_size=8, width=4)])
def test_a_student_without_room_for_one_image_is_a_clear_error(method: Any, teacher: Teacher) -> None:
    run = Run()
    fitted = method.fit(teacher, run, distill_steps=1)
    distiller = distiller_of(teacher, fitted.source)
    limit(distiller.trained, 0)
    with pytest.raises(InputError, match="does not fit into the memory"):
        run.take(distiller, 0)
    assert distiller.parts == 8


def test_a_source_without_room_is_a_clear_error(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    distiller = distiller_of(teacher, Noise(batch_size=8).fit(teacher, run).source)

    def full(step: int, student: object) -> Batch:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(distiller.source, "batch", full, raising=False)
    with pytest.raises(InputError, match="does not fit into the memory"):
        run.take(distiller, 0)


def test_batches_split_and_join() -> None:
    batch = Batch(torch.arange(10.0).view(5, 2), torch.arange(5), torch.arange(15.0).view(5, 3), {"a": torch.ones(())})
    parts = batch.split(2)
    assert [len(part.labels) for part in parts] == [3, 2]
    together = joined(
        [Batch(p.images, p.labels, p.teacher_logits, {"a": torch.tensor(float(i))}) for i, p in enumerate(parts)]
    )
    assert torch.equal(together.images, batch.images)
    assert torch.equal(together.teacher_logits, batch.teacher_logits)
    torch.testing.assert_close(together.losses["a"], torch.tensor(0.4))  # 3 images of 0 and 2 of 1
    assert Batch(batch.images, batch.labels).split(2)[1].teacher_logits is None

"""How a generator is trained: on windows of large images, and until the ranges that it gives have settled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.methods import ZSCGAN, Adversarial, generator_training
from zsq.methods.generator_training import GeneratorSource, Settling
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.training.loop import Run
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=96, width=112, classes=5, mean=(0.5,) * 3, std=(0.25,) * 3)
WINDOW = (48, 64)
SMALL = {"steps": 16, "batch_size": 2, "width": 2, "noise_channels": 2}


class Striding(nn.Module):
    """A strided convolution with batch norm; the head reads the mean of the map, or all of it."""

    def __init__(self, *, reads_map: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 8, stride=8, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 12 * 14 if reads_map else 4, 5)
        self.reads_map = reads_map

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.flatten(x if self.reads_map else F.adaptive_avg_pool2d(x, 1), 1))


def teacher(*, reads_map: bool = False) -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher_from_module(Striding(reads_map=reads_map).eval(), SPEC)


def source(method: ZSCGAN | Adversarial, of: Teacher) -> GeneratorSource:
    return method.source(of, Run(), 0)


def sides(made: GeneratorSource, steps: int, student: nn.Module | None = None) -> list[tuple[int, ...]]:
    return [tuple(made.update(step, student).images.shape[2:]) for step in range(steps)]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (ZSCGAN(**SMALL), [WINDOW, WINDOW, WINDOW, (96, 112)] * 2),
        (ZSCGAN(**SMALL, whole_every=2), [WINDOW, (96, 112)] * 4),
        (ZSCGAN(**SMALL, whole_every=1), [(96, 112)] * 8),
        (ZSCGAN(**(SMALL | {"levels": 1}), generator="unet"), [(96, 112)] * 2),
        (Adversarial(**SMALL, generators=2, whole_every=2), [WINDOW, WINDOW, (96, 112), (96, 112)] * 2),
    ],
)
def test_most_steps_show_windows_of_large_images(method, wanted) -> None:
    assert sides(source(method, teacher()), len(wanted)) == wanted


def test_a_network_that_reads_a_whole_map_is_shown_whole_images() -> None:
    assert sides(source(ZSCGAN(**SMALL), teacher(reads_map=True)), 4) == [(96, 112)] * 4


def test_samples_and_batches_of_distillation_are_whole() -> None:
    made = source(ZSCGAN(**SMALL), teacher())
    made.step(0)
    assert next(made.sample(2)).images.shape[2:] == (96, 112)
    assert sides(made, 3, nn.Identity()) == [(96, 112)] * 3


def test_small_images_have_no_windows() -> None:
    assert sides(source(ZSCGAN(**SMALL), load_teacher("digits")), 4) == [(8, 8)] * 4


class Ranges:
    """Calibrations whose ranges change by these shares, one after the other."""

    def __init__(self, changes: list[float]) -> None:
        self.changes, self.scale = changes, torch.ones(3)

    def __call__(self, student: object) -> dict[int, nn.Module]:
        self.scale = self.scale * (1 + self.changes.pop(0))
        quantizer = nn.Module()
        quantizer.scale = nn.Parameter(self.scale)
        return {0: quantizer}


def looked(monkeypatch: pytest.MonkeyPatch, changes: list[float]) -> None:
    monkeypatch.setattr(generator_training, "quantize_ptq", lambda *arguments: None)
    monkeypatch.setattr(generator_training, "activation_quantizers", Ranges(changes))


@pytest.mark.parametrize(
    ("changes", "ends"),
    [([0.0, 0.01], 4), ([0.0, 0.2, -0.02], 8), ([0.0, 0.2, 0.1, 0.01], 16), ([0.0, 0.1, 0.1, 0.1, 0.1], 64)],
)
def test_a_fit_ends_when_its_ranges_have_settled(changes, ends, tmp_path: Path, monkeypatch, said) -> None:
    looked(monkeypatch, changes)
    settings = ZSCGAN(**(SMALL | {"steps": 64}), settle=True)
    run = Run(tmp_path)
    settings.fit(load_teacher("digits"), run)
    steps = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    assert f'"step": {ends}' in steps[-1]
    assert any(line.endswith(": enough") for line in said) == (ends < 64)
    fits: list[int] = []
    monkeypatch.setattr(GeneratorSource, "step", lambda self, step: fits.append(step))
    settings.fit(load_teacher("digits"), run)  # it has ended, and is not taken up again
    assert fits == []


def test_a_fit_that_is_resumed_ends_where_it_would_have_ended(monkeypatch) -> None:
    of = load_teacher("digits")
    first, second = (source(ZSCGAN(**SMALL), of) for _ in range(2))
    looked(monkeypatch, [0.0, 0.01])
    assert not Settling(of, first, 64)(4)
    second.load_state_dict(first.state_dict())
    assert Settling(of, second, 64)(8)
    assert "scales" not in source(ZSCGAN(**SMALL), of).state_dict()


def test_the_ranges_of_an_untrained_generator_and_a_trained_one_differ() -> None:
    of = load_teacher("digits")
    made = source(ZSCGAN(**(SMALL | {"steps": 64, "batch_size": 16}), learning_rate=0.03), of)
    settling = Settling(of, made, 64)
    assert not settling(3)  # not asked
    assert not settling(4)
    assert settling(8)  # nothing was learnt between
    for step in range(20):
        made.step(step)
    assert not settling(16)

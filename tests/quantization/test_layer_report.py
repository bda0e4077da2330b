"""What rounding does to each layer of the bundled network."""

import pytest
import torch

from zsq.models import teacher as teachers
from zsq.quantization import PTQ
from zsq.quantization.layer_report import layer_reports, measured_images
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run
from zsq.types import Batch


def reports(bits: str, images: torch.Tensor):
    teacher = teachers.load_teacher("digits")
    batches = [Batch(images, torch.zeros(len(images), dtype=torch.int64))]
    student = quantize_ptq(teacher.network, lambda: iter(batches), PTQ(bits=bits, num_samples=len(images)), Run())
    before = student(images)
    found = layer_reports(student, teacher.network, images)
    assert torch.equal(student(images), before)
    return found


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_large_networks_are_measured_on_fewer_images() -> None:
    assert measured_images(22, 32 * 32) > 100
    assert measured_images(54, 224 * 224) == 1
    assert measured_images(0, 0) > 0


def test_statistics_are_those_of_all_images(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = reports("8", images)
    monkeypatch.setattr("zsq.quantization.layer_report.WORK", 1)
    found = reports("8", images)
    assert [layer.batch_norm_gap for layer in found] == [layer.batch_norm_gap for layer in wanted]
    assert [layer.sqnr for layer in found] != [layer.sqnr for layer in wanted]


def test_each_layer_is_measured_and_the_student_left_as_it_was(images: torch.Tensor) -> None:
    found = reports("8", images)
    assert len({layer.name for layer in found}) == len(found) > 3
    assert sum(layer.damage for layer in found) == pytest.approx(100, abs=0.01)
    assert all(layer.weight_bits == 8 and 0 < layer.weight_use <= 100 for layer in found)
    assert any(layer.batch_norm_gap is not None and layer.batch_norm_gap > 0 for layer in found)


def test_half_the_bits_cost_some_twenty_decibels(images: torch.Tensor) -> None:
    """A bit is 6 dB of a uniform quantizer's noise: four are 24, of inner layers, whose widths change."""
    eight, four = (reports(bits, images)[0].sqnr for bits in ("8", "4"))
    assert eight is not None
    assert four is not None
    assert 15 < eight - four < 33

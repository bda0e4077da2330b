"""Real images: how they are augmented, what distillation takes from them, and sets that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from zsq.cli import main
from zsq.errors import InputError
from zsq.methods import METHODS, Noise, Real
from zsq.methods.noise_and_real import crop_flip
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import QAT, qat
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller
from zsq.runs.quantize import quantize
from zsq.training.loop import Run


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


@pytest.mark.parametrize(
    ("method", "asked", "used"),
    [("real", None, 0.0), ("noise", None, 1.0), ("biggan", None, 1.0), ("real", 0.3, 0.3), ("noise", 0.0, 0.0)],
)
def test_only_true_labels_are_trained_on_unless_asked(teacher, monkeypatch, method, asked, used):
    taken = []

    def spy(*arguments, kd_weight, temperature):
        taken.append(kd_weight)
        return original(*arguments, kd_weight=kd_weight, temperature=temperature)

    original = qat.distillation_loss
    monkeypatch.setattr(qat, "distillation_loss", spy)
    options = {} if method == "noise" else {"data": "digits:train", "limit": 100}
    source = METHODS[method](batch_size=8, **options).fit(teacher, Run()).source
    settings = QAT(num_samples=30, steps=2, kd_weight=asked)
    student = quantize_ptq(teacher.network, lambda: source.sample(30), settings, Run(), learnable=True)
    Distiller(student, teacher.network, source, settings, torch.device("cpu")).step(0)
    assert taken == [used]
    assert settings.resolved_kd_weight(source) == used


def test_crop_flip_shifts_within_an_eighth_and_mirrors_half():
    height, width = 16, 24
    image = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width) + 1
    fill = torch.full((1, 1, 1, 1), -7.0)
    found = crop_flip(image.expand(300, 1, height, width), fill, torch.Generator().manual_seed(0))
    assert found.shape == (300, 1, height, width)
    offsets = set()
    for crop in found[:, 0]:
        steps = (crop[:, 1:] - crop[:, :-1])[(crop[:, 1:] > 0) & (crop[:, :-1] > 0)]
        flipped = steps[0].item() == -1
        assert (steps == steps[0]).all()
        whole = crop.flip(1) if flipped else crop
        y, x = height // 2, width // 2
        value = int(whole[y, x].item()) - 1
        offsets.add((value // width - y, value % width - x, flipped))
        outside = whole <= 0
        assert (whole[outside] == -7).all()
        assert outside.sum() == height * width - (height - abs(value // width - y)) * (width - abs(value % width - x))
    assert {dy for dy, _, _ in offsets} == {-2, -1, 0, 1, 2}
    assert {dx for _, dx, _ in offsets} == {-3, -2, -1, 0, 1, 2, 3}
    assert 100 < sum(bool(crop[0, 8, 11] > crop[0, 8, 12]) for crop in found) < 200


def test_augmentation_is_for_distillation_only_and_a_function_of_the_step(teacher):
    plain, augmented, again = (
        Real(data="digits:train", augment=augment).fit(teacher, Run()).source
        for augment in ("none", "crop-flip", "crop-flip")
    )
    assert torch.equal(next(plain.sample(50)).images, next(augmented.sample(50)).images)
    one, other = plain.batch(3, None), augmented.batch(3, None)
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(one.images, other.images)
    assert torch.equal(other.images, again.batch(3, None).images)
    pixels = teacher.spec.to_pixels(other.images).permute(0, 3, 1, 2) / 255
    assert torch.allclose(teacher.spec.normalize(pixels), other.images, atol=1e-5)  # what moves in is black


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(InputError, match=r"method.augment is 'flip'.*'none' or 'crop-flip'"):
        quantize(load_teacher("digits"), out="unused", method="real", settings=("method.augment=flip",))
    assert not Path("unused").exists()


def class_folders(place: Path) -> str:
    for name in ("cat", "dog", "emu"):
        (place / "set" / name).mkdir(parents=True)
    return "set"


def too_many_classes(place: Path) -> str:
    labels = np.arange(12)
    np.savez(place / "set.npz", images=np.zeros((12, 8, 8, 1), np.uint8), labels=labels)
    return "set.npz"


def too_many_channels(place: Path) -> str:
    np.savez(place / "set.npz", images=np.zeros((12, 8, 8, 3), np.uint8), labels=np.zeros(12, int))
    return "set.npz"


@pytest.mark.parametrize("method", ["real", "biggan"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (class_folders, "data set 'set' has 3 class folders; the teacher knows 10 classes. Give one folder a class"),
        (too_many_classes, "data set 'set.npz': label 10 of image 10 is outside 0..9, the teacher's 10 classes."),
        (too_many_channels, "data set 'set.npz' has 3-channel images; the teacher takes 1."),
        (lambda place: "nothing", "no such data set: 'nothing'. Known: 'digits'"),
    ],
)
def test_a_set_that_does_not_fit_is_one_line_on_the_command_line(tmp_path, monkeypatch, capsys, method, make, text):
    monkeypatch.chdir(tmp_path)
    chosen = ["--method", method, "--set", f"method.data={make(tmp_path)}", "--out", "run"]
    with pytest.raises(SystemExit) as stopped:
        main.main(["quantize", "digits", *chosen])
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"Error: {text}")


@pytest.mark.slow
def test_the_record_says_what_was_trained_on(teacher, tmp_path):
    settings = ("method.data=digits:train", "method.limit=200", "quantizer.num_samples=40", "quantizer.steps=3")
    record = quantize(teacher, out=tmp_path / "run", method="real", quantizer="qat", settings=settings).record
    assert record.kd_weight == 0.0
    assert record.data_free is False
    assert record.label_recognition > 90


def test_labels_mean_something_for_real_images_alone(teacher):
    assert not Noise().fit(teacher, Run()).source.asks_labels
    assert Real(data="digits:train").fit(teacher, Run()).source.asks_labels

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zsq.data import digits
from zsq.data.datasets import open_dataset
from zsq.data.digits import train
from zsq.evaluation.accuracy import evaluate
from zsq.models.teacher import load_teacher


def test_halves_are_disjoint_and_balanced() -> None:
    (images, labels), (others, other_labels) = digits.split(train=True), digits.split(train=False)
    assert len(images) + len(others) == 1797
    assert np.abs(np.bincount(labels) - np.bincount(other_labels)).max() <= 1
    whole = np.concatenate([images, others]).reshape(1797, -1)
    assert whole.max() == 255
    assert set(np.unique(whole)) == {round(value / 16 * 255) for value in range(17)}


def test_spec_holds_the_training_pixels_statistics() -> None:
    pixels = digits.split(train=True)[0] / 255
    assert digits.SPEC.mean[0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert digits.SPEC.std[0] == pytest.approx(pixels.std(), abs=1e-4)


def test_bundled_weights_recognise_the_other_half() -> None:
    teacher = load_teacher("digits")
    result = evaluate(teacher.network, open_dataset("digits", teacher.spec))
    assert result.num_images == 899
    assert result.top1_correct == pytest.approx(887, abs=2)
    assert digits.NETWORK.weights.stat().st_size < 200_000


def test_one_pixel_shifts() -> None:
    image = torch.zeros(64, 1, 8, 8)
    image[:, :, 3, 4] = 1.0
    shifted = train.shifted(image, torch.Generator().manual_seed(0))
    spots = {tuple(spot) for spot in (shifted == 1.0).nonzero()[:, 2:].tolist()}
    assert spots == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    background = -digits.SPEC.mean[0] / digits.SPEC.std[0]
    assert shifted.min().item() == pytest.approx(background)
    assert len(shifted.unique()) == 3


@pytest.mark.slow
def test_training_writes_the_same_weights_twice(tmp_path, capsys) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        train.main([str(tmp_path / name), "--epochs", "1"])
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert "of 899" in capsys.readouterr().out


@pytest.mark.slow
def test_training_reaches_98_percent() -> None:
    hits, count = train.correct(train.train(), train=False)
    assert count == 899
    assert hits / count >= 0.98

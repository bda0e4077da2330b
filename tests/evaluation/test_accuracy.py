import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zsq.data.datasets import open_dataset
from zsq.errors import InputError, NumericsError
from zsq.evaluation.accuracy import (
    Evaluation,
    beside_float,
    evaluate,
    evaluate_many,
    paired_difference,
    wilson_interval,
)
from zsq.types import Batch, ImageSpec


def pixel_spec(classes: int) -> ImageSpec:
    return ImageSpec(channels=1, height=2, width=2, classes=classes, mean=(0.0,), std=(1.0,))


@pytest.fixture
def numbered(tmp_path):
    """Seven images whose every pixel is their number, labels 0 1 2 3 4 5 0."""

    def open_with(classes: int):
        images = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 2, 2, 1))
        np.savez(tmp_path / "set.npz", images=np.ascontiguousarray(images), labels=np.array([0, 1, 2, 3, 0, 1, 0]))
        return open_dataset(str(tmp_path / "set.npz"), pixel_spec(classes))

    return open_with


def rank(order: list[int]):
    """Return a predictor whose logits put the classes in this order for every image."""

    def predict(images: Tensor) -> Tensor:
        logits = torch.zeros(len(order))
        logits[torch.tensor(order)] = torch.arange(len(order), 0, -1.0)
        return logits.expand(len(images), -1)

    return predict


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_counts(numbered, batch_size) -> None:
    result = evaluate(rank([3, 4, 5, 2, 1, 0]), numbered(6), teacher=rank([3, 0, 1, 2, 4, 5]), batch_size=batch_size)
    assert result == Evaluation(num_images=7, top1_correct=1, top5_correct=4, agreement_count=7)
    assert result.top1 == pytest.approx(100 / 7)
    assert result.top5 == pytest.approx(400 / 7)
    assert result.teacher_agreement == 100


def test_no_top5_below_five_classes_and_no_agreement_without_a_teacher(numbered) -> None:
    result = evaluate(rank([0, 1, 2, 3]), numbered(4))
    assert (result.top1_correct, result.top5, result.teacher_agreement) == (3, None, None)
    assert json.loads(json.dumps(result.as_dict()))["top5_correct"] is None


def test_several_networks_in_one_pass(numbered) -> None:
    data = numbered(4)
    reads = []
    original = data.batches
    data.batches = lambda size: reads.append(size) or original(size)
    seen = []
    results = evaluate_many(
        {"a": rank([0, 1, 2, 3]), "b": rank([1, 0, 2, 3])},
        data,
        teacher=rank([1, 2, 3, 0]),
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert {name: (r.top1_correct, r.agreement_count) for name, r in results.items()} == {"a": (3, 0), "b": (2, 7)}
    assert reads == [4]
    assert seen == [(0, 7), (4, 7), (7, 7)]


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        (8, 10, 49.02, 94.33),  # (0.8 + 0.19207 -+ 0.31338) / 1.38415; the normal interval would end at 104.8
        (0, 10, 0.0, 27.75),  # z^2 / (n + z^2)
        (10, 10, 72.25, 100.0),
        (4606, 5000, 91.34, 92.83),
    ],
)
def test_wilson_interval(correct, count, low, high) -> None:
    assert wilson_interval(correct, count) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_each_images_class_is_kept(numbered) -> None:
    result = evaluate(rank([3, 4, 5, 2, 1, 0]), numbered(6), batch_size=3)
    assert result.predictions.tolist() == [3] * 7
    assert result.labels.tolist() == [0, 1, 2, 3, 0, 1, 0]


def test_a_teacher_evaluated_before_is_not_asked_again(numbered) -> None:
    known = evaluate(lambda images: torch.nn.functional.one_hot(images[:, 0, 0, 0].mul(255).long(), 7), numbered(7))
    assert known.predictions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    found = evaluate_many({"a": rank([5, 0, 1, 2, 3, 4, 6])}, numbered(7), teacher=known, batch_size=3)
    assert found["a"].agreement_count == 1


@pytest.mark.parametrize(
    ("first", "second", "mean", "middle", "reach"),
    [
        # d = 0 1 0 0 and 1 -1: mean 1/6, variance 3/6 - 1/36, so 1.96 * sqrt(17/36 / 6); unpaired: 1.96 * sqrt(2/3) / 2
        ([1, 1, 1, 0], [1, 0, 1, 0], 25.0, 100 / 6, 54.986),
        ([1, 1, 0], [1, 1, 0], 0.0, 0.0, 55.436),  # no difference on three images says little: 1.96 * sqrt(2/5 / 5)
        # two seeds: d = 0.5 -0.5 and 1 -1: variance 2.5/4, so 1.96 * sqrt(0.625 / 4)
        ([1.0, 0.0], [0.5, 0.5], 0.0, 0.0, 77.474),
    ],
)
def test_paired_difference(first, second, mean, middle, reach) -> None:
    found = paired_difference(np.array(first), np.array(second))
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.high == pytest.approx(middle + reach, abs=0.001)
    assert found.low == pytest.approx(middle - reach, abs=0.001)


def test_a_difference_is_one_of_the_same_images() -> None:
    labels = np.zeros(4, np.int32)
    floats, file = (
        Evaluation(num_images=4, top1_correct=3, top5_correct=None, predictions=np.array(found), labels=labels)
        for found in ([0, 0, 0, 1], [1, 0, 0, 0])
    )
    assert beside_float(file, floats).minus_float == paired_difference(np.array([0, 1, 1, 1]), np.array([1, 1, 1, 0]))
    unlabelled = Evaluation(num_images=4, top1_correct=None, top5_correct=None)
    assert beside_float(unlabelled, floats).minus_float is None


@pytest.mark.parametrize(("first", "second"), [(3, 4), (1, 1), (0, 0)])
def test_only_the_same_images_can_be_compared(first, second) -> None:
    with pytest.raises(InputError, match=r"two on the same images, 2 at least"):
        paired_difference(np.zeros(first), np.zeros(second))


def test_a_module_gets_images_without_gradients(numbered) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.fc(x.flatten(1))

    assert evaluate(Net(), numbered(4)).num_images == 7


def test_logits_of_the_wrong_shape(numbered) -> None:
    with pytest.raises(InputError, match=r"network gives \[7\] for 7 images; \[N, classes\] is needed\."):
        evaluate(lambda images: images[:, 0, 0, 0], numbered(4))


def test_logits_that_are_not_finite(numbered) -> None:
    with pytest.raises(NumericsError, match="network gives logits that are not finite"):
        evaluate(lambda images: torch.full((len(images), 4), float("nan")), numbered(4))


def test_labels_may_lie_on_another_device():
    """As a source on a GPU has them: predictions come back to the processor, and labels must, too."""

    class Far:
        def __init__(self, values: Tensor) -> None:
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def cpu(self) -> Tensor:
            return self.values

    class Set:
        num_images = 4

        def batches(self, batch_size: int = 100):
            yield Batch(torch.eye(4)[:, :, None, None], Far(torch.arange(4)))  # type: ignore[arg-type]

    assert evaluate(lambda x: x.flatten(1), Set()).top1 == 100

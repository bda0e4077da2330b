"""Figures of maps, embeddings and values, against closed forms."""

import pytest
import torch

from zsq.evaluation.accuracy import evaluate
from zsq.evaluation.measures import ClassTally, TruthTally, mean_iou, verification_measures
from zsq.types import Batch, Output


def test_mean_iou_of_counts() -> None:
    assert mean_iou(torch.tensor([[2, 1], [1, 4]])) == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert mean_iou(torch.tensor([[3, 0, 0], [0, 0, 0], [0, 0, 1]])) == 1.0


def test_what_nobody_has_said_is_left_out() -> None:
    tally = ClassTally(3)
    tally.add(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0, 1], [-1, 1]]]))
    share, iou = tally.measures("map", "pixel accuracy", dense=True)
    assert share.value == pytest.approx(2 / 3)
    assert iou.value == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_verification_finds_the_best_threshold() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    (right,) = verification_measures("way", vectors.double(), torch.tensor([0, 0, 1, 1]))
    assert right.value == 1.0
    (wrong,) = verification_measures("way", vectors.double(), torch.tensor([0, 1, 0, 1]))
    assert wrong.value == pytest.approx(0.5)
    assert verification_measures("way", vectors.double(), torch.tensor([0, 1, 2, 3])) == ()


def test_masks_of_another_size_are_compared_by_the_nearest_class() -> None:
    tally = TruthTally((Output("map", "classes", (2, 1, 1)),))
    tally.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[[1, 1], [1, 0]]]))
    assert tally.measures()[0].value == pytest.approx(0.75)


class Few:
    """Two images and what is true of them."""

    num_images = 2

    def __init__(self, labels: torch.Tensor, *, labelled: bool = True) -> None:
        self.labels, self.labelled = labels, labelled

    def batches(self, batch_size: int = 100):
        yield Batch(torch.zeros(2, 1, 2, 2), self.labels)


def test_values_are_measured_against_the_truth_and_the_teacher() -> None:
    outputs = (Output("size", "values", (2,)),)
    truth = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    found = evaluate(lambda images: truth + 1, Few(truth), teacher=lambda images: truth + 1, outputs=outputs)
    assert {measure.name: measure.value for measure in found.truths} == pytest.approx(
        {"R2": 0.75, "relative error": 0.5}
    )
    assert [measure.value for measure in found.measures] == [0.0]
    assert found.teacher_agreement == 100.0
    unlabelled = evaluate(
        lambda images: truth, Few(torch.full((2,), -1), labelled=False), teacher=lambda _: truth, outputs=outputs
    )
    assert unlabelled.truths == ()
    assert unlabelled.as_dict()["measures"][0]["name"] == "relative error"

"""Losses and agreement by the kind of an output, against closed forms."""

import math

import pytest
import torch

from zsq.errors import InputError
from zsq.training.answers import Answers, cosine_distance, relative_squared_error, two_sided
from zsq.training.losses import kl_divergence, soft_cross_entropy
from zsq.types import Output

MAP = Output("map", "classes", (3, 2, 2))
YES = Output("yes", "classes", (1, 2))
WAY = Output("way", "embedding", (2,))
SIZE = Output("size", "values", (4,))


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_vector_of_logits_is_the_papers_case() -> None:
    teacher, student = draws(6, 5), draws(6, 5, seed=1)
    answers = Answers()
    assert torch.equal(answers.losses(teacher, student, 2.0)[0], soft_cross_entropy(teacher, student, 2.0))
    assert torch.equal(answers.distance(teacher, student), kl_divergence(teacher, student))
    assert answers.sameness(teacher) is None
    assert answers.named_classes(teacher).tolist() == teacher.argmax(1).tolist()


def test_parts_come_back_as_they_were() -> None:
    parts = [draws(3, *output.shape, seed=i) for i, output in enumerate((MAP, WAY, SIZE))]
    packed = torch.cat([part.flatten(1) for part in parts], dim=1)
    found = Answers((MAP, WAY, SIZE)).parts(packed)
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    assert Answers((SIZE, MAP)).class_columns() == [4]


def test_a_map_of_classes_counts_each_position_alike() -> None:
    teacher, student = draws(2, 12), draws(2, 12, seed=1)
    rows = [answer.view(2, 3, 4).transpose(1, 2).reshape(8, 3) for answer in (teacher, student)]
    assert Answers((MAP,)).distance(teacher, student).item() == pytest.approx(kl_divergence(*rows).item())
    assert Answers((MAP,)).losses(teacher, student)[0].item() == pytest.approx(soft_cross_entropy(*rows).item())
    same = Answers((MAP,)).agreements(teacher, student)
    assert same.flatten().tolist() == pytest.approx(
        (rows[0].argmax(1) == rows[1].argmax(1)).view(2, 4).double().mean(1).tolist()
    )


def test_a_single_logit_is_yes_against_no() -> None:
    logit = torch.tensor([[[1.5, -2.0]]])
    assert two_sided(logit).softmax(1)[0, 1].tolist() == pytest.approx(torch.sigmoid(logit)[0, 0].tolist())
    answers = Answers((YES,))
    assert answers.named_classes(logit.flatten(1)).tolist() == [[1, 0]]
    p, q = 1 / (1 + math.exp(-1.0)), 0.5
    wanted = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = answers.distance(torch.ones(1, 2), torch.zeros(1, 2))
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_an_embedding_counts_by_its_direction() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    assert cosine_distance(teacher, student).item() == pytest.approx(0.5)
    assert Answers((WAY,)).agreements(teacher, student).flatten().tolist() == pytest.approx([0.0, 1.0])
    assert Answers((WAY,)).sameness(teacher).item() == pytest.approx(0.5)
    assert Answers((WAY,)).sameness(torch.eye(2)).item() == pytest.approx(0.0)


def test_values_count_in_units_of_the_teachers_variance() -> None:
    teacher = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert relative_squared_error(teacher, teacher + 1).item() == pytest.approx(0.25)
    assert relative_squared_error(teacher, torch.full_like(teacher, 2.0)).item() == pytest.approx(1.0)
    assert Answers((SIZE,)).agreements(teacher, teacher + 1).item() == pytest.approx(0.75)
    alike = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(3, 4)
    assert Answers((SIZE,)).sameness(alike).item() == pytest.approx(1.0)
    assert Answers((SIZE,)).sameness(torch.tensor([[0.0] * 4, [1.0] * 4])).item() == pytest.approx(0.0)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match=r"teacher gives \(2, 4\), student \(2, 5\)"):
        Answers((SIZE,)).distance(draws(2, 4), draws(2, 5))

"""What a network gives: told apart, packed in one row an image, and written under its names."""

import pytest
import torch
from torch import nn

from tests.heads import NETWORKS, spec_of
from zsq.errors import TeacherError
from zsq.graph.outputs import outputs_of, pack, recognised
from zsq.models.teacher import teacher_from_module
from zsq.types import ImageSpec, Output

FLAT = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
MAP = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))


def spec(**said) -> ImageSpec:
    return ImageSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), **said)


@pytest.mark.parametrize(
    ("answer", "said", "kinds", "classes"),
    [
        (FLAT, {"classes": 5}, [], 5),
        (FLAT, {"outputs": (Output("", "classes"),)}, [], 5),
        (MAP, {"classes": 5}, [("logits", "classes", (5, 4, 4))], 5),
        (MAP[:, :1], {"classes": 2}, [("logits", "classes", (1, 4, 4))], 2),
        (FLAT[:, :1], {"classes": 2}, [("logits", "classes", (1,))], 2),
        (nn.functional.normalize(FLAT), {}, [("embedding", "embedding", (5,))], 0),
        (FLAT, {"outputs": (Output("", "values"),)}, [("values", "values", (5,))], 0),
        (FLAT[:, 0], {"outputs": (Output("", "values"),)}, [("values", "values", ())], 0),
        ({"out": MAP, "aux": MAP}, {"classes": 5}, [("out", "classes", (5, 4, 4)), ("aux", "classes", (5, 4, 4))], 5),
        (
            (FLAT, MAP),
            {"outputs": (Output("", "classes"), Output("", "values"))},
            [("output_0", "classes", (5,)), ("output_1", "values", (5, 4, 4))],
            5,
        ),
        (
            {"a b": FLAT, "c": [MAP]},
            {"outputs": (Output("output_1", "values"), Output("a_b", "embedding"))},
            [("a_b", "embedding", (5,)), ("output_1", "values", (5, 4, 4))],
            0,
        ),
    ],
)
def test_outputs_are_told_apart(answer, said, kinds, classes) -> None:
    found = recognised(answer, spec(**said), "net")
    assert [(o.name, o.kind, o.shape) for o in found.outputs] == kinds
    assert found.classes == classes


@pytest.mark.parametrize(
    ("answer", "said", "text"),
    [
        (FLAT, {}, r"gives \[2, 5\] for 2 images\. If that is right, say what it means: outputs classes"),
        (FLAT, {"classes": 7}, "knows 5 classes; classes says 7"),
        (MAP, {"classes": 7}, r"gives \[2, 5, 4, 4\] for 2 images; \[2, 7\] was expected"),
        ((FLAT, MAP), {}, "outputs='output_0=values,output_1=values'"),
        ({"a": FLAT}, {"outputs": (Output("b", "values"), Output("c", "values"))}, "outputs='a=values"),
        (FLAT.long(), {"classes": 5}, "int64 values, which cannot be learnt from"),
        (FLAT[:1], {"classes": 5}, r"\[1, 5\] for 2 images; one row an image"),
        ({}, {"classes": 5}, "returns a dict without a tensor in it"),
        ("text", {"classes": 5}, "returns a str"),
        (FLAT[:, 0], {"outputs": (Output("", "embedding"),)}, "one number an image, no embedding"),
    ],
)
def test_outputs_that_cannot_be_told(answer, said, text) -> None:
    with pytest.raises(TeacherError, match=text):
        recognised(answer, spec(**said), "net")


def test_an_embedding_declared_as_classes_is_asked_for(caplog) -> None:
    teacher_from_module(NETWORKS["embedder"](), spec_of("embedder", classes=12))
    assert "has unit norm; is it an embedding?" in caplog.text


@pytest.mark.parametrize("name", NETWORKS)
def test_a_teacher_packs_what_its_network_gives(name) -> None:
    network = NETWORKS[name]()
    teacher = teacher_from_module(network, spec_of(name))
    assert outputs_of(teacher.network) == teacher.spec.outputs
    images = torch.randn(3, *teacher.spec.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = network(images)
        wanted = pack(*(given.values() if isinstance(given, dict) else [given]))
        assert torch.allclose(teacher.network(images), wanted, atol=1e-5)

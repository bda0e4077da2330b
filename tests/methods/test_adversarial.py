"""Generators without labels: what they learn, alone and against a student, and that the student is left alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from zsq.errors import InputError
from zsq.methods import Adversarial
from zsq.methods.adversarial import AdversarialSource
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import QAT
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller
from zsq.quantization.quantizers import set_mode
from zsq.runs.quantize import quantize
from zsq.runs.summary import summary_rows
from zsq.runtime.files import load_tensors, save_tensors
from zsq.training.loop import Run
from zsq.training.losses import kl_divergence

WARM_UP = Adversarial(steps=60, batch_size=16, width=8, learning_rate=5e-3)
TERMS = {"bns", "instance_entropy", "batch_entropy"}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


@pytest.fixture(scope="module")
def warm(teacher: Teacher) -> dict[str, Tensor]:
    """State of a generator after the warm-up."""
    state = WARM_UP.fit(teacher, Run(), distill_steps=300).source.state_dict()
    return {name: value.clone() for name, value in state.items()}


def source_of(teacher: Teacher, settings: Adversarial, state: dict[str, Tensor] | None = None) -> AdversarialSource:
    source = settings.fit(teacher, Run(), distill_steps=300, fitted=state).source
    assert isinstance(source, AdversarialSource)
    return source


def student_of(teacher: Teacher, source: AdversarialSource, bits: str = "3", scales: str = "learnable") -> Student:
    settings = QAT(bits=bits, num_samples=64, scales=scales, bias_correction=False)
    learnable = scales == "learnable"
    return quantize_ptq(teacher.network, lambda: source.sample(64), settings, Run(), learnable=learnable)


def weights_of(source: AdversarialSource) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in generator.parameters()] for generator in source.generators]


def test_warm_up_lowers_its_losses(teacher, warm):
    fresh = source_of(teacher, dataclasses.replace(WARM_UP, steps=0)).batch(0, None).losses
    trained = source_of(teacher, WARM_UP, warm).batch(0, None).losses
    assert fresh.keys() == trained.keys() == TERMS
    assert trained["bns"] < 0.5 * fresh["bns"]
    information = [losses["batch_entropy"] - losses["instance_entropy"] for losses in (fresh, trained)]
    assert information[1] > 0.7  # nats, of each image on its class, which both entropies raise
    assert information[1] > 2.5 * information[0]  # untrained, bound contrast alone shows a few classes
    assert trained["batch_entropy"] > 2  # ten classes alike have 2.3
    assert fresh["batch_entropy"] < 1.5


def distance(teacher: Teacher, source: AdversarialSource, student: Student) -> float:
    images = torch.cat([batch.images for batch in source.sample(200)])
    with torch.no_grad():
        return kl_divergence(teacher.network(images), student.eval()(images)).item()


@pytest.mark.slow
def test_against_a_student_the_distance_grows(teacher, warm):
    found = {}
    for weight in (0.0, 50.0):
        source = source_of(teacher, dataclasses.replace(WARM_UP, adversarial_weight=weight), warm)
        student = student_of(teacher, source_of(teacher, WARM_UP, warm))
        before = distance(teacher, source, student)
        losses = [source.batch(step, student).losses for step in range(40)]
        assert losses[0].keys() == TERMS | {"student_kl"}
        found[weight] = distance(teacher, source, student)
        assert found[weight] > 1.3 * before or not weight
    assert found[50.0] > 1.3 * found[0.0]


def facts(student: Student) -> list[object]:
    tensors = {name: value.clone() for name, value in student.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    flags = [p.requires_grad for p in student.parameters()] + [m.training for m in student.modules()]
    return [tensors, gradients, flags]


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_left_alone_bit_for_bit(teacher, warm, scales, training):
    source = source_of(teacher, WARM_UP, warm)
    student = student_of(teacher, source, scales=scales).train(training)
    student(source.batch(0, None).images).sum().backward()  # gradients of the student's own step
    before, weights = facts(student), weights_of(source)
    assert any(isinstance(gradient, Tensor) for gradient in before[1])
    batch = source.batch(1, student)
    assert same(facts(student), before)
    assert not same(weights_of(source), weights)
    assert batch.losses["student_kl"] > 0
    assert not batch.losses["student_kl"].requires_grad


def test_the_student_changes_the_update(teacher, warm):
    alone, against = (source_of(teacher, WARM_UP, warm) for _ in range(2))
    student = student_of(teacher, alone)
    assert torch.equal(alone.batch(0, None).images, against.batch(0, student).images)  # the update follows the images
    assert not same(weights_of(alone), weights_of(against))
    assert not torch.equal(alone.batch(1, None).images, against.batch(1, student).images)


def test_the_distance_is_the_students_in_evaluation(teacher, warm):
    source = source_of(teacher, WARM_UP, warm)
    student = student_of(teacher, source, bits="6")
    batch = source.batch(0, student)
    with torch.no_grad():
        wanted = kl_divergence(batch.teacher_logits, student.eval()(batch.images))
    torch.testing.assert_close(batch.losses["student_kl"], wanted, rtol=0.02, atol=1e-4)
    set_mode(student, "off")  # a student that computes what the teacher does
    assert source.batch(1, student).losses["student_kl"] < 0.2 * wanted


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_a_saved_distillation_goes_on_bit_for_bit(teacher, warm, tmp_path, scales):
    def distiller() -> Distiller:
        source = source_of(teacher, WARM_UP, warm)
        student = student_of(teacher, source, scales=scales)
        settings = QAT(bits="3", steps=4, scales=scales)
        return Distiller(student, teacher.network, source, settings, torch.device("cpu"))

    whole, first, second = distiller(), distiller(), distiller()
    for step in range(2):
        whole.step(step)
        first.step(step)
    save_tensors(tmp_path / "state.safetensors", first.state_dict())
    second.load_state_dict(load_tensors(tmp_path / "state.safetensors")[0])
    for step in range(2, 4):
        assert same(whole.step(step), second.step(step))
    assert same(whole.state_dict(), second.state_dict())


def test_labels_are_the_teachers_answers(teacher, warm):
    source = source_of(teacher, WARM_UP, warm)
    for batch in (*source.sample(60, batch_size=25), source.batch(0, None)):
        assert torch.equal(batch.labels, teacher.network(batch.images).argmax(1))
        torch.testing.assert_close(batch.teacher_logits, teacher.network(batch.images), rtol=1e-4, atol=1e-4)
    assert not source.asks_labels


def test_the_generator_is_told_no_label(teacher):
    for style_size in (0, 4):
        source = source_of(teacher, Adversarial(steps=1, batch_size=4, width=4, style_size=style_size))
        codes = source.generators[0].codes
        assert codes.shape == (1, 1)
        assert codes.item() == 0
        images = next(source.sample(8)).images
        assert len({image.numpy().tobytes() for image in images}) == 8


def test_several_generators_learn_in_turn_and_share_the_samples(teacher, tmp_path):
    settings = Adversarial(steps=0, batch_size=8, width=4, generators=3)
    source = source_of(teacher, settings)
    assert len(source.generators) == 3
    before = weights_of(source)
    assert not same(before[0], before[1])
    for step in range(3):
        source.batch(step, None)
        after = weights_of(source)
        assert [not same(a, b) for a, b in zip(before, after, strict=True)] == [n == step for n in range(3)]
        before = after
    save_tensors(tmp_path / "state.safetensors", source.state_dict())
    again = source_of(teacher, settings, load_tensors(tmp_path / "state.safetensors")[0])
    assert torch.equal(source.batch(3, None).images, again.batch(3, None).images)


def test_samples_come_from_all_generators(teacher):
    source = source_of(teacher, Adversarial(steps=0, batch_size=8, width=4, generators=3))
    whole = next(source.sample(90)).images
    for generator in source.generators:
        with torch.no_grad():
            generator.to_pixels.bias.fill_(50.0)  # this one's pixels all saturate
        changed = (next(source.sample(90)).images != whole).flatten(1).any(1)
        assert 15 <= changed.sum() <= 45
        whole = next(source.sample(90)).images
    assert all(len(next(source.sample(1, batch_size=1)).images) == 1 for _ in range(2))


@pytest.mark.parametrize("name", ["bns_weight", "instance_entropy_weight", "batch_entropy_weight"])
def test_each_term_can_be_switched_off(teacher, name):
    both, one = (source_of(teacher, Adversarial(steps=2, batch_size=8, width=4, **c)) for c in ({}, {name: 0.0}))
    assert not torch.equal(next(both.sample(4)).images, next(one.sample(4)).images)
    assert one.batch(0, None).losses.keys() == TERMS


def test_entropies_count_more_with_many_classes(teacher):
    many = dataclasses.replace(teacher, spec=dataclasses.replace(teacher.spec, classes=320))
    source = source_of(many, Adversarial(steps=0, width=4))
    assert source.weights == {"bns": 1.0, "instance_entropy": 10.0, "batch_entropy": -10.0, "student_kl": -1.0}
    assert source_of(teacher, Adversarial(steps=0, width=4)).weights["batch_entropy"] == -1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"generators": 0}, "method.generators is 0; it must be at least 1"),
        ({"adversarial_weight": -1.0}, "method.adversarial_weight is -1.0; it must be at least 0"),
        ({"instance_entropy_weight": -0.5}, "method.instance_entropy_weight is -0.5; it must be at least 0"),
        (
            {"bns_weight": 0.0, "instance_entropy_weight": 0.0, "batch_entropy_weight": 0.0},
            "method.bns_weight, method.instance_entropy_weight, method.batch_entropy_weight are all 0",
        ),
        ({"width": 0}, "method.width is 0; it must be at least 1"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InputError, match=text):
        Adversarial(**settings)


@pytest.mark.slow
def test_a_whole_run_claims_no_recognition(teacher, tmp_path, said):
    settings = ("method.steps=5", "method.batch_size=8", "method.width=8", "quantizer.num_samples=40")
    result = quantize(
        teacher,
        out=tmp_path / "run",
        method="adversarial",
        quantizer="qat",
        settings=(*settings, "quantizer.steps=3"),
    )
    assert result.record.label_recognition is None
    assert result.record.kd_weight == 1.0
    assert result.record.data_free is True
    assert "label recognition" not in dict(summary_rows(result.record))
    assert not [text for text in said if "recognises" in text]

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import SPEC, Plain, PreActivated, images, settle

from zsq.data.datasets import open_dataset
from zsq.errors import InputError, NumericsError
from zsq.methods import ZSCGAN, Noise, Real
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.quantization import PTQ, QAT
from zsq.quantization.convert import convert
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller, distill, layer_views
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, quantizers
from zsq.runtime.files import load_tensors, save_tensors
from zsq.training.loop import Run
from zsq.training.losses import distillation_loss, intermediate_loss, soft_cross_entropy
from zsq.types import SampleSource

METHODS = {
    "noise": Noise(batch_size=16),
    "light": ZSCGAN(steps=2, batch_size=8, width=4, generator="light", style_size=2),
    "unet": ZSCGAN(steps=2, batch_size=8, width=4, generator="unet", noise_channels=3),
}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = settle(Plain())
        net.head.weight.mul_(20)  # so that answers differ from image to image
        return teacher_from_module(net, SPEC)


def settings_of(**changes: object) -> QAT:
    return QAT(**({"bits": "4", "steps": 6, "num_samples": 32, "learning_rate": 1e-2} | changes))


def make(teacher: Teacher, settings: QAT, method: str = "noise") -> tuple[Student, SampleSource]:
    run = Run(seed=3)
    surrogate = METHODS[method].fit(teacher, run, distill_steps=settings.steps)
    learnable = settings.scales == "learnable"
    student = quantize_ptq(
        surrogate.network, lambda: surrogate.source.sample(settings.num_samples), settings, run, learnable=learnable
    )
    return student, surrogate.source


def distiller_of(teacher: Teacher, settings: QAT, method: str = "noise") -> Distiller:
    student, source = make(teacher, settings, method)
    return Distiller(student, teacher.network, source, settings, torch.device("cpu"))


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scales", "bits", "rule"),
    [("learnable", "3", "mse"), ("learnable", "4", "minmax"), ("moving-average", "4", "minmax")],
)
def test_distillation_lowers_the_loss_on_other_images(scales: str, bits: str, rule: str) -> None:
    teacher = load_teacher("digits")
    settings = settings_of(steps=40, scales=scales, bits=bits, range_rule=rule, num_samples=200, kd_weight=1.0)
    source = Real(data="digits:train", batch_size=32).fit(teacher, Run(seed=3)).source
    learnable = scales == "learnable"
    student = quantize_ptq(teacher.network, lambda: source.sample(200), settings, Run(), learnable=learnable)
    x = torch.cat([batch.images for batch in open_dataset("digits", teacher.spec).batches()])[:300]

    def excess() -> float:
        with torch.no_grad():
            logits = teacher.network(x)
            return (soft_cross_entropy(logits, student.eval()(x)) - soft_cross_entropy(logits, logits)).item()

    before = excess()
    distill(student, teacher.network, source, settings, Run(seed=3))
    assert 0 < excess() < 0.75 * before
    assert not student.training


def test_learnable_grids_and_all_weights_move(teacher: Teacher) -> None:
    distiller = distiller_of(teacher, settings_of(scale_learning_rate=1e-2))
    student = distiller.student
    before = copied(dict(student.named_parameters()))
    distiller.step(0)
    distiller.step(1)
    still = set(before) - differing(before, dict(student.named_parameters()))
    assert all(name.endswith("zero_point") for name in still)  # of those whose range cuts nothing off
    for quantizer in quantizers(student):
        assert (quantizer.scale > 0).all()


def test_grids_that_follow_are_not_trained(teacher: Teacher) -> None:
    distiller = distiller_of(teacher, settings_of(scales="moving-average"))
    student = distiller.student
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert all(name.endswith((".weight", ".bias")) for name in trained)
    before = {id(q): q.scale.detach().clone() for q in quantizers(student)}
    distiller.step(0)
    distiller.step(1)
    assert all(not torch.equal(before[id(q)], q.scale) for q in quantizers(student) if isinstance(q, WeightQuantizer))
    followed = [q for q in quantizers(student) if isinstance(q, ActivationQuantizer)]
    assert any(not torch.equal(before[id(q)], q.scale) for q in followed)


@pytest.mark.parametrize("method", ["light", "unet"])
def test_the_generator_keeps_learning_while_it_teaches(teacher: Teacher, method: str) -> None:
    settings = settings_of()
    student, source = make(teacher, settings, method)
    before = copied(dict(source.generator.named_parameters()))
    reference = copied(teacher.network.state_dict())
    distill(student, teacher.network, source, settings, Run(seed=3))
    assert differing(before, dict(source.generator.named_parameters())) == set(before)
    assert not differing(reference, teacher.network.state_dict())


def test_the_generators_cosine_spans_fit_and_distillation(teacher: Teacher) -> None:
    rates = []
    for distill_steps in (0, 6):
        source = METHODS["light"].fit(teacher, Run(), distill_steps=distill_steps).source
        rates.append(source.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-3 * 0.5)  # step 1 of 2
    assert rates[1] == pytest.approx(1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 8)).item()))
    distiller = distiller_of(teacher, settings_of(), "light")
    for step in range(6):
        distiller.step(step)
    assert distiller.source.optimizer.param_groups[0]["lr"] > 0  # step 7 of 8
    assert distiller.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5 * (1 - 3**0.5 / 2))  # step 5 of 6


def test_teacher_logits_of_the_batch_are_the_teachers(teacher: Teacher) -> None:
    distiller = distiller_of(teacher, settings_of(), "light")
    batch = distiller.source.batch(0, None)
    torch.testing.assert_close(batch.teacher_logits, teacher.network(batch.images), rtol=1e-4, atol=1e-4)
    assert set(distiller.step(1)) == {"kd", "agreement", "ce", "bns", "label_recognition"}


def test_the_step_is_equation_three(teacher: Teacher) -> None:
    settings = settings_of(kd_weight=0.25, temperature=2.0)
    distiller = distiller_of(teacher, settings)
    batch = distiller.source.batch(0, None)
    with torch.no_grad():
        answers = distiller.student.train()(batch.images)
        logits = teacher.network(batch.images)
    wanted = distillation_loss(answers, logits, batch.labels, kd_weight=0.25, temperature=2.0)
    torch.testing.assert_close(distiller.step(0)["kd"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_a_saved_distillation_goes_on_bit_for_bit(teacher: Teacher, tmp_path: Path, method: str, scales: str) -> None:
    settings = settings_of(scales=scales)
    whole = distiller_of(teacher, settings, method)
    first = distiller_of(teacher, settings, method)
    for step in range(3):
        whole.step(step)
        first.step(step)
    save_tensors(tmp_path / "state.safetensors", first.state_dict())
    second = distiller_of(teacher, settings, method)
    second.load_state_dict(load_tensors(tmp_path / "state.safetensors")[0])
    for step in range(3, 6):
        losses, resumed = whole.step(step), second.step(step)
        assert not differing(losses, resumed)
    assert not differing(whole.state_dict(), second.state_dict())


def test_the_loop_resumes_from_its_checkpoint(teacher: Teacher, tmp_path: Path) -> None:
    settings = settings_of()
    whole = distiller_of(teacher, settings, "unet")
    Run(tmp_path / "whole", seed=3).train("distill", whole, 6)
    parts = tmp_path / "parts"
    for steps in (4, 6):
        distiller = distiller_of(teacher, settings, "unet")
        Run(parts, seed=3, checkpoint_steps=2).train("distill", distiller, steps)
    assert not differing(whole.state_dict(), distiller.state_dict())


def test_two_distillations_are_the_same_bits(teacher: Teacher) -> None:
    states = []
    for _ in range(2):
        distiller = distiller_of(teacher, settings_of(), "light")
        distiller.step(0)
        distiller.step(1)
        states.append(copied(distiller.state_dict()))
    assert not differing(*states)


def test_grids_stay_valid_under_a_wild_step_size(teacher: Teacher) -> None:
    distiller = distiller_of(teacher, settings_of(scale_learning_rate=10.0, learning_rate=1e-9))
    distiller.step(0)
    for quantizer in quantizers(distiller.student):
        assert (quantizer.scale > 0).all()
        assert quantizer.quant_min <= quantizer.zero_point.min() <= quantizer.zero_point.max() <= quantizer.quant_max


def test_a_loss_that_is_not_finite_stops_the_run(teacher: Teacher) -> None:
    settings = settings_of()
    student, source = make(teacher, settings)
    batch = source.batch(0, None)
    batch.images[3, 0, 0, 0] = torch.nan
    source.batch = lambda step, student: batch
    with pytest.raises(NumericsError, match="distill: loss 'kd' is nan at step 0 of 6"):
        distill(student, teacher.network, source, settings, Run(seed=3))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": -1}, "quantizer.steps is -1; it must be at least 0"),
        ({"learning_rate": 0.0}, "quantizer.learning_rate is 0.0; it must be above 0"),
        ({"scale_learning_rate": -1.0}, "quantizer.scale_learning_rate is -1.0; it must be above 0"),
        ({"temperature": 0.0}, "quantizer.temperature is 0.0; it must be above 0"),
        ({"kd_weight": 1.5}, r"quantizer.kd_weight is 1.5; it must lie in \[0, 1\]"),
        ({"bits": "12"}, "widths from 2 to 8 work"),
        ({"weight_bits": {"fc.weight": 1}}, "quantizer.weight_bits.fc.weight is 1; widths from 2 to 8 work"),
        ({"intermediate_weight": -1.0}, "quantizer.intermediate_weight is -1.0; it must be at least 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        QAT(**settings)
    assert issubclass(QAT, PTQ)


def distances(student: Student, teacher: Teacher, x: Tensor) -> float:
    ours, theirs = layer_views(student, teacher.network)
    with torch.no_grad():
        return intermediate_loss(ours(x)[1], theirs(x)[1]).item()


def test_views_share_the_tensors_and_answer_alike(teacher: Teacher) -> None:
    student, source = make(teacher, settings_of())
    x = source.batch(0, None).images
    ours, theirs = layer_views(student, teacher.network)
    (answers, found), (logits, wanted) = ours(x), theirs(x)
    assert torch.equal(answers, student(x))
    torch.testing.assert_close(logits, teacher.network(x))
    assert [t.shape for t in found] == [t.shape for t in wanted] == [(16, 6, 8, 8), (16, 8, 4, 4)]  # not the head
    assert {id(p) for p in ours.parameters()} == {id(p) for p in student.parameters()}
    with torch.no_grad():
        student.network.get_parameter("conv.weight").mul_(2)
    assert not torch.equal(ours(x)[1][0], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "digits"])
def test_layers_come_nearer_where_they_are_distilled(teacher: Teacher, name: str) -> None:
    net = teacher if name == "toy" else load_teacher("digits")
    method = METHODS["light"] if name == "toy" else Real(data="digits:train", batch_size=32)
    losses = {}
    for weight in (0.0, 10.0):
        settings = settings_of(steps=30, learning_rate=2e-3, intermediate_weight=weight, bits="3", kd_weight=1.0)
        source = method.fit(net, Run(seed=3), distill_steps=30).source
        student = quantize_ptq(net.network, lambda: source.sample(32), settings, Run(), learnable=True)  # noqa: B023
        x, keys = next(source.sample(64)).images, student.state_dict().keys()
        before = distances(student, net, x)
        distill(student, net.network, source, settings, Run(seed=3))
        assert student.state_dict().keys() == keys
        losses[weight] = distances(student, net, x) / before
    assert losses[10.0] < 0.9
    assert losses[10.0] < 0.9 * losses[0.0]


def test_the_distance_is_logged_only_where_it_is_a_loss(teacher: Teacher) -> None:
    without, with_it = (distiller_of(teacher, settings_of(intermediate_weight=weight)) for weight in (0.0, 1.0))
    assert without.folded is None
    first, second = without.step(0), with_it.step(0)
    assert list(second) == ["kd", "intermediate", "agreement", *(name for name in first if name not in second)]
    torch.testing.assert_close(first["kd"], second["kd"])  # a folded teacher rounds otherwise
    assert second["intermediate"] > 0


def test_the_graph_is_clean_after_intermediate_distillation(teacher: Teacher) -> None:
    codes = []
    for weight in (0.0, 1.0):
        settings = settings_of(intermediate_weight=weight)
        student, source = make(teacher, settings)
        distill(student, teacher.network, source, settings, Run(seed=3))
        converted = convert(student)
        assert converted(source.batch(0, None).images).shape == (16, 5)
        codes.append((student.network.code, list(converted.state_dict())))
    assert codes[0] == codes[1]


def test_known_logits_of_the_teacher_are_taken(teacher: Teacher) -> None:
    distiller = distiller_of(teacher, settings_of(intermediate_weight=1.0))
    batch = distiller.source.batch(0, None)
    known = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    assert distiller._answers(batch.images, known, 16)[1] is known


def test_a_single_layer_has_no_intermediate_output() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).requires_grad_(False).eval()
        teacher = teacher_from_module(net, SPEC)
    settings = settings_of(intermediate_weight=1.0)
    with pytest.raises(InputError, match="needs a network of at least 2 layers"):
        distiller_of(teacher, settings)


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
"""What makes the host wait for a GPU."""


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_no_step_reads_a_value_back_from_the_device(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher("digits")
    source = ZSCGAN(steps=0, batch_size=4, width=4).fit(teacher, Run(), distill_steps=3).source
    settings = QAT(num_samples=8, scales=scales, bits="4")
    student = quantize_ptq(teacher.network, lambda: source.sample(8), settings, Run(), learnable=scales == "learnable")
    distiller = Distiller(student, teacher.network, source, settings, torch.device("cpu"))
    distiller.step(0)  # Adam and SGD make their states
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, refuse)
        losses = distiller.step(1)
    assert losses["kd"].isfinite()


def refuse(*_: object) -> None:
    raise AssertionError("a value was read")


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_lone_batch_norms_stay_what_the_file_computes(scales: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = teacher_from_module(settle(PreActivated()), SPEC)
    settings = settings_of(scales=scales, learning_rate=1e-3)
    student, source = make(teacher, settings)
    before = copied(dict(student.network.named_buffers()))
    grids = [quantizer for quantizer in quantizers(student) if isinstance(quantizer, ActivationQuantizer)]
    scales_before = [quantizer.scale.clone() for quantizer in grids]
    distill(student, teacher.network, source, settings, Run(seed=3))
    for role in ("factor", "shift"):
        assert torch.equal(student.network.get_buffer(f"batch_norm_{role}"), before[f"batch_norm_{role}"])
    assert not all(torch.equal(grid.scale, value) for grid, value in zip(grids, scales_before, strict=True))
    x = images(200, seed=5)
    with torch.no_grad():
        steps = (student(x) - convert(student)(x)) / student.network.get_submodule(next(iter(student.ends))).scale
    assert (steps.abs() < 1e-3).float().mean() >= 0.99


@pytest.mark.parametrize(("rate", "undone"), [(3e-4, False), (10.0, True)])
def test_a_distillation_that_makes_it_worse_is_undone(rate: float, undone: bool, said: list[str]) -> None:
    teacher, x = load_teacher("digits"), images_of_digits()
    source = Real(data="digits:train", limit=200, batch_size=32).fit(teacher, Run()).source
    source.true_labels = False  # as generated images, which have the teacher's answers alone
    settings = QAT(bits="4", num_samples=100, steps=6, learning_rate=rate)

    def calibrated() -> Student:
        return quantize_ptq(teacher.network, lambda: source.sample(100), settings, Run(), learnable=True)

    student = calibrated()
    settings.train(student, teacher.network, source, Run())
    with torch.no_grad():
        same = torch.equal(student(x), calibrated()(x))
    assert student.undone == same == undone
    assert any("took the student away from the teacher" in line for line in said) == undone


def images_of_digits() -> Tensor:
    return next(iter(open_dataset("digits", load_teacher("digits").spec).batches(20))).images


def test_true_labels_may_take_a_student_away_from_its_teacher() -> None:
    teacher = load_teacher("digits")
    source = Real(data="digits:train", limit=200, batch_size=32).fit(teacher, Run()).source
    settings = QAT(bits="4", num_samples=100, steps=2, learning_rate=10.0)
    student = quantize_ptq(teacher.network, lambda: source.sample(100), settings, Run(), learnable=True)
    settings.train(student, teacher.network, source, Run())
    assert not student.undone

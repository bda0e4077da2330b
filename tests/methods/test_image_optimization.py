"""The methods that optimise pixels: their losses in closed form, the shared loop, and what each makes of the digits."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import SPEC, Plain, settle

from zsq.errors import InputError
from zsq.methods import DeepInversion, KnowledgeWithin, Spectral, ZeroQ
from zsq.methods.deepinversion import noise_student
from zsq.methods.image_optimization import Inversion, InversionSource
from zsq.methods.zeroq import plateau
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.quantization.quantizers import straight_through
from zsq.runtime.files import save_tensors
from zsq.training.loop import Run
from zsq.training.losses import (
    bns_loss,
    competition,
    feature_norm,
    image_norm,
    reversed_bns_loss,
    smoothness,
    squared_bns_distance,
    total_variation,
)
from zsq.types import ImageSpec

INVERSIONS = (ZeroQ, DeepInversion, KnowledgeWithin, Spectral)
every_inversion = pytest.mark.parametrize("kind", INVERSIONS)
TWO_LAYERS = [(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])), (torch.tensor([0.0]), torch.tensor([4.0]))]
ZERO, ONE = torch.zeros(3), torch.ones(3)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


@pytest.fixture(scope="module")
def coloured() -> Teacher:
    return teacher_from_module(settle(Plain()), SPEC)


def optimised(settings: Inversion, teacher: Teacher, seed: int = 0) -> tuple[InversionSource, list[dict[str, float]]]:
    """Return the source after its steps, and the losses of each."""
    source = settings.source(teacher, Run(seed=seed))
    found = [source.step(step) for step in range(source.steps)]
    return source, [{name: value.item() for name, value in losses.items()} for losses in found]


def recognised(source: InversionSource, teacher: Teacher) -> float:
    with torch.no_grad():
        logits = teacher.network(source.images(torch.arange(len(source.labels))))
    return (logits.argmax(1) == source.labels).float().mean().item()


# losses


def test_squared_distance_is_of_deviations_and_summed() -> None:
    # means: 9 + 16; deviations: 0 + 0 + (2 - 1)^2. With variances it would be 25 + 9, unsquared 5 + 1.
    assert squared_bns_distance(TWO_LAYERS, ZERO, ONE, ZERO).item() == pytest.approx(26)
    eps = torch.full((3,), 5.0)  # in both roots: (3 - sqrt 6)^2; on the batch's alone it would be larger
    assert squared_bns_distance(TWO_LAYERS, ZERO, ONE, eps).item() == pytest.approx(25 + (3 - math.sqrt(6)) ** 2)


def test_feature_norm_is_not_squared_and_goes_by_layer() -> None:
    # 5 of the first layer's means, 3 of the second's variances; one norm over all layers would give 5 + 3 only here,
    # so a second mean is moved: 5 + 2 against sqrt(29)
    assert feature_norm(TWO_LAYERS, ZERO, ONE).item() == pytest.approx(5 + 3)
    moved = [TWO_LAYERS[0], (torch.tensor([2.0]), torch.tensor([4.0]))]
    assert feature_norm(moved, ZERO, ONE).item() == pytest.approx(5 + 2 + 3)


@pytest.mark.parametrize("loss", [lambda m, t: squared_bns_distance(m, t, t, t), lambda m, t: feature_norm(m, t, t)])
def test_statistics_of_other_channels_are_refused(loss) -> None:
    with pytest.raises(InputError, match="the batch has statistics of 3 channels, the target of 2"):
        loss(TWO_LAYERS, torch.ones(2))


def test_reversed_bns_is_the_published_formula_and_not_the_papers() -> None:
    moments, zero, one = [(torch.tensor([0.0]), torch.tensor([4.0]))], torch.zeros(1), torch.ones(1)
    found = reversed_bns_loss(moments, zero, one, zero).item()
    assert found == pytest.approx(math.log(2) - 0.5 * (1 - 1 / 4))  # log(s'/s) - (1 - (s^2 + d^2) / s'^2) / 2
    assert bns_loss(moments, zero, one, zero).item() == pytest.approx(1.5 - math.log(2))
    apart = [(torch.tensor([2.0]), torch.tensor([3.0]))]
    wanted = math.log(2) - 0.5 * (1 - (1 + 1 + 4) / 4)  # eps of 1 on both: 2 and 4 become the variances
    assert reversed_bns_loss(apart, zero, one, one).item() == pytest.approx(wanted + 0.5 * math.log(0.5))


def test_total_variation_in_closed_form() -> None:
    image = torch.zeros(2, 1, 2, 2)
    image[0, 0, 1, 1] = 3.0
    image[1, 0, 1, 1] = 4.0
    # right, down and one diagonal see one step in each image, the norm over both is 5; the other diagonal sees none
    assert total_variation(image).item() == pytest.approx(15)
    assert total_variation(torch.ones(2, 3, 4, 5)).item() == 0


def test_image_norm_is_averaged_over_images() -> None:
    images = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    assert image_norm(images).item() == pytest.approx(4)  # (2 + 6) / 2; over the batch it would be sqrt(40)


def test_competition_lies_between_its_bounds() -> None:
    certain = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    assert competition(certain, certain).item() == pytest.approx(1)
    assert competition(certain, -certain).item() == pytest.approx(1 - math.log(2))
    one, other = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert 1 - math.log(2) < competition(one, other).item() < 1
    assert competition(one, other).item() == pytest.approx(competition(other, one).item())


def test_competition_in_closed_form() -> None:
    one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    js = 0.5 * (kl([0.5, 0.5], [0.3, 0.7]) + kl([0.1, 0.9], [0.3, 0.7]))
    assert competition(one, other).item() == pytest.approx(1 - js)
    with pytest.raises(InputError, match=r"teacher logits are \(1, 2\), student's \(1, 1\)"):
        competition(one, other[:, :1])


def test_smoothness_in_closed_form() -> None:
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 16.0
    # what the kernel spreads: 4 stays, 2 to four sides, 1 to four corners
    assert smoothness(point).item() == pytest.approx((12**2 + 4 * 2**2 + 4) / 25)
    assert smoothness(torch.full((2, 3, 4, 4), 0.7)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("patience", [1, 3, 10])
def test_plateau_is_that_of_torch(patience: int) -> None:
    noise = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = (noise + torch.linspace(3, 0, 200).clamp(min=2)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=1e-4)
    seen = set()
    for step, loss in enumerate(losses):
        rate = plateau(losses[:step], 0.5, patience=patience)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        seen.add(rate)
        optimizer.step()
        scheduler.step(loss)
    assert len(seen) >= 3


# the shared loop


@every_inversion
@pytest.mark.parametrize(
    ("steps", "iterations", "images", "each"),
    [(0, 4, 8, 4), (1, 4, 8, 1), (4, 4, 8, 4), (5, 4, 16, 3), (9, 4, 24, 3), (3, 1, 24, 1)],
)
def test_steps_are_divided_evenly_among_batches(
    kind: type[Inversion], steps: int, iterations: int, images: int, each: int, teacher: Teacher
) -> None:
    source = kind(steps=steps, iterations=iterations, batch_size=8).fit(teacher, Run()).source
    assert source.iterations == each
    assert [len(batch.labels) for batch in source.sample(1000, batch_size=1000)] == [images]
    assert source.state_dict()["pool"].dtype == torch.float16


def test_labels_are_balanced(teacher: Teacher) -> None:
    source = ZeroQ(steps=5, iterations=1, batch_size=8).fit(teacher, Run()).source
    assert source.labels.bincount().tolist() == [4] * 10
    assert source.labels[:10].tolist() != source.labels[10:20].tolist()


@every_inversion
def test_a_source_without_steps_can_still_be_timed(kind: type[Inversion], teacher: Teacher) -> None:
    source = kind(steps=0, iterations=2, batch_size=8).fit(teacher, Run()).source
    first = source.images(torch.arange(8))
    assert first.std() > 0.5
    for step in range(5):
        assert all(torch.isfinite(value) for value in source.step(step).values())
    assert len(source.labels) == 8
    assert not torch.equal(source.images(torch.arange(8)), first)


@every_inversion
def test_only_the_last_batch_changes(kind: type[Inversion], teacher: Teacher) -> None:
    source = kind(steps=6, iterations=3, batch_size=8).source(teacher, Run())
    for step in range(4):
        source.step(step)
    first, second = source.images(torch.arange(16)).split(8)
    source.step(4)
    now, then = source.images(torch.arange(16)).split(8)
    assert torch.equal(first, now)
    assert not torch.equal(second, then)
    assert not torch.equal(first, second)


@every_inversion
@pytest.mark.parametrize("stop", [2, 5, 6, 7])  # in the first batch, at its last step, between the two, in the second
def test_a_resumed_fit_gives_the_same_pool_bit_for_bit(
    kind: type[Inversion], stop: int, coloured: Teacher, tmp_path: Path
) -> None:
    settings = kind(steps=12, iterations=6, batch_size=4)
    if kind is ZeroQ:
        settings = dataclasses.replace(settings, patience=1, learning_rate=300.0)  # so that the rate is reduced
    whole = settings.fit(coloured, Run(checkpoint_steps=1)).source
    half = settings.source(coloured, Run())
    for step in range(stop):
        half.step(step)
    save_tensors(tmp_path / "checkpoints" / "fit.safetensors", half.state_dict(), {"step": str(stop)})
    resumed = settings.fit(coloured, Run(tmp_path)).source
    one, other = whole.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(whole.labels, resumed.labels)
    if kind is ZeroQ:
        assert whole.rate(5) < 300.0


@every_inversion
def test_a_teacher_without_batch_norm_is_refused(kind: type[Inversion]) -> None:
    spec = ImageSpec(channels=1, height=8, width=8, classes=3, mean=(0.5,), std=(0.5,))
    plain = teacher_from_module(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), spec)
    with pytest.raises(InputError, match="has no batch norm with stored statistics"):
        kind(steps=1).fit(plain, Run())


@every_inversion
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": -1}, "method.steps is -1; it must be at least 0"),
        ({"iterations": 0}, "method.iterations is 0; it must be at least 1"),
        ({"batch_size": 1}, "method.batch_size is 1; batch statistics need at least 2 images"),
        ({"learning_rate": 0.0}, "method.learning_rate is 0.0; it must be above 0"),
    ],
)
def test_shared_settings_are_checked(kind: type[Inversion], settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (ZeroQ, {"patience": 0}, "method.patience is 0; it must be at least 1"),
        (ZeroQ, {"input_weight": -1.0}, "method.input_weight is -1.0; it must be at least 0"),
        (DeepInversion, {"tv_weight": -1.0}, "method.tv_weight is -1.0; it must be at least 0"),
        (DeepInversion, {"competition_weight": -0.1}, "method.competition_weight is -0.1; it must be at least 0"),
        (DeepInversion, {"jitter": -1}, "method.jitter is -1; it must be at least 0"),
        (DeepInversion, {"student_bits": "9"}, "method.student_bits: bits is '9'; widths from 2 to 8 work"),
        (KnowledgeWithin, {"ce_weight": -2.0}, "method.ce_weight is -2.0; it must be at least 0"),
    ],
)
def test_own_settings_are_checked(kind: type[Inversion], settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        kind(**settings)


# what each makes of the digits


def test_zeroq_brings_the_statistics_close(teacher: Teacher) -> None:
    source, losses = optimised(ZeroQ(steps=40, iterations=40, batch_size=32), teacher)
    assert losses[-1]["bns"] < 0.1 * losses[0]["bns"]
    assert losses[-1]["input"] < 0.1
    assert set(losses[0]) == {"bns", "input"}
    assert not source.asks_labels


def test_deepinversion_makes_what_the_teacher_recognises(teacher: Teacher) -> None:
    settings = DeepInversion(steps=40, iterations=40, batch_size=32, feature_weight=1.0, learning_rate=0.2, flip=False)
    source, losses = optimised(settings, teacher)
    assert losses[-1]["ce"] < 0.6 * losses[0]["ce"]
    assert losses[-1]["feature"] < 0.6 * losses[0]["feature"]
    assert recognised(source, teacher) > 0.5  # 0.1 by chance
    assert source.asks_labels
    assert set(losses[0]) == {"ce", "feature", "tv", "l2", "label_recognition"}


def test_deepinversion_keeps_pixels_valid(teacher: Teacher) -> None:
    settings = DeepInversion(steps=3, iterations=3, batch_size=8, learning_rate=5.0)
    source, spec = settings.source(teacher, Run()), teacher.spec
    for step in range(4):
        images = source.state_dict()["pool"].float() * spec.std[0] + spec.mean[0]
        assert -1e-3 <= images.min() <= images.max() <= 1 + 1e-3  # float16
        exact = source.pixels.detach() * spec.std[0] + spec.mean[0]
        assert -1e-6 <= exact.min() <= exact.max() <= 1 + 1e-6
        source.step(step)
    zeroq = ZeroQ(steps=3, iterations=3, batch_size=8).fit(teacher, Run()).source
    assert (zeroq.state_dict()["pool"].float() * spec.std[0] + spec.mean[0]).min() < -0.1  # that one does not clip


def test_deepinversion_rolls_and_mirrors(teacher: Teacher) -> None:
    def seen(**changes: object) -> list[Tensor]:
        source = DeepInversion(steps=20, iterations=20, batch_size=4, **changes).source(teacher, Run())
        return [source.images_of(step).detach() for step in range(20)]

    still, *others = seen(jitter=0, flip=False)
    assert all(torch.equal(still, other) for other in others)
    turned = seen(jitter=0)
    mirrored = [torch.equal(images, still.flip(3)) for images in turned]
    assert 4 < sum(mirrored) < 16
    assert all(torch.equal(images, still) for images, flipped in zip(turned, mirrored, strict=True) if not flipped)
    shifts = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    found = [
        [shift for shift in shifts if torch.equal(torch.roll(still, shift, (2, 3)), images)]
        for images in seen(flip=False)
    ]
    assert all(len(matches) == 1 for matches in found)
    assert len({matches[0] for matches in found}) > 8


def test_deepinversion_works_at_half_resolution_first(teacher: Teacher) -> None:
    settings = DeepInversion(steps=9, iterations=9, batch_size=4, jitter=0, flip=False, two_resolutions=True)
    source = settings.source(teacher, Run())
    assert source.low_iterations == 6
    low, full = source.images_of(5).detach(), source.images_of(6).detach()
    assert torch.equal(full, source.pixels.detach())
    assert low.shape == full.shape
    assert total_variation(low) < 0.5 * total_variation(full)
    source.images_of(0).square().sum().backward()
    corners = source.pixels.grad.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # the pixels of a 2x2 block move alike
    torch.testing.assert_close(corners, corners[:, :, :, :1, :, :1].expand_as(corners))
    assert dataclasses.replace(settings, two_resolutions=None).source(teacher, Run()).low_iterations == 0


def test_deepinversion_anneals_in_each_phase(teacher: Teacher) -> None:
    settings = DeepInversion(steps=300, iterations=300, batch_size=4, two_resolutions=True, learning_rate=0.2)
    source = settings.source(teacher, Run())
    rates = [source.rate(iteration) for iteration in range(300)]
    assert max(rates[:200]) == max(rates[200:]) == pytest.approx(0.2)
    assert rates[0] == pytest.approx(0.02)  # the first tenth of a rise over ten
    assert rates[199] < 0.001
    assert rates[299] < 0.001
    assert rates[200] == pytest.approx(0.04)


def test_large_images_take_the_defaults_published_for_imagenet() -> None:
    small = ImageSpec(channels=3, height=32, width=32, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
    large = dataclasses.replace(small, height=224, width=96)
    names = ("learning_rate", "feature_weight", "tv_weight", "l2_weight", "jitter")
    unset, chosen = DeepInversion(), DeepInversion(jitter=0, tv_weight=0.0)
    assert [unset.chosen(name, small) for name in names] == [0.05, 1.0, 2.5e-5, 3e-8, 2]
    assert [unset.chosen(name, large) for name in names] == [0.25, 0.01, 1e-4, 1e-5, 30]
    assert (chosen.chosen("jitter", large), chosen.chosen("tv_weight", large)) == (0, 0.0)


def test_the_students_answer_reaches_the_images(teacher: Teacher) -> None:
    student = noise_student(teacher, Run(), "4")
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        logits = teacher.network(images)
    with straight_through(student):
        competition(logits, student(images)).backward()
    assert images.grad.abs().max() > 0
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.slow
def test_competition_drives_teacher_and_student_apart(teacher: Teacher) -> None:
    settings = DeepInversion(
        steps=40, iterations=40, batch_size=32, feature_weight=0.1, learning_rate=0.2, jitter=0, flip=False,
        student_bits="3",
    )  # fmt: skip
    student = noise_student(teacher, Run(), "3")
    alone, against = (
        optimised(dataclasses.replace(settings, competition_weight=weight), teacher)[0] for weight in (0.0, 5.0)
    )

    def apart(source: InversionSource) -> float:
        images = source.images(torch.arange(32))
        with torch.no_grad():
            return 1 - competition(teacher.network(images), student(images)).item()

    assert alone.student is None
    assert apart(against) > 1.5 * apart(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "names", "falls"),
    [
        ("inception", {"bns", "ce", "smoothness", "label_recognition"}, ["ce", "smoothness"]),
        ("bns", {"bns"}, ["bns"]),
        ("bns+inception", {"bns", "ce", "smoothness", "label_recognition"}, ["bns", "ce"]),
    ],
)
def test_knowledge_within_schemes_lower_their_losses(
    scheme: str, names: set[str], falls: list[str], teacher: Teacher
) -> None:
    settings = KnowledgeWithin(steps=40, iterations=40, batch_size=32, scheme=scheme)
    source, losses = optimised(settings, teacher)
    assert set(losses[0]) == names
    assert all(losses[-1][name] < 0.6 * losses[0][name] for name in falls)
    assert source.asks_labels == ("inception" in scheme)
    assert (recognised(source, teacher) > 0.6) == source.asks_labels


def test_the_gaussian_scheme_is_plain_noise(teacher: Teacher) -> None:
    source = KnowledgeWithin(steps=50, iterations=5, batch_size=32, scheme="gaussian").fit(teacher, Run()).source
    images = source.images(torch.arange(len(source.labels)))
    assert len(images) == 320
    assert source.steps == 10
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)
    first = source.start(torch.Generator().manual_seed(0))
    assert torch.equal(first, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

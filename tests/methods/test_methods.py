"""The promises that every method keeps."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from zsq.checked import CountOrZero, Text
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.graph.fold import fold
from zsq.methods import METHODS, ZSCGAN, Method, Noise, Real, Surrogate, ZeroQ
from zsq.methods.dead_leaves import dead_leaves, uppermost
from zsq.methods.natural_noise import BRIGHTNESS, CHANNEL_CORRELATION, CONTRAST_SPREAD, natural_noise
from zsq.models.teacher import Teacher, load_teacher, state_sha256, teacher_from_module
from zsq.quantization import QAT, QUANTIZERS
from zsq.quantization.convert import convert
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import distill
from zsq.runs.settings import resolve
from zsq.runtime.files import load_tensors, save_tensors
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

SMALL = {"steps": 3, "batch_size": 8, "width": 8, "data": "digits:train", "limit": 200}
"""Settings of every method in these tests, as far as it has them."""

OVERRIDES = {
    name: {"steps": 20, "iterations": 1} for name in ("zeroq", "deepinversion", "knowledge-within", "spectral")
}
"""Settings of single methods: these make one batch an iteration, and so 160 images."""

every_method = pytest.mark.parametrize("name", METHODS)
distilling_method = pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "qat" in m.quantizers])


def small(name: str, **changes: object) -> Method:
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    wanted = SMALL | OVERRIDES.get(name, {}) | changes
    return METHODS[name](**{key: value for key, value in wanted.items() if key in fields})


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


def fit(teacher: Teacher, name: str, seed: int = 0, fitted: dict[str, Tensor] | None = None) -> Surrogate:
    return small(name).fit(teacher, Run(seed=seed), distill_steps=4, fitted=fitted)


@functools.cache
def fitted(name: str) -> Surrogate:
    """A fit that tests share which only draw samples."""
    return fit(load_teacher("digits"), name)


def joined(batches: object) -> Batch:
    found = list(batches)
    return Batch(torch.cat([b.images for b in found]), torch.cat([b.labels for b in found]))


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def fits(batch: Batch, count: int, teacher: Teacher) -> None:
    spec = teacher.spec
    assert batch.images.shape == (count, spec.channels, spec.height, spec.width)
    assert batch.images.dtype == torch.float32
    assert torch.isfinite(batch.images).all()
    assert not batch.images.requires_grad
    assert batch.labels.shape == (count,)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.min() >= 0
    assert batch.labels.max() < spec.classes


@every_method
def test_it_is_frozen_settings_with_a_name_and_a_summary(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert 10 < len(method.summary) < 90
    settings = small(name)
    assert settings == small(name)
    assert isinstance(settings.steps, int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, 3)
    with pytest.raises(TypeError):
        method(3)  # settings are named


@every_method
def test_it_takes_other_steps_where_it_learns_and_names_its_files(name: str) -> None:
    settings = small(name)
    learns = "steps" in {field.name for field in dataclasses.fields(settings)}
    assert settings.with_steps(7) == (dataclasses.replace(settings, steps=7) if learns else settings)
    assert settings.with_steps(7).steps == (7 if learns else 0)
    assert all(isinstance(getattr(settings, path), str) for path in settings.paths)
    assert settings.data_set in (None, *(getattr(settings, path) for path in settings.paths))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign(Method):
    """A method as another package may write it."""

    name: ClassVar[str] = "foreign"
    summary: ClassVar[str] = "learns from files"
    paths: ClassVar[tuple[str, ...]] = ("images", "masks")

    steps: CountOrZero = 5
    images: Text = "here"
    masks: Text = ""

    def fit(self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: object = None) -> Surrogate:
        raise NotImplementedError


def test_settings_of_other_packages_take_steps_and_places() -> None:
    assert Foreign().with_steps(0) == Foreign(steps=0)
    assert Foreign().with_paths(lambda path: f"there/{path}") == Foreign(images="there/here")


@every_method
def test_it_gives_an_image_for_each_label_or_nothing(name: str, teacher: Teacher) -> None:
    labels = torch.tensor([3, 1, 3])
    images = fit(teacher, name).source.sample_labels(labels)
    assert (images is not None) == (name == "zscgan")
    if images is not None:
        fits(Batch(images, labels), len(labels), teacher)


@every_method
def test_the_teacher_is_left_alone_bit_for_bit(name: str, teacher: Teacher) -> None:
    def facts() -> tuple[object, ...]:
        network = teacher.network
        trained = [key for key, p in network.named_parameters() if p.requires_grad or p.grad is not None]
        return state_sha256(network.state_dict()), network.code, network.training, trained

    before = facts()
    surrogate = fit(teacher, name)
    joined(surrogate.source.sample(10))
    surrogate.source.batch(0, None)
    assert facts() == before
    assert before[2:] == (False, [])


@every_method
def test_the_seed_decides_the_samples(name: str, teacher: Teacher) -> None:
    first, same_seed, other = (fit(teacher, name, seed).source for seed in (1, 1, 2))
    assert same(joined(first.sample(20)), joined(same_seed.sample(20)))
    assert not same(joined(first.sample(20)), joined(other.sample(20)))
    assert same(first.batch(0, None), same_seed.batch(0, None))
    assert not same(first.batch(1, None), other.batch(1, None))


@pytest.mark.slow
@every_method
def test_no_other_random_state_is_read_or_changed(name: str, teacher: Teacher) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = fit(teacher, name).source
        one = joined(first.sample(9)), first.batch(0, None)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        second = fit(teacher, name).source
        other = joined(second.sample(9)), second.batch(0, None)
    assert all(same(a, b) for a, b in zip(one, other, strict=True))


@every_method
def test_samples_fit_the_image_spec(name: str, teacher: Teacher) -> None:
    source = fitted(name).source
    batch = joined(source.sample(150))
    fits(batch, 150, teacher)
    assert len(set(batch.labels.tolist())) == teacher.spec.classes or not source.asks_labels
    assert batch.images.std() > 0.01
    assert len({image.numpy().tobytes() for image in batch.images}) > 140  # no image twice, but for real ones


@distilling_method
def test_distillation_batches_fit_the_image_spec_and_differ(name: str, teacher: Teacher) -> None:
    source = fit(teacher, name).source
    batches = [source.batch(step, None) for step in range(3)]
    for batch in batches:
        fits(batch, SMALL["batch_size"], teacher)
        if batch.teacher_logits is not None:
            wanted = teacher.network(batch.images)
            torch.testing.assert_close(batch.teacher_logits, wanted, rtol=1e-4, atol=1e-4)
            assert not batch.teacher_logits.requires_grad
        assert all(value.dim() == 0 and not value.requires_grad for value in batch.losses.values())
    assert not any(same(a, b) for a, b in itertools.combinations(batches, 2))


@every_method
def test_sampling_streams_exactly_the_count_and_repeats(name: str) -> None:
    source = fitted(name).source
    sizes = [len(batch.labels) for batch in source.sample(23, batch_size=10)]
    assert sizes == [10, 10, 3]
    assert same(joined(source.sample(23)), joined(source.sample(23)))
    assert [len(batch.labels) for batch in source.sample(1)] == [1]
    assert list(source.sample(0)) == []


@every_method
def test_samples_are_made_only_when_asked_for(name: str) -> None:
    stream = fitted(name).source.sample(10**12, batch_size=7)
    assert len(next(stream).labels) == 7
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.slow
@every_method
def test_sampling_does_not_disturb_distillation(name: str, teacher: Teacher) -> None:
    plain, sampled = (fit(teacher, name).source for _ in range(2))
    for step in range(2):
        joined(sampled.sample(5))
        assert same(plain.batch(step, None), sampled.batch(step, None))
    assert same(joined(plain.sample(12)), joined(sampled.sample(12)))


@every_method
def test_a_stored_source_goes_on_as_the_first(name: str, teacher: Teacher, tmp_path: Path) -> None:
    first = fit(teacher, name).source
    save_tensors(tmp_path / "source.safetensors", first.state_dict())
    second = fit(teacher, name, fitted=load_tensors(tmp_path / "source.safetensors")[0]).source
    assert same(joined(first.sample(12)), joined(second.sample(12)))
    for step in range(2):
        assert same(first.batch(step, None), second.batch(step, None))
    assert same(joined(first.sample(12)), joined(second.sample(12)))
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_method
def test_copies_of_a_fitted_source_do_not_touch_it(name: str, teacher: Teacher) -> None:
    first = fit(teacher, name).source
    kept = {key: value.clone() for key, value in first.state_dict().items()}
    images = joined(first.sample(6))
    second = fit(teacher, name, fitted=first.state_dict()).source
    second.batch(0, None)
    assert same(joined(first.sample(6)), images)
    now = first.state_dict()
    assert all(torch.equal(now[key], value) for key, value in kept.items())


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_each_quantizer_takes_the_surrogate(name: str, quantizer: str, teacher: Teacher) -> None:
    if quantizer not in METHODS[name].quantizers:
        with pytest.raises(InputError, match=f"quantizer {quantizer} trains on images, and method {name} makes none"):
            resolve(method=name, quantizer=quantizer)
        return
    surrogate, run = fit(teacher, name), Run()
    settings = QUANTIZERS[quantizer](num_samples=40, bits="6")
    learnable = quantizer == "qat"
    student = quantize_ptq(
        surrogate.network,
        lambda: surrogate.source.sample(40),
        settings,
        run,
        learnable=learnable,
        statistics=surrogate.statistics,
    )
    if learnable:
        steps = QAT(num_samples=40, bits="6", steps=2)
        distill(student, teacher.network, surrogate.source, steps, run)
    batch = joined(surrogate.source.sample(20))
    with torch.no_grad():
        logits, answers, floats = student(batch.images), convert(student)(batch.images), teacher.network(batch.images)
    assert logits.shape == (20, teacher.spec.classes)
    assert torch.isfinite(logits).all()
    assert (logits.argmax(1) == answers.argmax(1)).float().mean() >= 0.9
    assert (logits - floats).square().mean() < 0.1 * floats.square().mean()


@every_method
def test_it_says_whether_it_is_data_free(name: str) -> None:
    assert fitted(name).source.data_free == (name not in ("real", "biggan"))


@pytest.mark.slow
def test_zscgan_lowers_its_losses(teacher: Teacher) -> None:
    settings = ZSCGAN(steps=60, batch_size=16, width=8, learning_rate=5e-3)
    fresh = dataclasses.replace(settings, steps=0).fit(teacher, Run(), distill_steps=60).source.batch(0, None).losses
    source = settings.fit(teacher, Run(), distill_steps=5).source
    trained = source.batch(0, None).losses
    assert trained["bns"] < 0.5 * fresh["bns"]
    assert trained["ce"] < fresh["ce"]
    assert 0 <= trained["label_recognition"] <= 100


def test_zscgan_renders_what_is_asked_for(teacher: Teacher) -> None:
    source = small("zscgan").fit(teacher, Run()).source
    labels = torch.arange(10)
    one, other = source.sample_labels(labels), source.sample_labels(labels)
    fits(Batch(one, labels), 10, teacher)
    assert torch.equal(one, other)
    spec = teacher.spec
    pixels = one * spec.std[0] + spec.mean[0]
    assert -1e-6 <= pixels.min() <= pixels.max() <= 1 + 1e-6


@pytest.mark.parametrize("weights", [{"ce_weight": 0.0}, {"bns_weight": 0.0}])
def test_zscgan_losses_can_be_switched_off(weights: dict[str, float], teacher: Teacher) -> None:
    both, one = (
        ZSCGAN(steps=2, batch_size=8, width=4, **chosen).fit(teacher, Run()).source for chosen in ({}, weights)
    )
    assert not same(joined(both.sample(5)), joined(one.sample(5)))
    assert set(one.batch(0, None).losses) == {"ce", "bns", "label_recognition"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, "method.width is 0; it must be at least 1"),
        ({"steps": -1}, "method.steps is -1; it must be at least 0"),
        ({"batch_size": 1}, "method.batch_size is 1; batch statistics need at least 2 images"),
        ({"learning_rate": 0.0}, "method.learning_rate is 0.0; it must be above 0"),
        ({"ce_weight": 0.0, "bns_weight": 0.0}, "ce_weight and method.bns_weight are both 0; one must be above 0"),
        ({"bns_weight": -1.0}, "method.bns_weight is -1.0; it must be at least 0"),
    ],
)
def test_zscgan_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ZSCGAN(**settings)


def test_real_needs_a_data_set(teacher: Teacher) -> None:
    with pytest.raises(InputError, match=r"method real needs images: settings={'method.data': SET}"):
        Real().fit(teacher, Run())


def test_real_images_are_the_sets(teacher: Teacher) -> None:
    source = Real(data="digits:train").fit(teacher, Run()).source
    everything = joined(open_dataset("digits:train", teacher.spec).batches())
    drawn = joined(source.sample(10**6))
    assert len(drawn.labels) == len(everything.labels)  # each at most once

    def rows(batch: Batch) -> list[bytes]:
        pixels = teacher.spec.to_pixels(batch.images).flatten(1).numpy()
        return sorted(image.tobytes() + bytes([label]) for image, label in zip(pixels, batch.labels, strict=True))

    assert rows(drawn) == rows(everything)
    assert not same(drawn, everything)
    assert len(Real(data="digits:train", limit=100).fit(teacher, Run()).source.labels) <= 100


def test_noise_distributions(teacher: Teacher) -> None:
    gaussian = joined(Noise().fit(teacher, Run()).source.sample(300)).images
    assert gaussian.mean().item() == pytest.approx(0, abs=0.03)
    assert gaussian.std().item() == pytest.approx(1, abs=0.03)
    uniform = joined(Noise(distribution="uniform").fit(teacher, Run()).source.sample(300)).images
    pixels = uniform * teacher.spec.std[0] + teacher.spec.mean[0]
    assert -1e-6 <= pixels.min() < 0.01
    assert 0.99 < pixels.max() <= 1 + 1e-6
    assert pixels.std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("draw", [natural_noise, dead_leaves])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 64, 96), (1, 33, 32), (4, 16, 16)])
def test_drawn_images_have_the_statistics_of_photographs(draw, channels: int, height: int, width: int) -> None:
    mean, std = (0.4,) * channels, (0.2,) * channels
    spec = ImageSpec(channels=channels, height=height, width=width, classes=5, mean=mean, std=std)
    images = draw(100, spec, torch.Generator().manual_seed(0))
    assert images.shape == (100, channels, height, width)
    pixels = images * 0.2 + 0.4
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert pixels.mean().item() == pytest.approx(BRIGHTNESS, abs=0.03)
    assert pixels.std((1, 2, 3)).log().std().item() == pytest.approx(CONTRAST_SPREAD, abs=0.06)
    spectrum = torch.fft.fft2(pixels.double()).abs().square().mean((0, 1))
    for axis in (spectrum[0], spectrum[:, 0]):  # power falls by 4 an octave
        if draw is natural_noise:
            assert axis[1] / axis[2] == pytest.approx(4, rel=0.25)
            assert axis[2] / axis[4] == pytest.approx(4, rel=0.25)
        assert axis[1] / axis[4] == pytest.approx(16, rel=0.6)
    if channels > 1:
        first, second = (pixels[:, c].flatten(1) for c in (0, 1))
        both = torch.stack([first - first.mean(1, True), second - second.mean(1, True)])
        correlation = (both[0] * both[1]).mean() / both.square().mean((1, 2)).prod().sqrt()
        assert correlation.item() == pytest.approx(CHANNEL_CORRELATION, abs=0.05)
    steps = pixels.diff(dim=-1)  # most are small and few are edges; in Gaussian noise the fourth moment is 3
    moment = (steps / steps.square().mean((1, 2, 3), keepdim=True).sqrt()).pow(4).mean()
    assert moment > 3.5 if draw is dead_leaves else moment < 3.3


def test_a_leaf_hides_those_before_it() -> None:
    centre = torch.tensor([[[9.0, 1.5, 4.0, 5.5]]])  # one axis; the ground, and three intervals
    radius = torch.tensor([[0.0, 1.2, 2.2, 1.0]])
    top = uppermost(centre, radius, [torch.arange(8) + 0.5])
    assert top.tolist() == [[1, 1, 2, 2, 2, 3, 0, 0]]
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    disc = uppermost(torch.tensor([[[0.0, 1.0], [0.0, 2.0]]]), torch.tensor([[0.0, 1.1]]), [rows, columns])
    assert disc.tolist() == [[[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]]


@pytest.mark.parametrize("distribution", ["natural", "leaves"])
def test_noise_is_drawn_anew_for_each_batch_and_alike_for_each_run(teacher: Teacher, distribution) -> None:
    def drawn(seed: int, name: str) -> Tensor:
        source = Noise(distribution=distribution).fit(teacher, Run(seed=seed)).source
        return torch.cat([batch.images for batch in source.sample(30, 10, name)])

    assert torch.equal(drawn(0, "sample"), drawn(0, "sample"))
    others = [drawn(1, "sample"), drawn(0, "fresh")]
    assert not any(torch.equal(drawn(0, "sample"), other) for other in others)
    batches = drawn(0, "sample").split(10)
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", [ZSCGAN(steps=40, batch_size=16, width=8), ZeroQ(steps=40, batch_size=16)])
def test_bfloat16_learns_about_as_well(method) -> None:
    teacher = load_teacher("digits")
    found = []
    for precision in ("float32", "bfloat16"):
        source = dataclasses.replace(method, precision=precision).fit(teacher, Run()).source
        assert all(batch.images.dtype == torch.float32 for batch in source.sample(8))
        found.append(float(source.step(40)["bns"]))
    fresh = float(dataclasses.replace(method, steps=0).fit(teacher, Run()).source.step(0)["bns"])
    assert found[0] != found[1]
    assert abs(found[1] - found[0]) < 0.1 * (fresh - found[0])


@pytest.mark.slow
def test_labels_alone_serve_a_network_without_batch_norm() -> None:
    """CE-only ZS-CGAN needs no statistics; on a real network whose batch norms are folded away it learns labels."""
    folded = dataclasses.replace(load_teacher("digits"), network=fold(load_teacher("digits").network)[0])
    with pytest.raises(InputError, match=r"noise, real, and zscgan with settings={'method.bns_weight': 0}"):
        ZSCGAN(steps=2).fit(folded, Run())
    settings = ZSCGAN(steps=350, batch_size=32, width=16, bns_weight=0.0, learning_rate=3e-3)
    source = settings.fit(folded, Run()).source
    batch = joined(source.sample(200))
    with torch.no_grad():
        recognised = (folded.network(batch.images).argmax(1) == batch.labels).float().mean()
    assert recognised > 0.9
    assert set(source.step(350)) == {"ce", "label_recognition"}


def test_a_generator_of_another_shape_is_refused(teacher: Teacher) -> None:
    state = dict(small("zscgan").fit(teacher, Run()).source.state_dict())
    state["generator.layout.weight"] = state["generator.layout.weight"][:-1]
    with pytest.raises(InputError, match=r"what is stored of the generator is not what its settings make here"):
        small("zscgan").fit(teacher, Run(), fitted=state)


class Viewed(nn.Module):
    """Flattens a map of more than one pixel by `view`, which takes values in one order only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y.view(y.size(0), -1))


def test_a_network_that_views_its_maps_can_be_learnt_from() -> None:
    spec = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = teacher_from_module(Viewed().eval().requires_grad_(False), spec)
    source = ZSCGAN(batch_size=4, width=4).source(teacher, Run(), 2)
    assert source.step(0)["bns"].isfinite()
    student = quantize_ptq(teacher.network, lambda: source.sample(8), QAT(num_samples=8), Run())
    images = next(source.sample(4)).images
    wanted = student(images)
    found = student(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)

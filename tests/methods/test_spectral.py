"""Images found in their spectrum: the coefficients in closed form, what the network is shown, and what comes of it."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from toys import settle

from zsq.errors import InputError
from zsq.methods import Spectral
from zsq.methods.natural_noise import natural_noise
from zsq.methods.spectral import Spectrum, cropped
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.training.loop import Run
from zsq.training.losses import bns_loss, label_cross_entropy
from zsq.types import ImageSpec

CPU = torch.device("cpu")
WIDE = ImageSpec(channels=3, height=9, width=12, classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)
LARGE = dataclasses.replace(WIDE, height=96, width=128)


def shaped(channels: int, height: int, width: int) -> ImageSpec:
    mean, std = (0.5,) * channels, (0.25,) * channels
    return ImageSpec(channels=channels, height=height, width=width, classes=4, mean=mean, std=std)


class Pooling(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.norm(self.convolution(x))).mean((2, 3)))


class Flattening(Pooling):
    """Takes images of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6 * 47 * 63, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.norm(self.convolution(x))).flatten(1))


def teacher_of(module: type[nn.Module], spec: ImageSpec) -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher_from_module(settle(module()), spec)


@pytest.fixture(scope="module")
def digits() -> Teacher:
    return load_teacher("digits")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (7, 5)])
def test_pixels_come_back_from_their_coefficients(channels: int, height: int, width: int) -> None:
    spec = shaped(channels, height, width)
    spectrum = Spectrum(spec, CPU)
    pixels = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0)).clamp(0.05, 0.95)
    coefficients = spectrum.coefficients(pixels.logit())
    assert coefficients.shape == (2, channels, height, width // 2 + 1, 2)
    torch.testing.assert_close(torch.sigmoid(spectrum.values(coefficients)), pixels, rtol=0, atol=2e-6)


def test_a_coefficient_is_a_wave_whose_size_falls_as_one_over_its_frequency() -> None:
    spec = shaped(1, 16, 16)
    spectrum = Spectrum(spec, CPU)

    def size(row: int, column: int) -> float:
        coefficients = torch.zeros(1, 1, 16, 9, 2)
        coefficients[0, 0, row, column, 0] = 1.0
        return spectrum.values(coefficients).square().mean().sqrt().item()

    assert size(0, 1) / size(0, 3) == pytest.approx(3, rel=1e-4)
    assert size(0, 1) / size(3, 4) == pytest.approx(5, rel=1e-4)  # hypot(3, 4)
    assert size(0, 0) / size(0, 1) == pytest.approx(1 / math.sqrt(2), rel=1e-4)  # the mean counts as the longest wave
    assert spectrum.amplitude.mean().item() == pytest.approx(1)


def test_coefficients_of_equal_size_make_channels_that_correlate() -> None:
    spectrum = Spectrum(shaped(3, 64, 64), CPU)
    drawn = torch.randn(20, 3, 64, 33, 2, generator=torch.Generator().manual_seed(0))
    values = spectrum.values(0.01 * drawn).movedim(1, 0).flatten(1)
    found = torch.corrcoef(values)
    assert (found - 0.9 - 0.1 * torch.eye(3)).abs().max() < 0.03
    assert values.std(1).max() / values.std(1).min() < 1.05


def test_crops_hold_between_the_least_area_and_all_of_the_image() -> None:
    rows, columns = torch.linspace(0, 1, 100)[:, None].expand(100, 60), torch.linspace(0, 1, 60).expand(100, 60)
    image, random = torch.stack([rows, columns])[None], torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        part = cropped(image, (50, 30), random)
        assert part.shape == (1, 2, 50, 30)
        high, wide = ((part[0, i].max() - part[0, i].min()).item() for i in (0, 1))
        assert high == pytest.approx(wide, abs=0.04)  # both sides by the same factor
        shares.append(high * wide)
    assert min(shares) == pytest.approx(0.3, abs=0.03)
    assert max(shares) == pytest.approx(1, abs=0.06)
    assert sorted(shares)[150] == pytest.approx(math.sqrt(0.3), abs=0.07)  # uniform in the logarithm


def test_one_view_in_four_is_whole() -> None:
    source = Spectral(steps=8, batch_size=2, flip=False).source(teacher_of(Pooling, LARGE), Run())
    views = [source.images_of(step) for step in range(8)]
    assert [tuple(view.shape[2:]) for view in views] == [(48, 64)] * 3 + [(96, 128)] + [(48, 64)] * 3 + [(96, 128)]
    assert torch.equal(views[3], views[7])
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[3], source.render())


@pytest.mark.parametrize(("module", "every", "whole"), [(Flattening, 4, 1), (Pooling, 1, 1), (Pooling, 3, 3)])
def test_views_are_whole_where_nothing_else_is_asked_for_or_taken(
    module: type[nn.Module], every: int, whole: int
) -> None:
    assert (
        Spectral(steps=1, batch_size=2, whole_every=every).source(teacher_of(module, LARGE), Run()).whole_every == whole
    )


def test_small_images_are_shown_whole(digits: Teacher) -> None:
    assert Spectral(steps=1, batch_size=2).source(digits, Run()).whole_every == 1


def test_half_of_the_views_are_mirrored(digits: Teacher) -> None:
    source = Spectral(steps=1, batch_size=4).source(digits, Run())
    whole = source.render()
    mirrored = [torch.equal(source.images_of(step), whole.flip(3)) for step in range(40)]
    assert all(torch.equal(source.images_of(step), whole) for step in range(40) if not mirrored[step])
    assert 10 < sum(mirrored) < 30


def test_the_first_images_are_natural_noise(digits: Teacher) -> None:
    source = Spectral(steps=1, batch_size=4).source(digits, Run())
    noise = digits.spec.denormalize(natural_noise(4, digits.spec, torch.Generator().manual_seed(3)))
    begun = source.start(torch.Generator().manual_seed(3))
    source.pixels.data = source.encode(begun)
    torch.testing.assert_close(digits.spec.denormalize(source.render()), noise.clamp(0.02, 0.98), rtol=0, atol=1e-5)


def test_losses_are_those_of_the_paper(digits: Teacher) -> None:
    source = Spectral(steps=4, batch_size=8, flip=False, ce_weight=3.0, bns_weight=0.5).source(digits, Run())
    with torch.no_grad():
        logits, moments = source.teacher(source.render().contiguous(memory_format=torch.channels_last))
        observed = source.teacher
        ce = label_cross_entropy(logits, source.wanted).item()
        bns = bns_loss(moments, observed.target_mean, observed.target_var, observed.eps).item()
    found = source.step(0)
    assert (found["ce"].item(), found["bns"].item()) == pytest.approx((ce, bns), rel=1e-5)
    assert source.history[0].item() == pytest.approx(3 * ce + 0.5 * bns, rel=1e-5)


def test_large_images_take_settings_of_their_own(digits: Teacher) -> None:
    small = Spectral(steps=1, batch_size=2).source(digits, Run())
    large = Spectral(steps=1, batch_size=2).source(teacher_of(Pooling, LARGE), Run())
    assert (small.learning_rate, small.weights["ce"]) == (0.1, 20)
    assert (large.learning_rate, large.weights["ce"]) == (0.05, 300)
    without = Spectral(steps=1, batch_size=2, ce_weight=0.0, learning_rate=0.3).source(digits, Run())
    assert (without.learning_rate, without.weights["ce"]) == (0.3, 0)


def test_a_map_of_classes_is_shown_whole_and_not_mirrored() -> None:
    network = load_teacher("shapes_unet")
    source = Spectral(steps=1, batch_size=2).source(network, Run())
    assert (source.whole_every, source.flip, source.asks_labels) == (1, False, True)


def test_a_network_without_classes_needs_the_statistics() -> None:
    network = load_teacher("shapes_embedder")
    assert set(Spectral(steps=1, batch_size=2).source(network, Run()).step(0)) == {"bns"}
    with pytest.raises(InputError, match=r"method\.bns_weight is 0, and this network names no class"):
        Spectral(steps=1, batch_size=2, bns_weight=0.0).source(network, Run())


def test_the_rate_rises_and_falls(digits: Teacher) -> None:
    source = Spectral(steps=100, batch_size=2, learning_rate=0.2).source(digits, Run())
    rates = [source.rate(iteration) for iteration in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[50] == pytest.approx(0.1)
    assert rates[99] < 1e-3
    assert rates.index(max(rates)) == 4


def test_labels_are_recognised_in_pictures_with_the_stored_statistics(digits: Teacher) -> None:
    source = Spectral(steps=100, iterations=100, batch_size=32, flip=False).source(digits, Run())
    losses = [source.step(step) for step in range(100)]
    with torch.no_grad():
        images = source.images(torch.arange(32))
        assert (digits.network(images).argmax(1) == source.labels).float().mean() > 0.9
    assert losses[-1]["bns"] < 0.3 * losses[0]["bns"]
    pixels = digits.spec.denormalize(images)
    assert -1e-3 <= pixels.min() <= pixels.max() <= 1 + 1e-3


def test_something_must_be_learnt_from() -> None:
    with pytest.raises(InputError, match=r"method\.ce_weight and method\.bns_weight are both 0"):
        Spectral(ce_weight=0.0, bns_weight=0.0)

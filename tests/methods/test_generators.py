import math

import pytest
import torch
from torch import Tensor, nn

from zsq.errors import InputError
from zsq.methods.generators import (
    BRIGHTNESS_BOUND,
    CONTRAST_BOUND,
    GENERATORS,
    ConditionalNorm,
    Exposure,
    Generator,
    label_codes,
    make_generator,
    shifted,
)
from zsq.types import ImageSpec


def spec_of(channels: int, height: int, width: int, classes: int = 10) -> ImageSpec:
    """A normalisation that differs from channel to channel."""
    mean = tuple(0.4 + 0.05 * c for c in range(channels))
    std = tuple(0.2 + 0.1 * c for c in range(channels))
    return ImageSpec(channels=channels, height=height, width=width, classes=classes, mean=mean, std=std)


def build(name: str, spec: ImageSpec, **settings: int | bool) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codes = torch.randn(spec.classes, 6)
        return make_generator(name, spec, codes, **({"width": 4, "noise_channels": 3} | settings))


def draw(generator: Generator, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, generator.spec.classes, (count,), generator=random)
    return torch.randn(count, generator.noise_size, generator=random), labels


SIZES = [(1, 8, 8), (3, 9, 13), (1, 28, 28), (4, 16, 8), (3, 32, 32), (2, 31, 65), (3, 10, 100), (3, 96, 97)]


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("channels", "height", "width"), SIZES)
def test_any_size_and_number_of_channels_gives_a_valid_image(name: str, channels: int, height: int, width: int) -> None:
    spec = spec_of(channels, height, width)
    generator = build(name, spec, style_size=2)
    for training in (True, False):
        with torch.no_grad():
            made = generator.train(training)(*draw(generator, 3))
        assert made.shape == (3, channels, height, width)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        pixels = made * std + mean
        assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6
        assert pixels.std() > 1e-3


@pytest.mark.parametrize("name", GENERATORS)
def test_extreme_outputs_stay_valid_images(name: str) -> None:
    spec = spec_of(3, 8, 8)
    generator = build(name, spec, bound_contrast=False)
    nn.init.constant_(generator.to_pixels.bias, 1e4)
    with torch.no_grad():
        made = generator(*draw(generator, 2))
    assert torch.equal(spec.to_pixels(made), torch.full((2, 8, 8, 3), 255, dtype=torch.uint8))
    wanted = torch.tensor([(1 - m) / s for m, s in zip(spec.mean, spec.std, strict=True)])
    torch.testing.assert_close(made[0, :, 0, 0], wanted)


@pytest.mark.parametrize("name", GENERATORS)
def test_no_label_can_become_a_flat_colour_or_a_pattern_of_extremes(name: str) -> None:
    spec = ImageSpec(channels=3, height=16, width=16, classes=10, mean=(0.45,) * 3, std=(0.225,) * 3)
    for weight, bias in ((1e4, 0.0), (1.0, 10.0)):  # all black and white; all one colour
        free, bounded = (build(name, spec, bound_contrast=choice).eval() for choice in (False, True))
        for generator in (free, bounded):
            generator.to_pixels.weight.data.mul_(weight)
            nn.init.constant_(generator.to_pixels.bias, bias)
        with torch.no_grad():
            contrasts = [generator(*draw(generator, 50)).flatten(1).std(1) for generator in (free, bounded)]
        assert contrasts[0].max() > 1.5 or contrasts[0].max() < 0.1
        assert 0.5 < contrasts[1].min() < contrasts[1].max() < 1.4  # where real images lie


def test_exposure_in_closed_form() -> None:
    exposure = Exposure(torch.tensor(0.25).logit(), 3)
    x = torch.randn(4, 2, 5, 5) * torch.tensor([0.2, 1.0, 5.0, 50.0]).view(4, 1, 1, 1) + 7
    even = exposure(x, torch.randn(4, 3))
    torch.testing.assert_close(even.mean((1, 2, 3)), torch.full((4,), math.log(1 / 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(even.std((1, 2, 3), correction=0), torch.ones(4), rtol=2e-3, atol=0)
    nn.init.constant_(exposure.variation.weight, 100.0)
    uneven = exposure(x, torch.tensor([[1.0] * 3, [-1.0] * 3, [0.0] * 3, [1.0] * 3]))
    bounds = torch.tensor([1.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(
        uneven.mean((1, 2, 3)), math.log(1 / 3) + BRIGHTNESS_BOUND * bounds, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        uneven.std((1, 2, 3), correction=0), torch.exp(CONTRAST_BOUND * bounds), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("training", [True, False])
def test_label_noise_and_style_each_change_the_image(name: str, training: bool) -> None:
    generator = build(name, spec_of(1, 16, 16), style_size=4).train(training)
    noise, labels = draw(generator, 4)
    others = {
        "label": (noise, (labels + 1) % 10),
        "style": (torch.cat([noise[:, :4] + 1, noise[:, 4:]], dim=1), labels),
        "detail": (torch.cat([noise[:, :4], noise[:, 4:] + torch.randn_like(noise[:, 4:])], dim=1), labels),
    }
    with torch.no_grad():
        made = generator(noise, labels)
        for what, (other_noise, other_labels) in others.items():
            difference = (generator(other_noise, other_labels) - made).abs().amax((1, 2, 3))
            assert (difference > 1e-3).all(), what


@pytest.mark.parametrize("name", GENERATORS)
def test_sampling_one_by_one_gives_the_same_images(name: str) -> None:
    generator = build(name, spec_of(3, 9, 13)).eval()
    noise, labels = draw(generator, 3)
    with torch.no_grad():
        together = generator(noise, labels)
        alone = torch.cat([generator(noise[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_weight_learns(name: str) -> None:
    generator = build(name, spec_of(3, 16, 16), style_size=2)  # of one channel, exposure takes out the bias
    generator(*draw(generator, 4)).square().sum().backward()
    idle = [key for key, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_the_same_seed_builds_the_same_generator() -> None:
    first, second = (build("unet", spec_of(1, 8, 8)).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_generator() -> None:
    with pytest.raises(InputError, match=r"Unknown generator 'u-net'. Did you mean 'unet'\? Known: light, unet\."):
        build("u-net", spec_of(1, 8, 8))


def norm_and_input() -> tuple[ConditionalNorm, Tensor, Tensor]:
    torch.manual_seed(0)
    norm = ConditionalNorm(3, 4)
    return norm, torch.randn(6, 3, 5, 5) * torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1) + 7, torch.randn(6, 4)


def test_conditional_norm_in_training_normalises_by_the_batch() -> None:
    norm, x, code = norm_and_input()
    gamma, beta = norm.affine(code)[:, :3], norm.affine(code)[:, 3:]
    batch = nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)
    wanted = batch * gamma[..., None, None] + beta[..., None, None]
    torch.testing.assert_close(norm.train()(x, code), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=0))


def test_conditional_norm_when_sampling_takes_the_running_statistics() -> None:
    norm, x, code = norm_and_input()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 9.0]))
    before = norm.running_mean.clone()
    gamma, beta = norm.affine(code)[:, :3], norm.affine(code)[:, 3:]
    batch = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, eps=1e-5)
    wanted = batch * gamma[..., None, None] + beta[..., None, None]
    torch.testing.assert_close(norm.eval()(x, code), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.running_mean, before)


def test_conditional_norm_starts_near_the_identity_and_apart_for_each_code() -> None:
    norm, x, _ = norm_and_input()
    neutral = norm(x, torch.zeros(6, 4))
    torch.testing.assert_close(neutral.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(neutral.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert not torch.allclose(norm(x, torch.eye(4)[[0] * 6]), norm(x, torch.eye(4)[[1] * 6]))


@pytest.mark.parametrize(("classes", "features", "size", "length"), [(10, 32, 128, 9), (20, 6, 128, 6), (30, 40, 8, 8)])
def test_label_codes_are_whitened(classes: int, features: int, size: int, length: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, features, generator=random) * torch.logspace(-1, 1, features) + 5
    codes = label_codes(classes, weight, size, random)
    assert codes.shape == (classes, length)
    torch.testing.assert_close(codes.mean(0), torch.zeros(length), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.T @ codes / classes, torch.eye(length), atol=1e-4, rtol=0)
    largest = codes.gather(0, codes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert torch.pdist(codes).min() > 0.1


def test_label_codes_do_not_depend_on_what_changes_no_answer() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 32, generator=random)
    codes = label_codes(10, weight, 128, random)
    shifted = label_codes(10, weight + torch.randn(32, generator=random), 128, random)  # softmax ignores the shift
    torch.testing.assert_close(codes, shifted, atol=1e-4, rtol=0)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=random))[0]
    torch.testing.assert_close(codes, label_codes(10, weight @ rotation, 128, random), atol=1e-3, rtol=0)


def test_classes_that_the_teacher_finds_alike_get_codes_alike() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 6, generator=random)
    weight[1] = weight[0] + 0.01 * torch.randn(6, generator=random)
    distance = torch.cdist(label_codes(20, weight, 128, random), label_codes(20, weight, 128, random))
    distance.fill_diagonal_(torch.inf)
    assert distance.argmin(1)[:2].tolist() == [1, 0]


def test_label_codes_without_a_weight_are_random_and_seeded() -> None:
    first, same, other = (label_codes(40, None, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (40, 16)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert label_codes(3, None, 16, torch.Generator()).shape == (3, 3)
    assert label_codes(1, torch.ones(1, 4), 16, torch.Generator()).shape == (1, 1)


def test_a_shift_is_circular_and_its_own_for_each_image() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    moved = shifted(x, torch.tensor([[0, 0], [1, 2]]))
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1], x[1].roll((1, 2), dims=(1, 2)))
    assert torch.equal(shifted(x, torch.tensor([[4, 5], [-4, 0]])), x)  # full turns


def test_images_of_16_pixels_go_round_the_edge_and_smaller_ones_are_windows_of_a_larger_one() -> None:
    for side in (8, 16):
        generator = build("light", spec_of(1, side, side), bound_contrast=False).eval()
        noise, labels = draw(generator, 1)
        images = []
        for vertical in (-9.0, 0.0, 9.0):  # the normal's far tails: the first and the last place
            noise[:, 0], noise[:, 1] = vertical, 0.0
            with torch.no_grad():
                images.append(generator(noise, labels)[0, 0])
        first, middle, last = images
        if side == 8:
            assert torch.equal(first[1:], middle[:-1])
            assert torch.equal(middle[1:], last[:-1])
            assert not torch.equal(first[0], last[-1])
        else:
            assert torch.equal(first, last)  # a full turn
            assert not torch.equal(first, middle)

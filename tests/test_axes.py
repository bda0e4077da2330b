"""Signals, images and volumes: what a spec, a generator, noise, a picture and a data set make of each."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import zsq
from tests.heads import NETWORKS
from tests.heads import spec_of as heads_spec
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.methods.dead_leaves import dead_leaves
from zsq.methods.generators import GENERATORS, make_generator, shifted, shuffled
from zsq.methods.natural_noise import natural_noise
from zsq.models.network import parse_shape
from zsq.reports.pictures import as_pictures
from zsq.training.losses import blurred, total_variation
from zsq.types import REACH, ImageSpec

FEW = {"quantizer.num_samples": 16}

SHAPES = [(2, 40), (3, 12, 20), (1, 9, 12, 10)]


def spec_of(shape: tuple[int, ...], **said) -> ImageSpec:
    return ImageSpec.of_shape(shape, classes=3, mean=(0.4,) * shape[0], std=(0.2,) * shape[0], **said)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spec_knows_its_shape(shape) -> None:
    spec = spec_of(shape)
    assert spec.shape == shape == parse_shape(spec.shape_text)
    raw = torch.rand(5, *shape)
    stored = (raw.movedim(1, -1) * 255).round().to(torch.uint8) if spec.is_image else 50 * raw
    torch.testing.assert_close(spec.to_raw(spec.from_raw(stored)), stored)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounded_values_reach_their_ends_and_come_back(shape) -> None:
    spec = spec_of(shape)
    by_channel = [1] * spec.axes
    low, high = (end.view(1, -1, *by_channel) for end in spec.ends)
    torch.testing.assert_close(spec.bounded(torch.full((1, *shape), 1e4)), high.expand(1, *shape))
    torch.testing.assert_close(spec.bounded(torch.full((1, *shape), -1e4)), low.expand(1, *shape))
    values = torch.linspace(-2, 2, math.prod(shape)).view(1, *shape)
    torch.testing.assert_close(spec.unbounded(spec.bounded(values), 0.01), values, atol=1e-4, rtol=0)


def test_ends_of_images_are_black_and_white_and_those_of_signals_a_number_of_deviations() -> None:
    assert spec_of((1, 4, 4)).ends.flatten().tolist() == pytest.approx([-2.0, 3.0])
    assert spec_of((1, 4)).ends.flatten().tolist() == [-REACH, REACH]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"channels": 2, "width": 9, "height": 3, "axes": 1}, "height is 3; inputs of 1 axes have none"),
        ({"channels": 2, "width": 9, "height": 3, "depth": 2}, "depth is 2; inputs of 2 axes have none"),
        ({"channels": 2, "width": 9, "axes": 1, "resize": 9}, "resize is 9; only images are resized"),
        ({"channels": 2, "width": 0, "axes": 1}, "width is 0"),
    ],
)
def test_a_spec_that_does_not_fit_together(values, text) -> None:
    with pytest.raises(InputError, match=text):
        ImageSpec(mean=(0.0, 0.0), std=(1.0, 1.0), **values)


@pytest.mark.parametrize("text", ["12", "1x2x3x4x5", "3xAx4", "1x100000000000x4", ""])
def test_an_input_that_is_none(text) -> None:
    with pytest.raises(InputError, match="of signals 12x256"):
        parse_shape(text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_make_inputs_that_depend_on_noise_and_label(name, shape) -> None:
    spec = spec_of(shape)
    torch.manual_seed(0)
    generator = make_generator(name, spec, torch.randn(3, 4), width=8).eval()
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(2, generator.noise_size, generator=random)
    first = generator(noise, torch.tensor([0, 1]))
    assert first.shape == (2, *shape)
    low, high = (end.view(1, -1, *[1] * spec.axes) for end in spec.ends)
    assert bool(((first >= low) & (first <= high)).all())
    assert not torch.allclose(first, generator(noise, torch.tensor([1, 1]))[:2])
    assert not torch.allclose(first, generator(noise.flip(0), torch.tensor([0, 1])))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_shuffle_makes_each_group_of_channels_a_block(axes) -> None:
    sides, factor = (3, 2, 4)[:axes], 2
    x = torch.arange(2 * 5 * factor**axes * math.prod(sides)).float().view(2, -1, *sides)
    found = shuffled(x, factor)
    assert found.shape == (2, 5, *(factor * side for side in sides))
    for offset in np.ndindex(*[factor] * axes):
        channel = int(np.ravel_multi_index(offset, [factor] * axes))
        part = found[(slice(None), slice(None), *(slice(at, None, factor) for at in offset))]
        assert torch.equal(part, x[:, channel :: factor**axes])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_maps_are_shifted_as_roll_does(axes) -> None:
    x = torch.rand(4, 3, *(5, 6, 7)[:axes])
    steps = torch.randint(-9, 9, (4, axes), generator=torch.Generator().manual_seed(0))
    wanted = [torch.roll(one, each.tolist(), tuple(range(1, 1 + axes))) for one, each in zip(x, steps, strict=True)]
    assert torch.equal(shifted(x, steps), torch.stack(wanted))


@pytest.mark.parametrize("axes", [1, 3])
def test_a_blur_is_the_binomial_kernel_along_each_axis(axes) -> None:
    x = torch.randn(2, 1, *(6, 5, 7)[:axes])
    kernel = torch.tensor([0.25, 0.5, 0.25])
    wanted, conv = x, {1: F.conv1d, 3: F.conv3d}[axes]
    for axis in range(axes):
        line = kernel.view([1, 1, *(3 if other == axis else 1 for other in range(axes))])
        pad = [size for other in reversed(range(axes)) for size in ([1, 1] if other == axis else [0, 0])]
        wanted = conv(F.pad(wanted, pad, mode="replicate"), line)
    torch.testing.assert_close(blurred(x), wanted)


def test_the_total_variation_of_a_signal_is_that_of_its_neighbours() -> None:
    steps = torch.tensor([[[0.0, 3.0, 3.0, -1.0]]])  # differences 3, 0, -4
    assert total_variation(steps).item() == pytest.approx(5.0)


@pytest.mark.parametrize("draw", [natural_noise, dead_leaves])
@pytest.mark.parametrize("shape", [(2, 512), (1, 16, 24, 24)])
def test_drawn_signals_and_volumes_are_standardised_and_smooth(draw, shape) -> None:
    drawn = draw(50, spec_of(shape), torch.Generator().manual_seed(0))
    assert drawn.shape == (50, *shape)
    assert abs(drawn.mean().item()) < 0.15
    assert 0.8 < drawn.std().item() < 1.4
    steps = drawn.diff(dim=-1).std() / drawn.std()
    assert steps < 1.1  # white noise: 1.41


def test_pictures_of_signals_are_lines_and_those_of_volumes_slices() -> None:
    lines = as_pictures(torch.sin(torch.linspace(0, 9, 100)).expand(2, 2, -1), spec_of((2, 100)))
    assert lines.dtype == torch.uint8
    assert lines.shape == (2, 56, 112, 1)
    assert bool((lines < 128).flatten(1).any(1).all())
    volume = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 3, 5)
    slices = as_pictures(volume, spec_of((1, 6, 3, 5)))
    assert slices.shape == (1, 6, 10, 1)
    assert [int(slices[0, row, column, 0]) for row in (0, 5) for column in (0, 9)] == [0, 85, 170, 255]


def test_signals_of_an_npz_are_numbers(tmp_path) -> None:
    spec, inputs = spec_of((2, 10)), np.random.default_rng(0).normal(size=(7, 2, 10))
    np.savez(tmp_path / "set.npz", inputs=inputs, labels=np.arange(7) % 3)
    (batch,) = open_dataset(str(tmp_path / "set.npz"), spec).batches()
    torch.testing.assert_close(batch.images, torch.from_numpy((inputs - 0.4) / 0.2).float())
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": np.zeros((3, 2, 10))}, "lacks inputs; it holds: images"),
        ({"inputs": np.zeros((3, 2, 11))}, "has inputs of 2x11; the teacher takes 2x10"),
        ({"inputs": np.zeros((3, 2, 10, 4))}, r"inputs are float64 \[3, 2, 10, 4\]; numbers \['N', 2, 10\] are needed"),
        ({"inputs": np.full((3, 2, 10), np.nan)}, "input 0 holds a value that is not finite"),
        ({"inputs": np.zeros((3, 2, 10)), "labels": np.array([0, 1, 3])}, r"label 3 of image 2 is outside 0\.\.2"),
    ],
)
def test_an_npz_that_does_not_fit(tmp_path, arrays, text) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(InputError, match=text):
        list(open_dataset(str(tmp_path / "set.npz"), spec_of((2, 10))).batches())


def test_a_folder_holds_images_only(tmp_path) -> None:
    with pytest.raises(InputError, match=r"give a \.npz file with inputs"):
        open_dataset(str(tmp_path), spec_of((2, 10)))


def test_pixels_are_for_images(tmp_path) -> None:
    with pytest.raises(InputError, match="takes pixels of images only, and this network takes 3x40"):
        zsq.quantize(
            NETWORKS["signals"](), heads_spec("signals"), method="noise", pixels="nchw", settings=FEW, out=tmp_path
        )

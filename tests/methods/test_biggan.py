"""Samples of a pretrained BigGAN: ready-made ones, and those of a small random generator in the library's files."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import SPEC, Plain, settle

from zsq.errors import InputError, MissingExtraError, TeacherError
from zsq.methods import BigGAN, Real
from zsq.methods.biggan import fit_images, truncated_normal
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import Batch

LAYERS = [[True, 16, 8], [False, 8, 4], [False, 4, 2], [True, 2, 1]]
TINY = {
    **{"output_dim": 16, "z_dim": 8, "class_embed_dim": 8, "channel_width": 4, "num_classes": 5},
    **{"layers": LAYERS, "attention_layer_position": 2, "eps": 1e-4, "n_stats": 3},
}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher_from_module(settle(Plain()), SPEC)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as the library's checkpoints are, of a generator with random weights: 16x16 pixels, 5 classes."""
    library = pytest.importorskip("pytorch_pretrained_biggan", reason="the extra zsq[biggan] is not installed")
    folder = tmp_path_factory.mktemp("biggan")
    (folder / "config.json").write_text(json.dumps(TINY))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = library.BigGAN(library.BigGANConfig.from_dict(TINY))
        torch.nn.init.constant_(network.generator.bn.weight, 0.1)  # the library leaves both uninitialised
        torch.nn.init.zeros_(network.generator.bn.bias)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


def joined(batches: object) -> Batch:
    found = list(batches)
    return Batch(torch.cat([b.images for b in found]), torch.cat([b.labels for b in found]))


def test_a_checkpoint_makes_images_of_the_spec(checkpoint, teacher):
    source = BigGAN(checkpoint=str(checkpoint), batch_size=20).fit(teacher, Run()).source
    batch = joined(source.sample(45, batch_size=30))
    assert batch.images.shape == (45, 3, 8, 8)
    assert set(batch.labels.tolist()) == set(range(5))
    pixels = batch.images * 0.25 + 0.5
    assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6
    assert pixels.std() > 0.01
    assert len({image.numpy().tobytes() for image in batch.images}) == 45
    one, other = source.batch(0, None), source.batch(1, None)
    assert one.images.shape == (20, 3, 8, 8)
    assert not torch.equal(one.images, other.images)
    assert not one.images.requires_grad
    assert (source.data_free, source.true_labels, source.asks_labels) == (False, False, True)
    assert source.state_dict() == {}


def test_seed_and_nothing_else_decides_the_images(checkpoint, teacher):
    state = torch.get_rng_state()
    sources = [BigGAN(checkpoint=str(checkpoint)).fit(teacher, Run(seed=seed)).source for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (joined(source.sample(9)).images for source in sources)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_label_decides_the_image(checkpoint, teacher):
    source = BigGAN(checkpoint=str(checkpoint)).fit(teacher, Run()).source
    labels = torch.arange(5)
    assert torch.equal(source.sample_labels(labels), source.sample_labels(labels))
    changed = (source.sample_labels(labels) != source.sample_labels(labels.flip(0))).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, True, True]


def test_the_generator_is_given_noise_class_and_truncation(checkpoint, teacher, monkeypatch):
    source = BigGAN(checkpoint=str(checkpoint), truncation=0.5, batch_size=40).fit(teacher, Run()).source
    given = []
    make = source.network.forward
    monkeypatch.setattr(source.network, "forward", lambda *arguments: given.append(arguments) or make(*arguments))
    labels = source.batch(0, None).labels
    noise, classes = (torch.cat(parts) for parts in list(zip(*given, strict=True))[:2])
    assert noise.shape == (40, 8)
    assert 0.9 < noise.abs().max() <= 1.0  # two deviations, times the truncation
    assert torch.equal(classes, torch.eye(5)[labels])
    assert {truncation for *_, truncation in given} == {0.5}


def test_truncated_normal_is_cut_off_at_two():
    drawn = truncated_normal((200, 100), 0.5, stream(0, "x", 0)) / 0.5
    assert drawn.abs().max() <= 2
    assert drawn.abs().max() > 1.99
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 - 4 * density / mass, abs=0.01)  # 0.774; clamping would give 0.920


def test_images_are_mapped_to_pixels_resized_and_normalised():
    checker = torch.ones(1, 3, 16, 16)
    checker[:, :, ::2, ::2] = checker[:, :, 1::2, 1::2] = -1
    found = fit_images(checker, SPEC)
    assert found.shape == (1, 3, 8, 8)
    assert found[..., 1:-1, 1:-1].abs().max() < 0.01  # grey 0.5, the spec's mean; every second pixel would be white
    exact = fit_images(torch.full((1, 3, 8, 8), 0.5), SPEC)
    torch.testing.assert_close(exact, torch.full((1, 3, 8, 8), (0.75 - 0.5) / 0.25))


def test_given_samples_are_drawn_as_real_images_are():
    digits = load_teacher("digits")
    given, real = (kind(data="digits:train").fit(digits, Run()).source for kind in (BigGAN, Real))
    assert torch.equal(given.batch(0, None).images, real.batch(0, None).images)
    assert (given.data_free, given.true_labels, given.asks_labels) == (False, False, True)
    assert real.true_labels


def test_neither_or_both_is_refused(teacher):
    with pytest.raises(InputError, match=r"method biggan needs samples or a generator: settings={'method.data': SET}"):
        BigGAN().fit(teacher, Run())
    with pytest.raises(InputError, match=r"method.data is 'x' and method.checkpoint 'y'; give one of them"):
        BigGAN(data="x", checkpoint="y")


@pytest.mark.parametrize("truncation", [0.0, 1.5])
def test_truncation_is_checked(truncation):
    with pytest.raises(InputError, match=rf"method.truncation is {truncation}; it must lie in \(0, 1\]"):
        BigGAN(truncation=truncation)


def test_a_teacher_of_other_channels_is_refused(checkpoint):
    with pytest.raises(InputError, match="BigGAN makes images of 3 channels; teacher 'digits' takes 1"):
        BigGAN(checkpoint=str(checkpoint)).fit(load_teacher("digits"), Run())


def copy(checkpoint: Path, folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    (folder / "pytorch_model.bin").write_bytes((checkpoint / "pytorch_model.bin").read_bytes())
    return str(folder)


def test_a_checkpoint_of_other_classes_is_refused(checkpoint, teacher, tmp_path):
    folder = copy(checkpoint, tmp_path, num_classes=1000)
    with pytest.raises(InputError, match="makes images of 1000 classes; teacher 'network' knows 5"):
        BigGAN(checkpoint=folder).fit(teacher, Run())


def test_a_checkpoint_that_lacks_a_file_is_refused(teacher, tmp_path):
    with pytest.raises(InputError, match=r"lacks config.json and pytorch_model.bin; pytorch-pretrained-biggan makes"):
        BigGAN(checkpoint=str(tmp_path)).fit(teacher, Run())


def test_a_checkpoint_of_another_size_is_refused(checkpoint, teacher, tmp_path):
    folder = copy(checkpoint, tmp_path, z_dim=16)
    with pytest.raises(TeacherError, match=r"pytorch_model\.bin"):
        BigGAN(checkpoint=folder).fit(teacher, Run())


@pytest.mark.parametrize("text", ["{", "[1]", '{"layers": 3}', '{"channel_width": -1}'])
def test_a_config_that_describes_nothing_is_refused(checkpoint, teacher, tmp_path, text):
    folder = copy(checkpoint, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json does not describe a BigGAN"):
        BigGAN(checkpoint=folder).fit(teacher, Run())


def test_without_the_library_the_extra_is_named(teacher, tmp_path, monkeypatch):
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "pytorch_pretrained_biggan", None)
    with pytest.raises(MissingExtraError, match=r"biggan is not installed: pip install 'zsq\[biggan\]"):
        BigGAN(checkpoint=str(tmp_path)).fit(teacher, Run())


def test_samples_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(InputError, match="has no labels; samples of a generator are of known classes"):
        BigGAN(data=str(tmp_path / "a.npz")).fit(load_teacher("digits"), Run())

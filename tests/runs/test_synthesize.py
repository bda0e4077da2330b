from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.models.network import Network
from zsq.models.teacher import Teacher, load_teacher, teacher_from_module
from zsq.reports.pictures import write_grid
from zsq.runs.allocate import allocate
from zsq.runs.quantize import quantize
from zsq.runs.synthesize import synthesize, write_npz
from zsq.types import Batch, ImageSpec

TINY = ("method.steps=2", "method.batch_size=8", "method.width=8")


@pytest.fixture(scope="module")
def digits() -> Teacher:
    return load_teacher("digits")


@pytest.fixture(scope="module")
def colours() -> Teacher:
    """A teacher of 3 channels, of another height than width, and of 4 classes."""
    spec = ImageSpec(channels=3, height=8, width=12, classes=4, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
        )
    return teacher_from_module(net, spec, name="colours")


@pytest.mark.parametrize("count", [1, 100, 205])  # sources give 100 a batch
@pytest.mark.parametrize("name", ["digits", "colours"])
def test_images_can_be_read_as_a_data_set(tmp_path, request, name, count):
    teacher = request.getfixturevalue(name)
    written = synthesize(teacher, out=tmp_path / "images", count=count, settings=TINY)
    assert written == [tmp_path / "images" / "images.npz", tmp_path / "images" / "samples.png"]
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        *(
            "images.npz",
            "samples.png",
            "samples.json",
            "settings.toml",
            "generator.safetensors",
            "metrics.jsonl",
            "checkpoints",
        )
    }
    spec = teacher.spec
    with np.load(written[0]) as stored:
        assert sorted(stored.files) == ["images", "labels", "mean", "std"]
        images, labels = stored["images"], stored["labels"]
        assert np.array_equal(stored["mean"], np.float32(spec.mean))
        assert np.array_equal(stored["std"], np.float32(spec.std))
    assert (images.dtype, images.shape) == (np.uint8, (count, spec.height, spec.width, spec.channels))
    assert (labels.dtype, labels.shape) == (np.int64, (count,))
    assert 0 <= labels.min() <= labels.max() < spec.classes
    data = open_dataset(str(written[0]), spec)
    batches = list(data.batches())
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(labels))
    back = torch.cat([spec.to_pixels(batch.images) for batch in batches])
    assert torch.equal(back, torch.from_numpy(images))


def test_names_of_classes_lie_beside_the_images(tmp_path):
    names = ("zero", "one", "two", "three", "four", "fünf", "six", "seven", "eight", "nine")
    written, _ = synthesize("digits", out=tmp_path / "images", count=2, settings=TINY, class_names=names)
    with np.load(written) as stored:
        assert tuple(stored["class_names"]) == names
    again, _ = synthesize(out=tmp_path / "again", count=2, from_run=tmp_path / "images")
    with np.load(again) as stored:  # the folder knows them
        assert tuple(stored["class_names"]) == names


def test_too_few_names_of_classes_are_refused(tmp_path, colours):
    with pytest.raises(InputError, match="class_names has 2 names; the teacher knows 4 classes"):
        synthesize(colours, out=tmp_path / "images", count=2, settings=TINY, class_names=("red", "green"))


@pytest.mark.parametrize(("name", "rows"), [("digits", 10), ("colours", 4)])
def test_the_picture_has_one_row_a_class(tmp_path, request, name, rows):
    teacher = request.getfixturevalue(name)
    _, path = synthesize(teacher, out=tmp_path, count=1, settings=TINY)
    tile = 48 // min(teacher.spec.height, teacher.spec.width)
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.height == rows * (tile * teacher.spec.height + 2)
        assert picture.width == 10 * (tile * teacher.spec.width + 2)
        pixels = np.asarray(picture)
    if teacher.spec.channels == 1:
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
    else:
        assert not np.array_equal(pixels[..., 0], pixels[..., 2])


def test_the_same_seed_gives_the_same_images(tmp_path, digits):
    files = [synthesize(digits, out=tmp_path / str(i), count=7, settings=TINY, seed=i // 2)[0] for i in range(3)]
    images = [np.load(file)["images"] for file in files]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_real_images_come_back_as_they_are(tmp_path, digits):
    settings = ("method.data=digits:train",)
    with np.load(synthesize(digits, out=tmp_path, count=300, method="real", settings=settings)[0]) as stored:
        images, labels = stored["images"], stored["labels"]
    data = open_dataset("digits:train", digits.spec)
    pixels = torch.cat([digits.spec.to_pixels(batch.images) for batch in data.batches()]).numpy()
    known = {image.tobytes(): label for image, label in zip(pixels, data._labels, strict=True)}
    assert [known.get(image.tobytes()) for image in images] == labels.tolist()


@pytest.mark.parametrize(
    ("method", "settings", "held"),
    [("real", ("method.data=digits:train",), 898), ("zeroq", ("method.steps=2", "method.batch_size=8"), 8)],
)
def test_a_source_that_holds_fewer_images_gives_all_it_has(tmp_path, digits, method, settings, held, said):
    path, _ = synthesize(digits, out=tmp_path, count=2000, method=method, settings=settings)
    with np.load(path) as stored:
        assert len(stored["images"]) == len(stored["labels"]) == held
    assert f"WARNING: method {method} holds {held} images; these are written instead of 2000." in said


@pytest.mark.parametrize(("height", "width"), [(8, 900), (2000, 16), (300, 2)])
def test_narrow_images_make_a_picture_too(tmp_path, height, width):
    write_grid(np.full((2, 3, height, width, 3), 90, np.uint8), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 0
        assert picture.size[0] < picture.size[1] if height > width else picture.size[0] > picture.size[1]


@pytest.mark.slow
def test_a_generator_of_another_run_is_used(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("zsq.runs.stages.write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(digits, out=tmp_path / "run", settings=(*TINY, "quantizer.num_samples=8"))
    taken = synthesize(digits, out=tmp_path / "a", count=5, from_run=tmp_path / "run")[0]
    fresh = synthesize(digits, out=tmp_path / "b", count=5, settings=TINY)[0]
    assert np.array_equal(np.load(taken)["images"], np.load(fresh)["images"])


def _stop(*_, **__) -> None:
    raise InputError("far enough")


@pytest.mark.parametrize("count", [0, -4])
def test_no_images_are_refused(tmp_path, digits, count):
    with pytest.raises(InputError, match=f"count is {count}; at least 1"):
        synthesize(digits, out=tmp_path, count=count)


@pytest.mark.parametrize("name", ["images.npz", "samples.png"])
def test_a_folder_with_images_is_refused_unless_told(tmp_path, digits, name):
    (tmp_path / name).write_text("kept")
    with pytest.raises(InputError, match="holds another run; resume=True continues it, overwrite=True discards it"):
        synthesize(digits, out=tmp_path, count=2, method="noise")
    assert (tmp_path / name).read_text() == "kept"
    synthesize(digits, out=tmp_path, count=2, method="noise", overwrite=True)
    assert np.load(tmp_path / "images.npz")["labels"].shape == (2,)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path, digits, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="out takes a folder"):
        synthesize(digits, out=tmp_path / place, count=2, method="noise", overwrite=True)


def test_images_are_written_as_they_come(tmp_path, digits):
    """The next batch is asked for only when the last one is in the file, so any number fits in memory."""
    sizes: list[int] = []

    def batches():
        for _ in range(40):
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            images = torch.rand(100, 1, 8, 8)
            yield Batch(digits.spec.normalize(images), torch.zeros(100, dtype=torch.int64))

    write_npz(tmp_path / "x.npz", batches(), digits.spec, 4000)
    assert all(early <= late for early, late in pairwise(sizes))
    assert sizes[-1] > 100_000  # of 256,000 bytes of pixels that do not compress
    assert np.load(tmp_path / "x.npz")["images"].shape == (4000, 8, 8, 1)


def test_a_synthesis_that_was_stopped_goes_on_and_its_generator_serves_others(tmp_path, digits, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("zsq.runs.synthesize.write_npz", interrupt)
        with pytest.raises(KeyboardInterrupt):
            synthesize(digits, out=tmp_path / "a", count=5, settings=TINY)
    fit = (tmp_path / "a" / "checkpoints" / "fit.safetensors").stat().st_mtime_ns
    resumed = synthesize(digits, out=tmp_path / "a", count=5, settings=TINY, resume=True)[0]
    assert (tmp_path / "a" / "checkpoints" / "fit.safetensors").stat().st_mtime_ns == fit
    taken = synthesize(digits, out=tmp_path / "b", count=5, from_run=tmp_path / "a")[0]
    assert np.array_equal(np.load(taken)["images"], np.load(resumed)["images"])


def test_what_is_overwritten_is_kept_until_the_method_has_started(tmp_path, digits):
    path = synthesize(digits, out=tmp_path, count=3, method="noise")[0]
    kept = path.read_bytes()
    with pytest.raises(InputError, match="method real needs images"):
        synthesize(digits, out=tmp_path, count=3, method="real", overwrite=True)
    assert path.read_bytes() == kept


def test_every_verb_takes_what_quantize_takes(tmp_path):
    """A name, a `Network`, a `Teacher`, or a module with its spec; a module alone is refused."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    spec = ImageSpec(channels=1, height=8, width=8, classes=4, mean=(0.5,), std=(0.25,))
    for number, network in enumerate([("digits",), (Network(model="digits"),), (net, spec)]):
        path, _ = synthesize(*network, out=tmp_path / str(number), count=2, method="noise", quiet=True)
        assert path.exists()
    done = allocate(net, spec, out=tmp_path / "mixed", average=4, num_images=4, method="noise", quiet=True)
    assert done.allocation.bits <= 4 * done.frontier.num_weights
    for verb, rest in ((synthesize, {}), (allocate, {"average": 4}), (quantize, {})):
        with pytest.raises(InputError, match="a module in memory needs its ImageSpec"):
            verb(net, out=tmp_path / "none", quiet=True, **rest)
    assert not (tmp_path / "none").exists()

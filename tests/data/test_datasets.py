import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zsq.data import digits
from zsq.data.datasets import EvenSubset, open_dataset
from zsq.errors import InputError
from zsq.types import ImageSpec


def spec_of(channels=3, size=8, classes=3, resize=None) -> ImageSpec:
    return ImageSpec(
        channels=channels,
        height=size,
        width=size,
        classes=classes,
        mean=(0.25,) * channels,
        std=(0.5,) * channels,
        resize=resize,
    )


def pixels(count=5, height=8, width=8, channels=3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def read(data, batch_size=2) -> tuple[torch.Tensor, list[int]]:
    batches = list(data.batches(batch_size))
    assert sum(len(batch.labels) for batch in batches) == data.num_images
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]).tolist()


def expected(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2) - 0.25) / 0.5


def write_folder(path: Path, images: np.ndarray, labels: list[int]) -> str:
    path.mkdir()
    rows = [("file_name", "label")]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image.squeeze()).save(path / f"{index}.png")
        rows.append((f"{index}.png", label))
    with (path / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return str(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_npz(tmp_path, save, batch_size) -> None:
    images, labels = pixels(), [0, 1, 2, 1, 0]
    save(tmp_path / "a.npz", images=images, labels=np.array(labels, dtype=np.uint8))
    data = open_dataset(str(tmp_path / "a.npz"), spec_of())
    got, told = read(data, batch_size)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected(images))
    assert told == labels
    assert next(iter(data.batches())).labels.dtype == torch.int64
    assert torch.equal(read(data)[0], got)  # a second pass starts anew


def test_npz_grey_without_channels_limited_and_cropped(tmp_path) -> None:
    images = pixels(4, 11, 10, 1)
    np.savez(tmp_path / "a.npz", images=images[..., 0], labels=np.array([0, 1, 2, 0]))
    got, told = read(open_dataset(str(tmp_path / "a.npz"), spec_of(channels=1), limit=3))
    assert torch.allclose(got, expected(images[:3, 2:10, 1:9]))
    assert told == [0, 1, 2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_memory_does_not_grow_with_the_set(tmp_path, save) -> None:
    save(tmp_path / "a.npz", images=pixels(4000, 32, 32), labels=np.zeros(4000, dtype=np.int64))  # 12 MB of pixels
    tracemalloc.start()
    data = open_dataset(str(tmp_path / "a.npz"), spec_of(size=32))
    count = sum(len(batch.labels) for batch in data.batches(50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 4_000_000


def test_npz_is_resized_like_files(tmp_path) -> None:
    images = pixels(2, 20, 30)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    spec = spec_of(resize=10)
    folder = write_folder(tmp_path / "files", images, [0, 1])
    assert torch.equal(read(open_dataset(str(tmp_path / "a.npz"), spec))[0], read(open_dataset(folder, spec))[0])


def test_folder_with_metadata(tmp_path) -> None:
    images = pixels(5, 8, 13)
    folder = write_folder(tmp_path / "set", images, [2, 1, 0, 1, 2])
    got, told = read(open_dataset(folder, spec_of(), limit=4))
    assert torch.allclose(got, expected(images[:4, :, 2:10]))
    assert told == [2, 1, 0, 1]


def test_resize_of_the_shorter_side_then_centre_crop(tmp_path) -> None:
    image = pixels(1, 40, 20)[0]
    folder = write_folder(tmp_path / "set", image[None], [0])
    wanted = Image.fromarray(image).resize((10, 20), Image.Resampling.BILINEAR).crop((1, 6, 9, 14))
    got, _ = read(open_dataset(folder, spec_of(resize=10)))
    assert torch.allclose(got, expected(np.asarray(wanted)[None]))


def test_class_folders_in_sorted_order(tmp_path) -> None:
    for name, value in (("dog", 20), ("cat", 10), ("eel", 30)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name / "x.PNG")
        (tmp_path / name / "notes.txt").write_text("no image")
    got, told = read(open_dataset(str(tmp_path), spec_of()))
    assert told == [0, 1, 2]
    assert ((got[:, 0, 0, 0] * 0.5 + 0.25) * 255).round().tolist() == [10, 20, 30]


def test_numbered_class_folders_in_numeric_order(tmp_path) -> None:
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        Image.new("L", (8, 8), number).save(tmp_path / str(number) / "x.png")
    got, told = read(open_dataset(str(tmp_path), spec_of(channels=1, classes=11)))
    assert ((got[:, 0, 0, 0] * 0.5 + 0.25) * 255).round().tolist() == told == list(range(11))


def test_digits_halves() -> None:
    for name, is_train, count in (("digits", False, 899), ("digits:train", True, 898)):
        data = open_dataset(name, digits.SPEC)
        images, labels = digits.split(is_train)
        assert data.num_images == count
        got, told = read(data, 400)
        assert torch.equal(digits.SPEC.to_pixels(got), torch.from_numpy(images))
        assert told == labels.tolist()


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": pixels(2)}, "lacks images; it holds: x."),
        ({"images": pixels(2) / 255, "labels": [0, 1]}, "images are float64 [2, 8, 8, 3]; uint8"),
        ({"images": pixels(2)[0, 0], "labels": [0, 1]}, "images are uint8 [8, 3]; uint8 [N, height"),
        ({"images": pixels(2), "labels": [0.0, 1.0]}, "labels are float64 [2]; 2 images need integers [2]."),
        ({"images": pixels(2), "labels": [0, 1, 2]}, "labels are int64 [3]; 2 images need integers [2]."),
        ({"images": pixels(0), "labels": np.zeros(0, int)}, "holds no images."),
        ({"images": pixels(3), "labels": [0, 1, 7]}, "label 7 of image 2 is outside 0..2, the teacher's 3 classes."),
        ({"images": pixels(1), "labels": [-1]}, "label -1 of image 0 is outside 0..2"),
        ({"images": pixels(1, channels=1), "labels": [0]}, "1-channel images; the teacher takes 3."),
        (
            {"images": pixels(1, 8, 6), "labels": [0]},
            "images 8x6; the teacher takes 8x8. Enlarge them with resize=8.",
        ),
        ({"images": np.asfortranarray(pixels(2)), "labels": [0, 1]}, "save numpy.ascontiguousarray(images)."),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, text) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError) as caught:
        open_dataset(str(tmp_path / "a.npz"), spec_of())
    assert text in str(caught.value)


def test_damaged_npz(tmp_path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="is not a readable npz file: File is not a zip file"):
        open_dataset(str(path), spec_of())
    np.savez(path, images=pixels(50), labels=np.zeros(50, int))
    whole = bytearray(path.read_bytes())
    whole[3000] ^= 255
    path.write_bytes(whole)
    with pytest.raises(InputError, match="Bad CRC-32"):
        list(open_dataset(str(path), spec_of()).batches())


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (
            "name,label\nx.png,1\n",
            "metadata.csv has the columns ['name', 'label']; file_name,label are needed once each.",
        ),
        ("file_name,label\n0.png,cat\n", "line 2 of metadata.csv has the label 'cat'."),
        ("file_name,label\n0.png,1\nx.png,1\n", "line 3 of metadata.csv: no such file: x.png"),
        ("label,file_name\n1,0.png\n1\n", "line 3 of metadata.csv: no such file: "),
        ("file_name,label\n0.png,1\n0.png,3\n", "label 3 of image 1 is outside 0..2"),
        ("file_name,label\n", "holds no images."),
        ("", "metadata.csv has the columns []"),
        ("file_name,label,label\n0.png,1,2\n", "metadata.csv has the columns ['file_name', 'label', 'label']"),
        ("file_name;label\n0.png;1\n", "metadata.csv has the columns ['file_name;label']"),
        ('file_name,label\n"0.png,1\n', "line 2 of metadata.csv has the label ''"),
        ("file_name,label\n../set/0.png,1\n", "../set/0.png is not below the folder of metadata.csv"),
        ("file_name,label\n/etc/passwd,1\n", "/etc/passwd is not below the folder of metadata.csv"),
        (f"file_name,label\n{'a' * 5000},1\n", "line 2 of metadata.csv: no such file: aaa"),
        ("file_name,label\na\0.png,1\n", "line 2 of metadata.csv: no such file: a\0.png"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, table, text) -> None:
    folder = write_folder(tmp_path / "set", pixels(1), [0])
    (Path(folder) / "metadata.csv").write_text(table)
    with pytest.raises(InputError) as caught:
        open_dataset(folder, spec_of())
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0.png is not a readable image: cannot identify"),
        (b"\x89PNG\r\n\x1a\nxx", "0.png is not a readable image"),
    ],
)
def test_unreadable_image(tmp_path, content, text) -> None:
    folder = write_folder(tmp_path / "set", pixels(1), [0])
    (Path(folder) / "0.png").write_bytes(content)
    with pytest.raises(InputError, match=text):
        list(open_dataset(folder, spec_of()).batches())


def test_truncated_image(tmp_path) -> None:
    folder = write_folder(tmp_path / "set", pixels(1, 64, 64), [0])
    path = Path(folder) / "0.png"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"0\.png is not a readable image: .*truncated"):
        list(open_dataset(folder, spec_of()).batches())


def test_images_too_small_or_too_deep(tmp_path) -> None:
    folder = write_folder(tmp_path / "set", pixels(1, 6, 9), [0])
    with pytest.raises(InputError, match=r"0\.png is 6x9; the teacher takes 8x8\. Enlarge them with resize=8\."):
        list(open_dataset(folder, spec_of()).batches())
    assert read(open_dataset(folder, spec_of(resize=8)))[0].shape == (1, 3, 8, 8)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(Path(folder) / "0.png")
    with pytest.raises(InputError, match=r"pixels of more than 8 bits \(mode I;16\)"):
        list(open_dataset(folder, spec_of()).batches())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "digit",
            "no such data set: 'digit'. Known: 'digits', 'digits:train', 'shapes', 'shapes:train', 'heartbeats', ",
        ),
        ("{tmp}/file.txt", "is of no known kind"),
        ("{tmp}/empty", "holds neither metadata.csv (file_name,label), nor one folder a class, nor images"),
        ("{tmp}/classes", "has 2 class folders; the teacher knows 3 classes."),
        ("digits", "has 1-channel images; the teacher takes 3."),
    ],
)
def test_neither_kind(tmp_path, name, text) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for number in (0, 1):
        (tmp_path / "classes" / str(number)).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        open_dataset(name.format(tmp=tmp_path), spec_of())
    assert text in str(caught.value)


def test_limit_and_channels(tmp_path) -> None:
    with pytest.raises(InputError, match="limit of data set 'digits' is 0; it must be at least 1"):
        open_dataset("digits", digits.SPEC, limit=0)
    folder = write_folder(tmp_path / "set", pixels(1), [0])
    with pytest.raises(InputError, match=r"the teacher takes 2\. Give a \.npz file\."):
        open_dataset(folder, spec_of(channels=2))


@pytest.mark.parametrize("kind", ["npz", "folder", "digits"])
def test_a_crop_is_told_unless_a_resize_was_chosen(tmp_path, kind) -> None:
    images = pixels(2, 20, 12)
    if kind == "npz":
        np.savez(tmp_path / "x.npz", images=images, labels=[0, 1])
        name = str(tmp_path / "x.npz")
    elif kind == "folder":
        name = write_folder(tmp_path / "x", images, [0, 1])
    else:
        name = "digits"
    crop = spec_of(channels=1, size=4, classes=10) if kind == "digits" else spec_of(size=8)
    size = "8x8" if kind == "digits" else "20x12"
    (notice,) = open_dataset(name, crop).notices
    assert notice.startswith(f"images of data set '{name}' are {size}, and only their centre, {crop.height}x")
    assert notice.endswith(f"is used; --resize {crop.height} shrinks them first")
    resized = spec_of(channels=crop.channels, size=crop.height, classes=10, resize=crop.height)
    assert open_dataset(name, resized).notices == []


def test_images_without_labels(tmp_path) -> None:
    images = pixels(3)
    np.savez(tmp_path / "a.npz", images=images)
    (tmp_path / "flat").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "flat" / f"{index}.png")
    for number in range(1000):
        (tmp_path / "flat" / f"{number}.txt").touch()
    (tmp_path / "flat" / "._0.png").write_text("what a file system keeps beside an image")
    for name in ("a.npz", "flat"):
        data = open_dataset(str(tmp_path / name), spec_of())
        got, told = read(data)
        assert torch.allclose(got, expected(images))
        assert told == [-1, -1, -1]
        assert not data.labelled
        assert not EvenSubset(data, 2).labelled
    assert data.notices == [f"data set '{tmp_path / 'flat'}' has 3 images and no labels; 1000 other files are left out"]


def class_folders(path, names) -> str:
    for value, name in enumerate(names):
        (path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (10 * value,) * 3).save(path / name / "x.png")
    return str(path)


def test_the_mapping_of_class_folders_is_said(tmp_path) -> None:
    folder = class_folders(tmp_path / "set", ["disc", "cross", "ring"])
    assert open_dataset(folder, spec_of()).notices == [f"class folders of data set '{folder}': cross=0, disc=1, ring=2"]
    many = class_folders(tmp_path / "many", [f"c{number:02}" for number in range(30)])
    (notice,) = open_dataset(many, spec_of(classes=30)).notices
    assert notice.endswith(": c00=0, c01=1, c02=2, c03=3, c04=4, ..., c29=29")


def test_class_names_say_which_folder_is_which(tmp_path) -> None:
    folder = class_folders(tmp_path / "set", ["disc", "cross"])
    (tmp_path / "names.txt").write_text("ring\ndisc\n\ncross\n")
    data = open_dataset(folder, spec_of(), class_names=tmp_path / "names.txt")
    got, told = read(data)
    assert told == [1, 2]
    assert ((got[:, 0, 0, 0] * 0.5 + 0.25) * 255).round().tolist() == [0, 10]
    assert data.notices == [f"class folders of data set '{folder}': disc=1, cross=2"]


def test_a_name_that_stands_twice_hinders_only_a_folder_of_that_name(tmp_path) -> None:
    folder = class_folders(tmp_path / "set", ["cross"])
    data = open_dataset(folder, spec_of(), class_names=["crane", "crane", "cross"])
    assert read(data)[1] == [2]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("ring\ndisc\n", "names.txt names 2 classes, one a line; the teacher knows 3"),
        ("cross\ndisc\ndisc\n", "names.txt has the name 'disc' for more than one class"),
        ("ring\ndisk\ncross\n", r"has a folder 'disc', which .*names.txt does not name. Did you mean 'disk'\?"),
        (None, "class names of .*names.txt cannot be read"),
    ],
)
def test_class_names_that_do_not_fit(names, text, tmp_path) -> None:
    folder = class_folders(tmp_path / "set", ["disc", "cross"])
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
    with pytest.raises(InputError, match=text):
        open_dataset(folder, spec_of(), class_names=tmp_path / "names.txt")


def test_images_are_turned_upright(tmp_path) -> None:
    """Orientation 6: the camera was held upright, and the stored image lies on its side."""
    image = pixels(1, 8, 8)[0]
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "set").mkdir()
    Image.fromarray(np.rot90(image)).save(tmp_path / "set" / "x.png", exif=tags)
    got, _ = read(open_dataset(str(tmp_path / "set"), spec_of()))
    assert torch.allclose(got, expected(image[None]))


def test_transparency_is_told(tmp_path) -> None:
    (tmp_path / "set").mkdir()
    image = pixels(1, channels=4)[0]
    Image.fromarray(image).save(tmp_path / "set" / "x.png")
    data = open_dataset(str(tmp_path / "set"), spec_of())
    assert any("transparency, which is left out" in notice for notice in data.notices)
    assert torch.allclose(read(data)[0], expected(image[None, ..., :3]))
    assert not any("which is left out" in n for n in open_dataset(str(tmp_path / "set"), spec_of(channels=4)).notices)


def test_images_are_normalised_wherever_it_was_done_first() -> None:
    """Lists serve as well as tuples, and what inference mode has seen can be trained on."""
    spec = ImageSpec(channels=1, height=2, width=2, classes=2, mean=[0.25], std=[0.5])  # type: ignore[arg-type]
    with torch.inference_mode():
        spec.normalize(torch.ones(1, 1, 2, 2))
    pixels = torch.ones(1, 1, 2, 2, requires_grad=True)
    images = spec.normalize(pixels)
    images.square().sum().backward()
    assert images.unique().tolist() == [1.5]
    assert pixels.grad is not None


def test_an_even_subset_keeps_all_classes_of_a_sorted_set(tmp_path) -> None:
    labels = np.repeat(np.arange(5), 20)
    images = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None, None], (100, 8, 8, 1))
    np.savez(tmp_path / "a.npz", images=np.ascontiguousarray(images), labels=labels)
    spec = ImageSpec(channels=1, height=8, width=8, classes=5, mean=(0.0,), std=(1.0,))
    whole = open_dataset(str(tmp_path / "a.npz"), spec)
    some = EvenSubset(whole, 10)
    batches = list(some.batches(7))
    assert some.num_images == sum(len(batch.labels) for batch in batches) == 10
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    shown = torch.cat([batch.images for batch in batches])[:, 0, 0, 0] * 255
    assert shown.round().tolist() == list(range(5, 100, 10))
    everything = EvenSubset(whole, 1000)
    assert everything.num_images == 100
    assert torch.cat([batch.labels for batch in everything.batches()]).tolist() == labels.tolist()

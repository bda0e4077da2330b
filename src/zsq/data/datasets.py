"""Images, streamed: what accuracy or agreement is measured on, and what the data-dependent baselines calibrate with."""

import contextlib
import csv
import difflib
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from zsq.data import digits, shapes
from zsq.data.image_files import READ_FAULTS, open_image
from zsq.errors import ZIP_FAULTS, InputError
from zsq.types import Batch, ImageSpec

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Endings by which a class folder's images are known, in either case."""

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""What an image file is converted to, by the channels that the teacher takes."""

CHANNELS_WITH_ALPHA = 4
"""Channels of a network that takes transparency, too."""

BYTES_AT_ONCE = 2**26
"""Bytes of whole images that are in memory together before they are cropped."""

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0
"""Pixels of the largest image that is read."""

MOST_IMAGES = 10**9

LABEL_DIGITS = 10
"""Most characters of a label."""

KINDS = (
    "'digits', 'digits:train', 'shapes', 'shapes:train', 'heartbeats', 'heartbeats:train', a .npz file (images uint8 "
    "[N,H,W,C], or inputs [N,C,...] of signals and volumes, and labels where there are any), a folder with "
    "metadata.csv (file_name,label), a folder with one folder a class, or a folder of images without labels"
)

UNKNOWN = -1
"""Label of an image whose class nobody has said."""

SMALLEST_DRAWN = 16
"""Side in pixels from which drawn shapes can be told apart."""

VIEWS = 4
"""Views of each drawn shape, for a network that gives embeddings."""

SHOWN_CLASSES = 10
"""Class folders of which a notice names all; of more it names the first and the last."""


IGNORED = 255
"""Class in a mask of what nobody has said, and which no measure counts."""

BOX_VALUES = 5
"""Numbers of a box: left, top, right, bottom in pixels, and class, below 0 for none."""

Truth = Literal["labels", "masks", "identities", "values", "boxes"]


def truth_of(spec: ImageSpec) -> Truth:
    """Return what is true of an image for a network: its class, that of each place, whom it shows, or numbers."""
    first = next((output for output in spec.outputs if output.kind == "classes"), None)
    if first is not None and len(first.shape) > 1:
        return "masks"
    if not spec.outputs or first is not None:
        return "labels"
    return "identities" if spec.outputs[0].kind == "embedding" else "values"


def _check_labels(name: str, labels: np.ndarray, spec: ImageSpec) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= spec.classes))
    if len(wrong):
        raise InputError(
            f"data set '{name}': label {labels[wrong[0]]} of image {wrong[0]} is outside 0..{spec.classes - 1}, "
            f"the teacher's {spec.classes} classes."
        )


def _masks(masks: np.ndarray, spec: ImageSpec, name: str, start: int) -> np.ndarray:
    """Return masks as classes, int64, `UNKNOWN` where nobody has said one.

    Raises:
        InputError: one holds a class that the network does not know.
    """
    found = np.where(masks == IGNORED, UNKNOWN, masks).astype(np.int64)
    wrong = np.argwhere(found >= spec.classes)
    if len(wrong):
        image, *place = wrong[0].tolist()
        raise InputError(
            f"data set '{name}': the mask of image {start + image} has class {found[tuple(wrong[0])]} at {place}; the "
            f"network knows {spec.classes} classes (0..{spec.classes - 1}), and {IGNORED} is left out."
        )
    return found


class DataSet(ABC):
    """A set of images, with their classes where these are known, in a fixed order, read anew by `batches`."""

    def __init__(
        self, name: str, spec: ImageSpec, labels: np.ndarray, limit: int | None, *, labelled: bool = True
    ) -> None:
        self.name = name
        """The set as the user named it."""
        if len(labels) == 0:
            raise InputError(f"data set '{name}' holds no images.")
        if limit is not None and limit < 1:
            raise InputError(f"the limit of data set '{name}' is {limit}; it must be at least 1.")
        labels = labels[:limit]
        self.labelled = labelled
        """Whether what is true of the images is known; else all labels are `UNKNOWN`."""
        if labelled and truth_of(spec) == "labels":
            _check_labels(name, labels, spec)
        self.num_images = len(labels)
        """Images that `batches` yields."""
        self.notices: list[str] = []
        """What the user should know of how the images are read: what is lost of them, which class a folder is."""
        self.mapping = ""
        """Which class each folder of images is taken for, such as `cross=0, disc=1`; empty where there are none."""
        self._spec = spec
        self._labels = labels if labels.dtype.kind == "f" else labels.astype(np.int64)

    def _note_crop(self, height: int, width: int) -> None:
        """Note that images of this size lose a part of themselves."""
        spec = self._spec
        if spec.resize is None and (height, width) != (spec.height, spec.width):
            self.notices.append(
                f"images of data set '{self.name}' are {height}x{width}, and only their centre, "
                f"{spec.height}x{spec.width}, is used; --resize {min(spec.height, spec.width)} shrinks them first"
            )

    def batches(self, batch_size: int = 100) -> Iterator[Batch]:
        """Yield all images as the network takes them, `batch_size` at a time; the last batch may be smaller.

        Raises:
            InputError: an image cannot be read or does not fit the teacher.
        """
        start = 0
        for pixels in self._pixels(batch_size):
            images = self._spec.from_raw(torch.from_numpy(np.array(pixels))).contiguous()
            labels = self._truth(start, start + len(pixels))
            start += len(pixels)
            yield Batch(images, torch.from_numpy(labels))

    def _truth(self, start: int, end: int) -> np.ndarray:
        """Return what is true of images from one to another: int64 [n], masks int64 [n, H, W] or values [n, ...]."""
        found: np.ndarray = self._labels[start:end]
        if found.ndim > 1 and truth_of(self._spec) == "masks":
            fitted = _fit_masks(found, self._spec) if self._spec.is_image else found
            return _masks(fitted, self._spec, self.name, start)
        return found

    @abstractmethod
    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield uint8 [n, height, width, channels] of the spec's size, or the numbers of signals and volumes, float32
        [n, channels, ...]; `num_images` in all."""


class EvenSubset:
    """Some images of a set, spread evenly over it, so that a set sorted by class is still one of all classes.

    Args:
        images: the whole set.
        count: how many of its images, from 1 to all.
    """

    def __init__(self, images: "DataSet | EvenSubset", count: int) -> None:
        self.name: str = images.name
        self.notices: list[str] = images.notices
        self.mapping: str = images.mapping
        self.labelled: bool = images.labelled
        self.num_images: int = min(count, images.num_images)
        self._images = images
        rows = (np.arange(self.num_images) + 0.5) * images.num_images / self.num_images
        self._kept = np.zeros(images.num_images, dtype=bool)
        self._kept[rows.astype(np.int64)] = True

    def batches(self, batch_size: int = 100) -> Iterator[Batch]:
        """Yield the images kept, as the network takes them; batches are of up to `batch_size` images."""
        start = 0
        for batch in self._images.batches(batch_size):
            kept = torch.from_numpy(self._kept[start : start + len(batch.labels)])
            start += len(batch.labels)
            if kept.any():
                yield Batch(batch.images[kept], batch.labels[kept])


class _Array(DataSet):
    """Images that are in memory, uint8 [N, H, W, C]."""

    def __init__(self, name: str, spec: ImageSpec, images: np.ndarray, labels: np.ndarray, limit: int | None) -> None:
        _check_array(name, images.shape[1:], spec)
        super().__init__(name, spec, labels, limit)
        self._images = images
        self._note_crop(*images.shape[1:3])

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.num_images, batch_size):
            chunk = self._images[start : min(start + batch_size, self.num_images)]
            yield _fit_array(chunk, self._spec)


class _Drawn(DataSet):
    """Drawn shapes at the size that the network takes, of which one batch at a time is in memory.

    A classifier gets one shape an image, an embedding `VIEWS` views of each shape, and any other network several shapes
    an image, with masks for one that names the class of each pixel.
    """

    def __init__(self, name: str, spec: ImageSpec, limit: int | None, *, train: bool, boxes: bool) -> None:
        if spec.channels != 3 or spec.height != spec.width or spec.height < SMALLEST_DRAWN:
            raise InputError(
                f"data set '{name}' is of square color images from {SMALLEST_DRAWN} pixels on; the teacher takes "
                f"{spec.channels}x{spec.height}x{spec.width}."
            )
        self._seed = shapes.TRAIN_SEED if train else shapes.TEST_SEED
        count = shapes.TRAIN_IMAGES if train else shapes.TEST_IMAGES
        count = count if limit is None else min(count, max(limit, 1))
        self._kind: Truth = "boxes" if boxes else truth_of(spec)
        labels = np.arange(count) // VIEWS
        if self._kind == "labels":
            labels = shapes.labels(count, seed=self._seed)
        super().__init__(name, spec, labels, limit, labelled=self._kind != "values")
        if self._kind == "values":
            self._labels = np.full(count, UNKNOWN)

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.num_images, batch_size):
            yield self._drawn(start, min(batch_size, self.num_images - start))

    def _drawn(self, start: int, count: int) -> np.ndarray:
        size, seed = self._spec.height, self._seed
        if self._kind == "labels":
            return shapes.images(count, size=size, seed=seed, start=start)[0]
        if self._kind == "identities":
            first, end = start // VIEWS, -(-(start + count) // VIEWS)
            views = shapes.views(end - first, VIEWS, size=size, seed=seed, start=first)
            skipped = start - first * VIEWS
            return views.reshape(-1, *views.shape[2:])[skipped : skipped + count]
        return shapes.scenes(count, size=size, seed=seed, start=start).images

    def _truth(self, start: int, end: int) -> np.ndarray:
        if self._kind not in ("masks", "boxes"):
            return super()._truth(start, end)
        scenes = shapes.scenes(end - start, size=self._spec.height, seed=self._seed, start=start)
        if self._kind == "boxes":
            return np.concatenate([scenes.boxes, scenes.labels[..., None]], axis=2).astype(np.float32)
        return _masks(scenes.masks, self._spec, self.name, start)


class _Signals(DataSet):
    """Drawn heartbeats, of which one batch at a time is in memory."""

    def __init__(self, name: str, spec: ImageSpec, limit: int | None, *, train: bool) -> None:
        drawn = (shapes.LEADS, shapes.SAMPLES)
        if spec.shape != drawn:
            raise InputError(
                f"data set '{name}' is of signals {drawn[0]}x{drawn[1]}; the teacher takes {spec.shape_text}."
            )
        self._seed = shapes.TRAIN_SEED if train else shapes.TEST_SEED
        count = shapes.TRAIN_IMAGES if train else shapes.TEST_IMAGES
        count = count if limit is None else min(count, max(limit, 1))
        super().__init__(name, spec, shapes.signal_labels(count, seed=self._seed), limit)

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.num_images, batch_size):
            yield shapes.signals(min(batch_size, self.num_images - start), seed=self._seed, start=start)[0]


class _Npz(DataSet):
    """An npz file, of which one batch at a time is in memory, compressed or not."""

    def __init__(self, name: str, path: Path, spec: ImageSpec, limit: int | None, *, boxes: bool) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                _check_keys(name, archive, spec)
                with archive.open(f"{raw_key(spec)}.npy") as stream:
                    shape, self._type = _raw_header(name, stream, spec)
                truth: Truth = "boxes" if boxes else truth_of(spec)
                key = "labels" if truth == "identities" else truth
                labels, labelled = np.full(shape[:1], UNKNOWN), f"{key}.npy" in archive.namelist()
                if labelled:
                    labels = _read_small(name, archive, f"{key}.npy", shape, spec)
        except InputError:
            raise
        except ZIP_FAULTS as error:
            raise InputError(f"data set '{name}' is not a readable npz file: {error}") from error
        _check_truth(name, labels, shape, truth if labelled else "labels", spec)
        self._path = path
        super().__init__(name, spec, labels, limit, labelled=labelled)
        if spec.is_image:
            self._shape = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
            _check_array(name, self._shape, spec)
            self._note_crop(*self._shape[:2])
        else:
            self._shape = shape[1:] if len(shape) == 2 + spec.axes else (1, *shape[1:])
            if self._shape != spec.shape:
                raise InputError(
                    f"data set '{name}' has inputs of {'x'.join(map(str, self._shape))}; the teacher takes "
                    f"{spec.shape_text}."
                )

    def _read(self, stream: IO[bytes], start: int, count: int) -> np.ndarray:
        """Return the next `count` images, of the spec's size."""
        size = math.prod(self._shape) * self._type.itemsize
        data = stream.read(count * size)
        if len(data) < count * size:
            raise InputError(f"data set '{self.name}' ends within image {start + len(data) // size}.")
        raw = np.frombuffer(data, self._type).reshape(count, *self._shape)
        if self._spec.is_image:
            return np.ascontiguousarray(_fit_array(raw, self._spec))
        numbers = raw.astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(numbers).reshape(count, -1).all(1))
        if len(wrong):
            raise InputError(f"data set '{self.name}': input {start + wrong[0]} holds a value that is not finite.")
        return numbers

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        at_once = max(1, min(batch_size, BYTES_AT_ONCE // max(1, math.prod(self._shape) * self._type.itemsize)))
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(f"{raw_key(self._spec)}.npy") as stream:
                _raw_header(self.name, stream, self._spec)
                for start in range(0, self.num_images, batch_size):
                    end = min(start + batch_size, self.num_images)
                    parts = [
                        self._read(stream, first, min(at_once, end - first)) for first in range(start, end, at_once)
                    ]
                    yield parts[0] if len(parts) == 1 else np.concatenate(parts)
        except InputError:
            raise
        except ZIP_FAULTS as error:
            raise InputError(f"data set '{self.name}' cannot be read: {error}") from error


def _read_small(
    name: str, archive: zipfile.ZipFile, member: str, shape: tuple[int, ...], spec: ImageSpec
) -> np.ndarray:
    """Return what is true of images of this shape, which may not be larger than they, or than their outputs."""
    with archive.open(member) as stream:
        found, _, dtype = _header(stream)
    most = 8 * (math.prod(shape) + shape[0] * sum(output.size for output in spec.outputs) + 1)
    if math.prod(found) * max(1, dtype.itemsize) > most or dtype.hasobject:
        raise InputError(f"data set '{name}': {member} says that it holds {dtype} {list(found)}; that is no truth.")
    with archive.open(member) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and type of an array, of which nothing else is read."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    return tuple(shape), is_fortran, dtype


def _check_truth(name: str, found: np.ndarray, shape: tuple[int, ...], truth: Truth, spec: ImageSpec) -> None:
    """Check form and type of what an npz says of its images, whose array has this shape."""
    wanted, kinds, what = [*shape[:1]], "iu", "integers"
    if truth == "masks":
        wanted = [*shape[:3]] if spec.is_image else [*shape[:1], *spec.sides]
    elif truth == "boxes":
        wanted, kinds, what = [*shape[:1], *found.shape[1:2], BOX_VALUES], "fiu", "numbers"
    elif truth == "values":
        wanted, kinds, what = [*shape[:1], *spec.outputs[0].shape], "fiu", "numbers"
    if list(found.shape) != wanted or found.dtype.kind not in kinds:
        raise InputError(
            f"data set '{name}': {truth} are {found.dtype} {list(found.shape)}; {shape[0]} images need {what} {wanted}."
        )


class _Masked(DataSet):
    """Image files, each with a mask beside it."""

    def __init__(self, name: str, spec: ImageSpec, pairs: list[tuple[Path, Path]], limit: int | None) -> None:
        super().__init__(name, spec, np.zeros(len(pairs), np.int64), limit)
        self._pairs = pairs[:limit]

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.num_images, batch_size):
            chunk = self._pairs[start : min(start + batch_size, self.num_images)]
            yield np.stack([_read_image(image, self._spec) for image, _ in chunk])

    def _truth(self, start: int, end: int) -> np.ndarray:
        read = [_read_mask(mask, image, self._spec) for image, mask in self._pairs[start:end]]
        return _masks(np.stack(read), self._spec, self.name, start)


def _read_mask(path: Path, image: Path, spec: ImageSpec) -> np.ndarray:
    """Return a mask as uint8 [height, width] of the spec's size, resized as its image is, by the nearest value."""
    try:
        with open_image(image) as file:
            size = ImageOps.exif_transpose(file).size
        with open_image(path) as file:
            if file.mode not in ("L", "P", "1"):
                raise InputError(f"{path} has mode {file.mode}; a mask has one class a pixel, 0 to 255 (mode L or P).")
            mask = file if file.mode != "1" else file.convert("L").point(lambda value: value // 255)
            if mask.size != size:
                raise InputError(
                    f"{path} is {mask.height}x{mask.width}, its image {size[1]}x{size[0]}; both must be of one size."
                )
            if spec.resize is not None:
                mask = mask.resize(_shorter_side(mask.height, mask.width, spec.resize), Image.Resampling.NEAREST)
            found: np.ndarray = _cropped(np.asarray(mask, dtype=np.uint8)[None], spec)[0]
            return found
    except InputError:
        raise
    except READ_FAULTS as error:
        raise InputError(f"{path} is not a readable mask: {error}") from error


def _fit_masks(masks: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Bring masks [n, H, W] to the spec's height and width, as `_fit_array` brings images."""
    height, width = masks.shape[1:]
    if spec.resize is not None and (height, width) != (spec.height, spec.width) and min(height, width) != spec.resize:
        size = _shorter_side(height, width, spec.resize)
        small = [Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST) for mask in masks]
        masks = np.stack([np.asarray(mask) for mask in small])
    return _cropped(masks, spec)


def _pairs_in(path: Path, name: str) -> list[tuple[Path, Path]]:
    """Return each image of `images/` with the mask of its name in `masks/`.

    Raises:
        InputError: one has none.
    """
    images, _ = _images_in(path / "images")
    masks = {mask.stem: mask for mask in _images_in(path / "masks")[0]}
    alone = next((image for image in images if image.stem not in masks), None)
    if alone is not None:
        raise InputError(f"data set '{name}': images/{alone.name} has no mask masks/{alone.stem}.png.")
    return [(image, masks[image.stem]) for image in images]


class _Files(DataSet):
    """Image files, of which one batch at a time is in memory."""

    def __init__(
        self, name: str, spec: ImageSpec, files: list[Path], labels: list[int], limit: int | None, *, labelled: bool
    ) -> None:
        numbers = np.array(labels, dtype=np.int64)
        super().__init__(name, spec, numbers, limit, labelled=labelled)
        if spec.channels not in PILLOW_MODES:
            raise InputError(
                f"data set '{name}' holds image files, which have 1, 3 or 4 channels; the teacher takes "
                f"{spec.channels}. Give a .npz file."
            )
        self._files = files[:limit]
        with contextlib.suppress(*READ_FAULTS), open_image(files[0]) as first:  # damage is told when it is read
            upright = ImageOps.exif_transpose(first)
            self._note_crop(upright.height, upright.width)
            if first.has_transparency_data and spec.channels != CHANNELS_WITH_ALPHA:
                self.notices.append(f"images of data set '{name}' have transparency, which is left out")

    def _pixels(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.num_images, batch_size):
            chunk = self._files[start : min(start + batch_size, self.num_images)]
            yield np.stack([_read_image(path, self._spec) for path in chunk])


def open_dataset(
    name: str,
    spec: ImageSpec,
    *,
    limit: int | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    boxes: bool = False,
) -> DataSet:
    """Return the images that a name or path stands for.

    Image files are turned upright as their camera says, become grey or RGB, are resized to `spec.resize` (shorter
    side, bilinear with antialiasing) if that is set, and cropped to the centre. Arrays of exactly the teacher's size
    are taken as they are.

    Args:
        name: `digits` (test half), `digits:train` (training half), `shapes` and `shapes:train` (2,000 and 8,000 drawn
            images at the size that the teacher takes), `heartbeats` and `heartbeats:train` (as many drawn signals of 2
            channels and 256 samples), a `.npz` file with `images` uint8 [N, H, W, C] or [N, H, W], or `inputs`
            [N, C, ...] of signals and volumes, and perhaps `labels`, a folder with `metadata.csv` (`file_name,label`),
            a folder with one folder a class, whose sorted names stand for 0, 1, ... (in numeric order where all are
            numbers), or a folder of images, which have no labels then. A network that names a class at each place takes
            `masks` [N, H, W] beside `images`, or folders `images/` and `masks/` with files of the same names (255: left
            out); one that gives an embedding, labels or folders that say who is the same; one that gives values,
            `values` [N, ...].
        spec: what the teacher takes.
        limit: use the first so many images only.
        class_names: a file with the name of one class a line, in the network's order, or those names: which class a
            folder is.
        boxes: whether boxes are what is true of the images: `boxes` [N, M, 5] of an npz hold left, top, right and
            bottom in pixels and the class, below 0 where an image has fewer than M.

    Raises:
        InputError: there is no such set, it is empty or damaged, or its images or labels do not fit the teacher.
    """
    if name in ("digits", "digits:train"):
        images, labels = digits.split(train=name == "digits:train")
        return _Array(name, spec, images, labels, limit)
    if name in ("shapes", "shapes:train"):
        return _Drawn(name, spec, limit, train=name == "shapes:train", boxes=boxes)
    if name in ("heartbeats", "heartbeats:train"):
        return _Signals(name, spec, limit, train=name == "heartbeats:train")
    path = Path(name)
    if path.is_file() and path.suffix == ".npz":
        return _Npz(name, path, spec, limit, boxes=boxes)
    if path.is_dir():
        _check_folder(name, spec, boxes=boxes)
    if path.is_dir() and truth_of(spec) == "masks" and (path / "masks").is_dir() and (path / "images").is_dir():
        return _Masked(name, spec, _pairs_in(path, name), limit)
    if path.is_dir():
        if (path / "metadata.csv").is_file():
            files, numbers = _listed(path / "metadata.csv", name)
            notice = mapping = ""
        else:
            files, numbers, notice, mapping = _in_folders(path, name, spec, class_names)
        labelled = UNKNOWN not in numbers or (path / "metadata.csv").is_file()
        found = _Files(name, spec, files, numbers, limit, labelled=labelled)
        found.notices += [notice] if notice else []
        found.mapping = mapping
        return found
    if path.exists():
        raise InputError(f"data set '{name}' is of no known kind. Known: {KINDS}.")
    raise InputError(f"no such data set: '{name}'. Known: {KINDS}.")


def _check_folder(name: str, spec: ImageSpec, *, boxes: bool) -> None:
    """Refuse a folder where an npz alone can hold what is needed."""
    if boxes:
        raise InputError(f"data set '{name}' is a folder; give a .npz file with images and boxes [N, M, {BOX_VALUES}].")
    if not spec.is_image:
        raise InputError(
            f"data set '{name}' is a folder, and the teacher takes {spec.shape_text}; give a .npz file with inputs "
            f"{['N', *spec.shape]}."
        )


def _listed(table: Path, name: str) -> tuple[list[Path], list[int]]:
    """Return the files and labels of a metadata.csv."""
    files, labels = [], []
    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        try:
            columns = list(rows.fieldnames or [])
            if [columns.count(wanted) for wanted in ("file_name", "label")] != [1, 1]:
                raise InputError(
                    f"data set '{name}': metadata.csv has the columns {columns}; file_name,label are needed once each."
                )
            for row in rows:
                label = (row["label"] or "").strip()
                if not label.removeprefix("-").isdecimal() or len(label) > LABEL_DIGITS:
                    raise InputError(
                        f"data set '{name}': line {rows.line_num} of metadata.csv has the label '{label}'."
                    )
                try:
                    files.append(_below(table.parent, row["file_name"] or ""))
                except InputError as error:
                    raise InputError(f"data set '{name}': line {rows.line_num} of metadata.csv: {error}") from None
                labels.append(int(label))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data set '{name}': metadata.csv cannot be read: {error}") from error
    return files, labels


def _below(folder: Path, name: str) -> Path:
    """Return the file of a name below a folder: what came with a data set may not name others of this machine.

    Raises:
        InputError: there is none, or it lies elsewhere.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{name[:200]} is not below the folder of metadata.csv; put that above its images.")
    path = folder / name
    with contextlib.suppress(OSError):  # a name longer than file systems take
        if path.is_file():
            return path
    raise InputError(f"no such file: {name[:200]}")


def _in_folders(
    path: Path, name: str, spec: ImageSpec, class_names: str | Path | Sequence[str] | None
) -> tuple[list[Path], list[int], str, str]:
    """Return files and labels of a folder of class folders, or of images; what to say of them; and the mapping."""
    folders = [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        files, others = _images_in(path)
        if not files:
            raise InputError(
                f"data set '{name}' holds neither metadata.csv (file_name,label), nor one folder a class, nor images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})."
            )
        left = f"; {others} other files are left out" if others else ""
        return files, [UNKNOWN] * len(files), f"data set '{name}' has {len(files)} images and no labels{left}", ""
    if class_names is not None:
        names = class_list(class_names, spec.classes)
        source = class_names if isinstance(class_names, str | Path) else "the list of class names"
        unknown = sorted(folder.name for folder in folders if folder.name not in names)
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise InputError(f"data set '{name}' has a folder '{unknown[0]}', which {source} does not name.{hint}")
        twice = sorted(folder.name for folder in folders if names.count(folder.name) > 1)
        if twice:  # ImageNet has two cranes
            raise InputError(
                f"{source} has the name '{twice[0]}' for more than one class, and data set '{name}' has one folder of "
                "that name; a metadata.csv (file_name,label) tells which is meant."
            )
        numbers = {folder: names.index(folder.name) for folder in folders}
    else:
        if all(folder.name.isdecimal() for folder in folders):
            folders.sort(key=lambda folder: int(folder.name))
        else:
            folders.sort(key=lambda folder: folder.name)
        if len(folders) != spec.classes and truth_of(spec) == "labels":
            raise InputError(
                f"data set '{name}' has {len(folders)} class folders; the teacher knows {spec.classes} classes. Give "
                "one folder a class (an empty one counts), a metadata.csv, or the names of all classes "
                "(--class-names)."
            )
        numbers = {folder: label for label, folder in enumerate(folders)}
    files, labels = [], []
    for folder, label in sorted(numbers.items(), key=lambda item: item[1]):
        found, _ = _images_in(folder)
        files += found
        labels += [label] * len(found)
    mapping = _mapping(numbers)
    return files, labels, f"class folders of data set '{name}': {mapping}", mapping


def _images_in(folder: Path) -> tuple[list[Path], int]:
    """Return the images of a folder by name, and how many other files it holds; hidden ones do not count."""
    files = sorted(file for file in folder.iterdir() if not file.is_dir() and not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    return images, len(files) - len(images)


def _mapping(numbers: dict[Path, int]) -> str:
    """Return which class each folder is taken for."""
    pairs = [f"{folder.name}={label}" for folder, label in sorted(numbers.items(), key=lambda item: item[1])]
    if len(pairs) > SHOWN_CLASSES:
        pairs = [*pairs[: SHOWN_CLASSES // 2], "...", pairs[-1]]
    return ", ".join(pairs)


def class_list(names: str | Path | Sequence[str], classes: int) -> list[str]:
    """Return the names of classes, from a file (see `read_class_names`) or as they are.

    Raises:
        InputError: there are more or fewer than classes.
    """
    if isinstance(names, str | Path):
        return read_class_names(names, classes)
    if len(names) != classes:
        raise InputError(f"class_names has {len(names)} names; the teacher knows {classes} classes.")
    return list(names)


def read_class_names(path: str | Path, classes: int) -> list[str]:
    """Return the names of a file with one class a line, in the network's order.

    Raises:
        InputError: the file cannot be read, or names more or fewer classes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names of {path} cannot be read: {error}.") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != classes:
        raise InputError(f"{path} names {len(names)} classes, one a line; the teacher knows {classes}.")
    return names


def raw_key(spec: ImageSpec) -> str:
    """Return the name under which an npz holds what a network takes: pixels of images, or other numbers."""
    return "images" if spec.is_image else "inputs"


def _check_keys(name: str, archive: zipfile.ZipFile, spec: ImageSpec) -> None:
    keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
    if raw_key(spec) not in keys:
        raise InputError(f"data set '{name}' lacks {raw_key(spec)}; it holds: {', '.join(keys) or 'nothing'}.")


def _raw_header(name: str, stream: IO[bytes], spec: ImageSpec) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of what a network takes, return its shape and type; the stream then stands at the first value."""
    shape, is_fortran, dtype = _header(stream)
    key = raw_key(spec)
    fits = dtype == np.uint8 if spec.is_image else dtype.kind in "fiu"
    if not fits or len(shape) not in (1 + spec.axes, 2 + spec.axes):
        needed = f"numbers {['N', *spec.shape]} are"
        if spec.is_image:
            needed = "uint8 [N, height, width, channels] is"
        raise InputError(f"data set '{name}': {key} are {dtype} {list(shape)}; {needed} needed.")
    if is_fortran and len(shape) > 1:
        raise InputError(f"data set '{name}': {key} are stored column by column; save numpy.ascontiguousarray({key}).")
    pixels = math.prod(shape[1:3] if spec.is_image else shape[1:])
    if min(shape, default=0) < 0 or (MAX_PIXELS and pixels > MAX_PIXELS) or shape[0] > MOST_IMAGES:
        raise InputError(
            f"data set '{name}': {key} are {list(shape)}; up to {MOST_IMAGES:,} {key} of {MAX_PIXELS:,} "
            f"{'pixels' if spec.is_image else 'numbers'} are read."
        )
    return shape, dtype


def _check_array(name: str, shape: tuple[int, ...], spec: ImageSpec) -> None:
    height, width, channels = shape
    if channels != spec.channels:
        raise InputError(f"data set '{name}' has {channels}-channel images; the teacher takes {spec.channels}.")
    if spec.resize is None and (height < spec.height or width < spec.width):
        raise InputError(_too_small(f"data set '{name}' has images", height, width, spec))


def _fit_array(images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Bring uint8 [n, H, W, C] to the spec's height and width."""
    height, width = images.shape[1:3]
    if (height, width) == (spec.height, spec.width):
        return images
    if spec.resize is not None and min(height, width) != spec.resize:
        images = np.stack([_resized(image, spec.resize) for image in images])
    return _cropped(images, spec)


def _read_image(path: Path, spec: ImageSpec) -> np.ndarray:
    """Return an image file as uint8 [height, width, channels] of the spec's size."""
    try:
        with open_image(path) as file:
            if file.mode.startswith(("I", "F")):
                raise InputError(f"{path} has pixels of more than 8 bits (mode {file.mode}); save it with 8.")
            image = ImageOps.exif_transpose(file).convert(PILLOW_MODES[spec.channels])
    except InputError:
        raise
    except READ_FAULTS as error:
        raise InputError(f"{path} is not a readable image: {error}") from error
    if spec.resize is not None:
        image = image.resize(_shorter_side(image.height, image.width, spec.resize), Image.Resampling.BILINEAR)
    elif image.height < spec.height or image.width < spec.width:
        raise InputError(_too_small(f"{path} is", image.height, image.width, spec))
    pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, spec.channels)
    cropped: np.ndarray = _cropped(pixels[None], spec)[0]
    return cropped


def _resized(image: np.ndarray, resize: int) -> np.ndarray:
    """Resize uint8 [H, W, C] channel by channel, as Pillow does for RGB, for any number of channels."""
    size = _shorter_side(image.shape[0], image.shape[1], resize)
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _shorter_side(height: int, width: int, resize: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side at `resize`, the longer rounded down.

    >>> _shorter_side(300, 400, 256)
    (341, 256)
    """
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _cropped(images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    height, width = images.shape[1:3]
    if height < spec.height or width < spec.width:
        raise InputError(_too_small("images are, after resizing,", height, width, spec))
    top, left = round((height - spec.height) / 2), round((width - spec.width) / 2)
    return images[:, top : top + spec.height, left : left + spec.width]


def _too_small(what: str, height: int, width: int, spec: ImageSpec) -> str:
    return (
        f"{what} {height}x{width}; the teacher takes {spec.height}x{spec.width}. "
        f"Enlarge them with --resize {max(spec.height, spec.width)}."
    )

"""Data sets of networks that name a class at each place, give an embedding, or values."""

import numpy as np
import pytest
from PIL import Image

from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.types import ImageSpec, Output


def spec(*outputs: Output, classes: int = 0, resize: int | None = None) -> ImageSpec:
    return ImageSpec(
        channels=1, height=4, width=4, mean=(0.0,), std=(1.0,), classes=classes, outputs=outputs, resize=resize
    )


MASKED = spec(Output("logits", "classes", (3, 4, 4)), classes=3)
IMAGES = np.zeros((2, 4, 4, 1), np.uint8)
MASK = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3


def saved(path, **arrays) -> str:
    np.savez(path / "set.npz", **arrays)
    return str(path / "set.npz")


def folder(path, mask: Image.Image, name: str = "a.png") -> str:
    for part in ("images", "masks"):
        (path / part).mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path / "images" / "a.png")
    mask.save(path / "masks" / name)
    return str(path)


def test_masks_of_an_npz(tmp_path) -> None:
    masks = np.stack([MASK, np.full((4, 4), 255, np.uint8)])
    (batch,) = open_dataset(saved(tmp_path, images=IMAGES, masks=masks), MASKED).batches()
    assert batch.labels[0].tolist() == MASK.tolist()
    assert (batch.labels[1] == -1).all()
    assert not open_dataset(saved(tmp_path, images=IMAGES), MASKED).labelled


def test_masks_in_files_are_cropped_and_resized_as_their_images(tmp_path) -> None:
    large = np.zeros((8, 8), np.uint8)
    large[2:6, 2:6] = MASK
    place = folder(tmp_path, Image.fromarray(large))
    (cropped,) = open_dataset(place, MASKED).batches()
    assert cropped.labels[0].tolist() == MASK.tolist()
    (shrunk,) = open_dataset(place, spec(*MASKED.outputs, classes=3, resize=4)).batches()
    assert shrunk.labels[0].tolist() == large[1::2, 1::2].tolist()


@pytest.mark.parametrize(
    ("mask", "name", "text"),
    [
        (Image.fromarray(np.full((8, 8), 3, np.uint8)), "a.png", r"mask of image 0 has class 3 at \[0, 0\]"),
        (Image.fromarray(np.zeros((8, 6), np.uint8)), "a.png", "is 8x6, its image 8x8"),
        (Image.fromarray(np.zeros((8, 8, 3), np.uint8)), "a.png", "has mode RGB; a mask has one class a pixel"),
        (Image.fromarray(np.zeros((8, 8), np.uint8)), "b.png", r"images/a\.png has no mask masks/a\.png"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, mask, name, text) -> None:
    with pytest.raises(InputError, match=text):
        list(open_dataset(folder(tmp_path, mask, name), MASKED).batches())


def test_identities_may_be_any_number(tmp_path) -> None:
    way = spec(Output("embedding", "embedding", (8,)))
    (batch,) = open_dataset(saved(tmp_path, images=IMAGES, labels=np.array([7, 900])), way).batches()
    assert batch.labels.tolist() == [7, 900]


def test_values(tmp_path) -> None:
    values = spec(Output("values", "values", (2,)))
    (batch,) = open_dataset(saved(tmp_path, images=IMAGES, values=np.ones((2, 2), np.float32)), values).batches()
    assert batch.labels.tolist() == [[1.0, 1.0]] * 2
    with pytest.raises(InputError, match=r"values are float64 \[2\]; 2 images need numbers \[2, 2\]"):
        open_dataset(saved(tmp_path, images=IMAGES, values=np.ones(2)), values)

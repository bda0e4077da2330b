"""What a run's picture of samples shows, and what is kept beside it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from zsq.errors import InputError
from zsq.methods import METHODS
from zsq.models.teacher import Teacher, load_teacher
from zsq.reports.html import picture
from zsq.reports.pictures import images_in_rows
from zsq.runs.samples import SampleGrid, keep_samples
from zsq.training.loop import Run
from zsq.types import SampleSource


def source_of(teacher: Teacher, method: str = "noise") -> SampleSource:
    settings = {"steps": 1, "width": 8} if method == "zscgan" else {}
    return METHODS[method](**settings).fit(teacher, Run(seed=0)).source


def kept(teacher: Teacher, folder: Path, method: str = "noise") -> SampleGrid:
    keep_samples(source_of(teacher, method), teacher, folder)
    found = SampleGrid.read(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(("method", "rows"), [("zscgan", 10), ("noise", 5)])
def test_the_grid_says_what_the_network_sees_in_each_place(tmp_path: Path, method: str, rows: int) -> None:
    teacher = load_teacher("shapes_mobilenet")
    grid = kept(teacher, tmp_path, method)
    images, known = images_in_rows(source_of(teacher, method), teacher.spec)
    assert known.all()
    with torch.no_grad():
        answers = teacher.network(images).argmax(1).view(rows, 10)
    assert grid.seen == tuple(map(tuple, answers.tolist()))
    assert grid.labels == (tuple(range(10)) if method == "zscgan" else ())
    assert grid.names[grid.seen[0][0]] == teacher.class_names[grid.seen[0][0]]


def test_places_without_an_image_are_none(tmp_path: Path) -> None:
    class Sparse:
        """Gives one image, of class 3, and cannot be asked."""

        asks_labels = True

        def sample(self, count: int, batch_size: int = 100):
            yield from source_of(teacher).sample(1)

        def sample_labels(self, labels: torch.Tensor) -> None:
            return None

    teacher = load_teacher("digits")
    keep_samples(Sparse(), teacher, tmp_path)  # type: ignore[arg-type]
    grid = SampleGrid.read(tmp_path)
    assert grid is not None
    assert sum(seen is not None for row in grid.seen for seen in row) == 1
    assert grid.names == {}


def test_a_large_picture_takes_little_room_in_the_page(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (700, 700, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1_400_000
    assert len(picture(tmp_path / "large.png", "noise").source) < 800_000


@pytest.mark.parametrize(("model", "rows"), [("signals_net", 5), ("shapes_unet", 0), ("shapes_embedder", 0)])
def test_signals_maps_and_embeddings(tmp_path: Path, model: str, rows: int) -> None:
    grid = kept(load_teacher(model), tmp_path)
    assert not grid.labels
    assert len(grid.seen) == rows
    with Image.open(tmp_path / "samples.png") as image:
        assert image.height % grid.rows == image.width % grid.columns == 0


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    assert SampleGrid.read(tmp_path) is None
    for content in ({"rows": 1, "columns": 1, "labels": [0, 1]}, {"rows": 0, "columns": 1}, "no grid"):
        (tmp_path / "samples.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"samples\.json cannot be read; the classes of the samples are not shown"):
            SampleGrid.read(tmp_path)

import hashlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zsq.data import shapes
from zsq.data.bundled import trained
from zsq.data.datasets import open_dataset
from zsq.data.shapes import detection, outlines, train
from zsq.data.shapes.stream import Stream, wave
from zsq.errors import InputError
from zsq.evaluation.accuracy import evaluate
from zsq.models.teacher import load_teacher
from zsq.types import ImageSpec


def digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def test_every_machine_draws_the_same() -> None:
    assert digest(*shapes.images(40, seed=3)) == "185f3b8958191dcd"
    assert digest(*shapes.images(10, size=64, seed=3)) == "0c71228f88fca8ab"
    assert digest(*shapes.scenes(20, seed=3)) == "eb17d3e37264ed1d"
    assert digest(*shapes.pairs(20, seed=3)) == "fdfdd9c225a63f19"
    assert digest(shapes.views(4, 3, seed=3)) == "f4eae5534f03db8d"
    assert digest(*shapes.signals(40, seed=3)) == "ebfddcf891134326"


def test_an_example_depends_on_seed_and_index_alone() -> None:
    for draw in (shapes.images, shapes.scenes, shapes.pairs, shapes.signals):
        whole, part = draw(6, seed=5), draw(2, seed=5, start=3)
        for all_of_it, some in zip(whole, part, strict=True):
            np.testing.assert_array_equal(all_of_it[3:5], some)
        assert not np.array_equal(whole[0], draw(6, seed=6)[0])
    np.testing.assert_array_equal(shapes.views(3, 2, seed=5)[1:], shapes.views(2, 2, seed=5, start=1))


def test_streams_of_kinds_seeds_and_indices_differ() -> None:
    first = [Stream(*key).uniform(3).tolist() for key in ((0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 1, 3), (0, 1, 2))]
    assert first[0] == first[4]
    assert len({tuple(row) for row in first}) == 4


def test_waves_and_bells() -> None:
    turns = np.linspace(-3, 3, 1001)
    assert np.abs(wave(turns) - np.sin(2 * np.pi * turns)).max() < 2e-4
    drawn = Stream(0, 0, 0).bell(100_000)
    assert abs(drawn.mean()) < 0.01
    assert drawn.std() == pytest.approx(1, abs=0.01)


AREAS = {
    "circle": math.pi * 0.81,
    "square": 1.56**2,
    "triangle": 3 * math.sqrt(3) * 0.52**2,
    "hexagon": 2 * math.sqrt(3) * 0.82**2,
    "star": 5 * 1.05 * 0.45 * math.sin(math.pi / 5),
    "cross": 4 * 0.95 * 0.6 - 0.6**2,
    "ring": math.pi * (0.92**2 - 0.48**2),
    "heart": 1.6**2 * (math.pi / 8 + 0.5),
}


@pytest.mark.parametrize("name", AREAS)
def test_areas_of_outlines(name: str) -> None:
    x, y = np.meshgrid(*[(np.arange(800) + 0.5) / 800 * 2.4 - 1.2] * 2)
    assert (outlines.OUTLINES[name](x, y) < 0).mean() * 2.4**2 == pytest.approx(AREAS[name], rel=5e-3)


@pytest.mark.parametrize("name", outlines.OUTLINES)
def test_distances_rise_by_one_a_unit_at_the_outline(name: str) -> None:
    x, y = np.meshgrid(*[(np.arange(400) + 0.5) / 400 * 2.6 - 1.3] * 2)
    distance = outlines.OUTLINES[name](x, y)
    steep = np.hypot(*np.gradient(distance, 2.6 / 400))[np.abs(distance) < 0.03]
    assert np.median(steep) == pytest.approx(1, abs=0.02)
    assert -0.96 <= distance.min() < -0.2
    assert distance[0].min() > 0.05  # nothing reaches the edge


def test_labels_are_those_of_the_images() -> None:
    _, labels = shapes.images(30, seed=4, start=9)
    np.testing.assert_array_equal(shapes.labels(30, seed=4, start=9), labels)
    counts = np.bincount(shapes.labels(2000, seed=4), minlength=10)
    assert counts.min() > 150


def test_masks_boxes_and_labels_of_scenes_agree() -> None:
    drawn = shapes.scenes(60, seed=8)
    assert drawn.images.shape == (60, 64, 64, 3)
    assert drawn.masks.shape == (60, 64, 64)
    assert {int(number) for number in (drawn.labels >= 0).sum(1)} == {1, 2, 3, 4}
    for mask, boxes, labels in zip(drawn.masks, drawn.boxes, drawn.labels, strict=True):
        rest = mask.copy()
        for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
            if label < 0:
                assert (left, top, right, bottom) == (0, 0, 0, 0)
                continue
            inside = mask[top:bottom, left:right] == 1 + label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            rest[top:bottom, left:right] = 0
        assert not rest.any()  # no pixel of a shape is outside of the boxes


def test_a_mask_is_where_the_shape_is_painted() -> None:
    """Inside and outside of a mask, colours differ, on average: some shapes are like the ground."""
    drawn = shapes.scenes(60, seed=8)
    inside = [image[mask > 0].mean(0) for image, mask in zip(drawn.images, drawn.masks, strict=True)]
    outside = [image[mask == 0].mean(0) for image, mask in zip(drawn.images, drawn.masks, strict=True)]
    assert np.abs(np.array(inside) - np.array(outside)).mean() > 30


def test_pairs_show_one_shape_or_two() -> None:
    drawn = shapes.pairs(200, seed=8)
    assert drawn.same.mean() == pytest.approx(0.5, abs=0.1)
    assert not (drawn.first == drawn.second).all((1, 2, 3)).any()


def test_heartbeats_look_like_their_classes() -> None:
    drawn, labels = shapes.signals(400, seed=9)
    assert np.bincount(labels, minlength=8).min() > 25
    peaks = {
        name: np.mean([_beats(drawn[row, 0]) for row in np.flatnonzero(labels == label)])
        for label, name in enumerate(shapes.SIGNAL_CLASSES)
    }
    assert peaks["slow"] < 4 < peaks["skipped"] < peaks["normal"] < 6 < peaks["fast"]


def _beats(lead: np.ndarray) -> int:
    """Return the peaks above 0.6 of the highest."""
    high = lead > 0.6 * lead.max()
    return int((high[1:] & ~high[:-1]).sum() + high[0])


def test_maps_are_read_back_as_the_boxes() -> None:
    drawn = shapes.scenes(40, seed=8)
    found = []
    for boxes, labels in zip(drawn.boxes, drawn.labels, strict=True):
        heat, size, offset = detection.maps(boxes, labels, 10, 16, 4)
        logits = np.where(heat == 1, 6.0, 20 * heat - 24).astype(np.float32)[None]
        (rows,) = shapes.decode(logits, size[None], offset[None])
        found.append(rows)
        want = np.column_stack([boxes, labels])[labels >= 0]
        got = rows[:, [0, 1, 2, 3, 5]]
        assert sorted(map(tuple, got.round(3).tolist())) == sorted(map(tuple, want.tolist()))
    assert shapes.average_precision(found, drawn.boxes, drawn.labels) == pytest.approx(1)


def test_equal_neighbours_are_one_box() -> None:
    heat, others = np.full((1, 10, 16, 16), -9, np.float32), np.ones((1, 2, 16, 16), np.float32)
    for row, column in ((5, 5), (5, 6), (6, 4)):
        heat[0, 3, row, column] = 2
    (rows,) = shapes.decode(heat, others, 0 * others)
    assert rows[:, :4].tolist() == [[18, 18, 22, 22]]


def test_average_precision_in_closed_form() -> None:
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 30, 30]]], np.float32)
    labels = np.array([[3, 3]])
    right, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    rows = np.array([[*right, 0.9, 3], [*wrong, 0.8, 3], [20, 20, 30, 26, 0.7, 3], [*right, 0.6, 3]], np.float32)
    # recall 1/2 at precision 1, recall 1 at precision 2/3; the box found twice counts against it and changes nothing
    assert shapes.average_precision([rows], boxes, labels) == pytest.approx(1 / 2 + 1 / 3)
    assert shapes.average_precision([rows[:2]], boxes, labels) == pytest.approx(1 / 2)
    assert shapes.average_precision([rows[:0]], boxes, labels) == 0


FLOORS = {
    "shapes_mobilenet": {"top-1": 0.85},
    "shapes_unet": {"mean IoU": 0.6, "pixels": 0.9},
    "shapes_embedder": {"verification": 0.8},
    "shapes_detector": {"AP at 0.5": 0.5},
    "signals_net": {"top-1": 0.85},
}


@pytest.mark.parametrize("name", FLOORS)
def test_bundled_weights_reach_a_floor(name: str) -> None:
    bundled = shapes.NETWORKS[name]
    assert bundled.weights.stat().st_size < 400_000
    found = train.score(
        name, trained(bundled.build, bundled.weights), 250 if name.endswith(("unet", "detector")) else 500
    )
    assert found.keys() == FLOORS[name].keys()
    for measure, value in found.items():
        assert FLOORS[name][measure] < value < 1, measure


def test_spec_holds_the_pixels_statistics() -> None:
    pixels = shapes.images(1000, seed=shapes.TRAIN_SEED)[0] / 255
    assert shapes.MEAN[0] == pytest.approx(pixels.mean(), abs=2e-3)
    assert shapes.STD[0] == pytest.approx(pixels.std(), abs=2e-3)


def test_data_sets_are_named_shapes() -> None:
    teacher = load_teacher("shapes_mobilenet")
    data = open_dataset("shapes", teacher.spec, limit=300)
    found = evaluate(teacher.network, data)
    assert found.num_images == 300
    assert found.top1_correct / 300 == train.score("shapes_mobilenet", teacher.network, 300)["top-1"]
    assert open_dataset("shapes", teacher.spec).num_images == shapes.TEST_IMAGES
    batches = [open_dataset(name, teacher.spec, limit=5).batches(2) for name in ("shapes", "shapes:train")]
    test, training = (torch.cat([batch.images for batch in each]) for each in batches)
    assert test.shape == training.shape == (5, 3, 32, 32)
    assert not torch.equal(test, training)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 32, 32), (3, 32, 48), (3, 8, 8)])
def test_shapes_are_square_and_in_colour(channels: int, height: int, width: int) -> None:
    spec = ImageSpec(
        channels=channels, height=height, width=width, classes=10, mean=(0.0,) * channels, std=(1.0,) * channels
    )
    with pytest.raises(InputError, match=f"from 16 pixels on; the teacher takes {channels}x{height}x{width}"):
        open_dataset("shapes", spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_training_writes_the_same_weights_twice(name: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train, "TEST_EXAMPLES", 20)
    for file in ("a.safetensors", "b.safetensors"):
        train.main([name, str(tmp_path / file), "--examples", "64", "--epochs", "1"])
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    shown = capsys.readouterr().out
    assert all(f"{measure}: " in shown for measure in FLOORS[name])

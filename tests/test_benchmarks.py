import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import choices
import growth
import memory
import parts
import step
import timing
import torch

CPU = torch.device("cpu")
TINY = growth.Grid(
    sides=(8, 16),
    batches=(2, 4),
    classes=(3, 10),
    side_batch=2,
    batch=2,
    steps=1,
    generators=(("light", 4), ("unet", 4)),
    against="digits",
)


def only_line(folder: Path, name: str) -> dict:
    (line,) = (folder / f"{name}.jsonl").read_text().splitlines()
    return json.loads(line)


def test_ratio_is_taken_round_by_round() -> None:
    """The middle of 3/2, 10/5 and 30/10; the ratio of the medians would be 10/5 from other rounds' sums."""
    times = {"whole": [3.0, 30.0, 10.0], "a": [1.0, 4.0, 1.0], "b": [1.0, 6.0, 4.0]}
    assert timing.ratio(times, "whole", ["a", "b"]) == 2.0
    assert timing.ratio({"whole": [1.0, 9.0, 8.0], "a": [1.0, 3.0, 16.0]}, "whole", ["a"]) == 1.0


def test_actions_are_taken_in_turn() -> None:
    calls: list[str] = []
    times = timing.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2, CPU, warm_up=1)
    assert calls == list("ababab")
    assert [len(values) for values in times.values()] == [2, 2]


def test_kept_bytes_count_each_storage_once_and_the_largest_again() -> None:
    weight = torch.ones(10, requires_grad=True)

    def step() -> None:
        y = (weight * 2).exp()  # kept: its result
        (y.view(2, 5) * y.view(2, 5).detach()[:, :1].clone()).sum().backward()  # y again, and the clone

    assert memory.kept_bytes(step, [weight]) == 4 * (10 + 2) + 4 * 10


def test_exponent() -> None:
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth.exponent([10, 100, 1000], [5, 5, 5]) == pytest.approx(0)


@pytest.mark.slow
def test_step_writes_its_record(tmp_path) -> None:
    given = ["--network", "digits", "--batch", "4", "--steps", "1", "--small", "--device", "cpu"]
    record = step.main([*given, "--results", str(tmp_path)])
    assert record == only_line(tmp_path, "step")
    assert set(record["ratios"]) == set(record["within"]) == set(step.BARS)
    assert all(ratio > 0 for ratio in record["ratios"].values())
    assert {*step.PARTS, "zscgan", "distillation", "float"} < set(record["milliseconds"])
    assert record["shape"] == [4, 1, 8, 8]
    assert set(record["choices"]) == set(choices.CHOICES)
    assert {"date", "torch", "machine", "device", "threads"} < set(record)
    assert record["gflop_per_second"] > 0


@pytest.mark.slow
def test_parts_refuse_another_batch() -> None:
    """A source whose batch differs from what its parts would be given is not timed."""
    teacher = parts.random_teacher("digits", CPU)
    source = parts.source_of(teacher, 4, CPU)
    images = parts.one_batch(source).images
    source.batch_size = 3
    with pytest.raises(AssertionError):
        parts.check_same(source, images, torch.zeros(4, 10), [])


@pytest.mark.slow
def test_growth_writes_its_record(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "PICTURE", tmp_path / "growth.png")
    given = ["--device", "cpu", "--plot", "--axes", "pixels", "generators", "--results", str(tmp_path)]
    record = growth.main(given, TINY)
    assert record == only_line(tmp_path, "growth")
    found = record["axes"]["pixels"]
    assert found["x"] == [64, 256]
    for name in growth.STEPS:
        assert len(found[name]["milliseconds"]) == len(found[name]["ns_per_pixel"]) == 2
        assert math.isfinite(found[name]["exponent"])
    assert set(record["generators"]["over_teacher"]) == {"light 4", "unet 4"}
    assert (tmp_path / "growth.png").stat().st_size < 100_000


def test_each_axis_varies_one_thing() -> None:
    for name, points in growth.FULL.axes().items():
        kinds = [{getattr(point, key) for point in points.values()} for key in ("side", "batch", "depth", "classes")]
        assert sorted(map(len, kinds)) == [1, 1, 1, len(points)], name
    assert growth.Point(batch=2, depth=8, side=8, classes=7).teacher(CPU).spec.classes == 7


def test_plot_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(growth.MissingExtraError, match=r"zsq\[plots\]"):
        growth.plot({}, tmp_path / "growth.png")

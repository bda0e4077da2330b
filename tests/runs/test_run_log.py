"""The log for other tools."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import zsq
from zsq.errors import MissingExtraError
from zsq.runs.folder import clear_folder
from zsq.runs.run_log import open_log
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

SPEC = ImageSpec(channels=1, height=4, width=6, classes=3, mean=(0.5,), std=(0.5,))


class Brightening:
    """A learner whose loss is the step and whose samples grow brighter; no class can be asked for."""

    asks_labels = True

    def __init__(self, stop_at: int | None = None) -> None:
        self.done, self.stop_at = torch.zeros(1), stop_at

    def step(self, step: int) -> dict[str, Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.done += 1
        return {"loss": self.done.clone()[0]}

    def rates(self) -> dict[str, float]:
        return {"learning_rate": 0.5 / float(self.done)}

    def sample_labels(self, labels: Tensor) -> None:
        del labels

    def sample(self, count: int, batch_size: int = 100) -> Iterator[Batch]:
        del count, batch_size
        yield Batch((self.done / 20 - 1).expand(15, 1, 4, 6), torch.arange(15) % 3)

    def state_dict(self) -> dict[str, Tensor]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.done = state["done"]

    def halve(self) -> bool:
        return False


def train(folder: Path, kind: str, stop_at: int | None = None) -> None:
    learner = Brightening(stop_at)
    run = Run(folder, checkpoint_steps=8, log=open_log(kind, folder, SPEC))
    run.train("fit", learner, 40, shown=learner)


def told(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl, the phase left out."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "phase"} for line in lines]


@pytest.mark.slow
def test_csv_holds_the_rows_of_the_metrics_also_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "csv", stop_at=37)  # 32 steps are kept
    train(tmp_path, "csv")
    with (tmp_path / "log" / "fit" / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == told(tmp_path)
    assert rows[-1] == {"step": 40, "loss": 40, "learning_rate": 0.0125}
    pictures = sorted((tmp_path / "log" / "samples").iterdir())
    assert [path.stem for path in pictures] == [f"fit-{step:06}" for step in (8, 16, 24, 32, 40)]
    with Image.open(pictures[-1]) as last:
        assert last.getpixel((1, 1)) == (255, 255, 255)
    with Image.open(pictures[0]) as first:
        assert first.size == (5 * 74, 3 * 50)
        assert first.getpixel((1, 1)) == (51, 51, 51)
    (tmp_path / "log" / "mine.txt").touch()
    clear_folder(tmp_path, everything=True)
    assert [path.name for path in (tmp_path / "log").rglob("*") if path.is_file()] == ["mine.txt"]


@pytest.mark.slow
def test_tensorboard_reads_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "tensorboard", stop_at=37)
    train(tmp_path, "tensorboard")
    read = EventAccumulator(str(tmp_path / "log" / "fit"), size_guidance={"images": 0}).Reload()
    for name in ("loss", "learning_rate"):
        values = [(event.step, pytest.approx(event.value)) for event in read.Scalars(name)]
        assert values == [(row["step"], row[name]) for row in told(tmp_path)]
    assert [event.step for event in read.Images("samples")] == [8, 16, 24, 32, 40]


def test_a_log_that_cannot_be_written_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsq.runs.run_log.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zsq\[tensorboard\]'"):
        zsq.quantize(nn.Linear(2, 2), SPEC, out=tmp_path / "run", log="tensorboard")
    with pytest.raises(MissingExtraError):
        zsq.compare("recipe.toml", out=tmp_path / "run", log="tensorboard")
    assert not (tmp_path / "run").exists()

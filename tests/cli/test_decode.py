"""Boxes: read by a function of the user's, compared with those of a data set."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from zsq.cli.main import main
from zsq.data import shapes
from zsq.runs.origin import completed
from zsq.runs.record import Record
from zsq.runs.request import QuantizeRequest

DECODER = "zsq.data.shapes:decode"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    drawn = shapes.scenes(40, size=64, seed=5)
    path = tmp_path_factory.mktemp("boxes") / "scenes.npz"
    boxes = np.concatenate([drawn.boxes, drawn.labels[..., None]], axis=2)
    np.savez(path, images=drawn.images, boxes=boxes)
    return path


def measured(capsys, *arguments: str) -> dict:
    main(["evaluate", "shapes_detector", "--json", *arguments])
    (found,) = json.loads(capsys.readouterr().out).values()
    return {measure["name"]: measure["value"] for measure in found["truths"]}


@pytest.mark.slow
def test_average_precision_of_the_bundled_detector(capsys, scenes, tmp_path) -> None:
    found = measured(capsys, "--data", str(scenes), "--decode", DECODER)
    assert 0.6 < found["AP50"] < 0.95
    (tmp_path / "half.py").write_text(
        "from zsq.data import shapes\n\n"
        "def decode(heat, size, offset):\n"
        "    return [boxes[::2] for boxes in shapes.decode(heat, size, offset)]\n"
    )
    half = measured(capsys, "--data", str(scenes), "--decode", f"{tmp_path / 'half.py'}:decode")
    assert half["AP50"] < 0.7 * found["AP50"]


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """A folder with images of which every other one holds a box, and a decoder that reads it from all."""
    monkeypatch.chdir(tmp_path)
    boxes = np.full((24, 1, 5), -1.0, np.float32)
    boxes[::2] = (2, 2, 10, 12, 0)
    images = np.random.default_rng(3).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez("boxes.npz", images=images, boxes=boxes)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\n"
        "from tests.heads import NETWORKS\n\n"
        "detector = NETWORKS['detector']\n\n"
        "def decode(heat, size):\n"
        "    return [np.array([[2, 2, 10, 12, maps.max(), 0]]) for maps in heat]\n"
    )
    return "own.py:detector", "--input", "3x16x16", "--outputs", "heat=values,size=values", "--data", "boxes.npz"


@pytest.mark.slow
def test_boxes_at_the_end_of_a_run(capsys, halves) -> None:
    quick = ["--method", "noise", "--set", "quantizer.num_samples=16", "--quiet"]
    main(["quantize", *halves, "--decode", "own.py:decode", *quick, "--out", "run"])
    assert re.search(r"quantized AP50: +0\.\d{4} on 24 images of boxes.npz", capsys.readouterr().out)
    found = Record.read(Path("run")).evaluation
    (measure,) = found["quantized"].truths
    assert measure.name == "AP50"
    assert 0.2 < measure.value < 0.8  # a box in each image, right in one half of them
    assert [m.name for m in found["float"].truths] == ["AP50"]
    assert "AP50" in Path("run/report.html").read_text()
    main(["evaluate", "run/model.onnx", "--data", "boxes.npz", "--decode", "own.py:decode", "--json"])
    assert json.loads(capsys.readouterr().out)["model.onnx"]["truths"] == [asdict(measure)]
    assert completed(QuantizeRequest(resume=True, out="run")).decode == "own.py:decode"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), "return 1 / 0", "the decoder fails on 8 images: ZeroDivisionError: division by zero"),
        ((), "return [heat[0]]", "the decoder gives 1 arrays ((4, 8, 8)) for 8 images; one [boxes, 6] an image"),
        (("--data", "plain.npz"), "return []", "'plain.npz' has no boxes, with which those that own.py:decode reads"),
    ],
)
def test_a_decoder_that_fails_before_the_fit(capsys, halves, arguments, code, text) -> None:
    np.savez("plain.npz", images=np.zeros((3, 16, 16, 3), np.uint8))
    own = Path("own.py")
    own.write_text(own.read_text().partition("def decode")[0] + f"def decode(heat, size):\n    {code}\n")
    with pytest.raises(SystemExit):
        main(["quantize", *halves, *arguments, "--decode", "own.py:decode", "--out", "run"])
    assert text in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("decode", "--decode is 'decode'; FILE.py:FUNCTION or MODULE:FUNCTION is expected."),
        ("zsq.data.shapes:decod", "Unknown function of zsq.data.shapes 'decod'. Did you mean 'decode'?"),
        ("none.py:decode", "no such file: none.py"),
    ],
)
def test_a_decoder_that_is_none(capsys, scenes, decoder, text) -> None:
    with pytest.raises(SystemExit):
        measured(capsys, "--data", str(scenes), "--decode", decoder)
    assert text in capsys.readouterr().err


def test_data_without_boxes(capsys, tmp_path) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 64, 64, 3), np.uint8), boxes=np.zeros((3, 4)))
    with pytest.raises(SystemExit):
        measured(capsys, "--data", str(tmp_path / "set.npz"), "--decode", DECODER)
    assert "boxes are float64 [3, 4]; 3 images need numbers [3, 4, 5]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("shapes_embedder", "verification accuracy"), ("shapes_unet", "mean IoU")])
def test_other_outputs_on_drawn_data(capsys, monkeypatch, model, name) -> None:
    monkeypatch.setattr(shapes, "TEST_IMAGES", 80)
    main(["evaluate", model, "--json", "--data", "shapes"])
    (found,) = json.loads(capsys.readouterr().out).values()
    assert next(m["value"] for m in found["truths"] if m["name"] == name) > 0.7

"""Boxes: read by a function of the user's, compared with those of a data set."""

import json

import numpy as np
import pytest

from zsq.cli.main import main
from zsq.data import shapes

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


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("return 1 / 0", "the decoder fails on 40 images: ZeroDivisionError: division by zero"),
        ("return [heat[0]]", "the decoder gives 1 arrays ((10, 16, 16)) for 40 images; one [boxes, 6] an image"),
    ],
)
def test_a_decoder_that_fails(capsys, scenes, tmp_path, code, text) -> None:
    (tmp_path / "own.py").write_text(f"def decode(heat, size, offset):\n    {code}\n")
    with pytest.raises(SystemExit):
        measured(capsys, "--data", str(scenes), "--decode", f"{tmp_path / 'own.py'}:decode")
    assert text in capsys.readouterr().err


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

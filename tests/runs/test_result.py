"""What Python and notebooks have of a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import zsq
from zsq.runs import pipeline
from zsq.runs.losses import Losses

pytestmark = pytest.mark.slow  # most share one run of some seconds

SETTINGS = {"method.steps": 3, "method.batch_size": 16, "quantizer.num_samples": 64}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> zsq.Result:
    folder = tmp_path_factory.mktemp("result") / "run"
    return zsq.quantize("digits", out=folder, settings=SETTINGS, data="digits", quiet=True)


def test_the_text_is_the_summary(result) -> None:
    lines = str(result).splitlines()
    assert lines[0].startswith("network:                 digits (weights: bundled")
    images = result.record.num_eval_images
    assert f"float top-1:             {result.record.float_top1:.2f} % of {images} images of digits" in lines
    assert lines[-1] == f"folder:                  {result.folder}"


def test_a_notebook_shows_a_table_in_which_names_are_no_markup(result) -> None:
    named = replace(result, record=replace(result.record, model="<b>net</b>"))
    shown = named._repr_html_()
    assert shown.count("<tr>") == len(str(result).splitlines())
    assert "&lt;b&gt;net&lt;/b&gt;" in shown
    assert "<b>" not in shown


def test_samples_are_the_picture(result) -> None:
    with Image.open(result.folder / "samples.png") as picture:
        assert result.samples.tobytes() == picture.tobytes()
    assert replace(result, folder=result.folder / "nowhere").samples is None


def test_losses_are_those_of_the_metrics(result) -> None:
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    phase = lines[0].pop("phase")
    first = lines[0].pop("step")
    assert {name: points[0] for name, points in result.losses[phase].items()} == {
        name: (first, value) for name, value in lines[0].items()
    }
    assert result.losses._repr_png_().startswith(b"\x89PNG")
    assert str(result.losses).startswith(f"{phase}: step ")


def test_damaged_lines_of_losses_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "fit", "step": 1, "bns": 2.5}\nnot json\n{"phase": "fit"}\n')
    assert dict(Losses(tmp_path)) == {"fit": {"bns": [(1, 2.5)]}}
    assert str(Losses(tmp_path / "nowhere")) == "no losses"
    assert Losses(tmp_path / "nowhere")._repr_png_().startswith(b"\x89PNG")


def test_a_report_that_is_missing_is_made_again(result) -> None:
    path = result.report()
    assert path == result.folder / "report.html"
    path.unlink()
    assert result.report().read_text().startswith("<!doctype html>")
    path.write_text("kept")
    assert result.report().read_text() == "kept"


def test_an_interrupt_says_how_the_run_continues(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit", interrupted)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as raised:
        zsq.quantize("digits", out=out, settings=SETTINGS, quiet=True)
    assert str(raised.value) == f"Stopped; zsq.quantize(out={str(out)!r}, resume=True) continues."
    assert raised.value._render_traceback_() == [str(raised.value)]  # what IPython shows
    monkeypatch.undo()
    assert zsq.quantize(out=out, resume=True, quiet=True).record.model == "digits"


def test_an_interrupt_before_anything_is_kept_promises_nothing(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zsq.runs.request.load", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped before quantize had anything to keep\."):
        zsq.quantize("digits", out=tmp_path / "run", settings=SETTINGS, quiet=True)

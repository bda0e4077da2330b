"""Comparisons: cells, lines, shared fits, resume, tables and claims; most with a stand-in for what follows the fit."""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zsq.cli import main
from zsq.comparison import cell as cell_module
from zsq.comparison.compare import compare, estimate, list_cells
from zsq.comparison.grid import _Clock
from zsq.comparison.layout import Layout
from zsq.comparison.lines import read_lines
from zsq.comparison.recipe import cells, read_recipe
from zsq.comparison.report import write_comparison_report
from zsq.comparison.result import Comparison
from zsq.comparison.statistics import Outcomes
from zsq.comparison.submit import last_words, share_out, visible_gpus
from zsq.comparison.tables import costs_table, differences_table, gaps_table, main_table
from zsq.errors import ExportError, InputError
from zsq.evaluation.accuracy import Evaluation
from zsq.export.verify import Verification
from zsq.methods import METHODS, Surrogate
from zsq.models.teacher import Teacher, load, load_teacher
from zsq.reports.text_tables import EMPTY
from zsq.runs.fitted import FittedRun
from zsq.runs.job import Job
from zsq.runs.pipeline import Result, Stopwatch
from zsq.runs.quantize import quantize
from zsq.runs.record import Artifact, Record
from zsq.runs.stages import fit

RECIPE = """
title = "Small grid"
seeds = [0, 1]
[[teachers]]
model = "digits"
data = "digits"
real = "digits:train"
[[methods]]
name = "zscgan"
title = "ZS-CGAN"
steps = 4
batch_size = 8
width = 8
[[methods]]
name = "noise"
[[methods]]
name = "real"
[[quantizers]]
name = "ptq"
bits = ["8", "4"]
num_samples = 32
[[quantizers]]
name = "qat"
bits = ["4"]
num_samples = 32
steps = 2
[[claims]]
label = "DF-QAT above DF-PTQ"
above = "zscgan/qat"
below = "zscgan/ptq"
[[claims]]
label = "DF above noise"
above = "zscgan/ptq"
below = "noise/ptq"
[[claims]]
label = "noise not worse than real by more than 60"
above = "noise/qat"
below = "real/qat"
margin = 60
"""

RIGHT = {  # images recognised, of 400, by method, quantizer and seed
    ("zscgan", "ptq", 0): 320,
    ("zscgan", "ptq", 1): 340,
    ("zscgan", "qat", 0): 380,
    ("zscgan", "qat", 1): 380,
    ("noise", "ptq", 0): 200,
    ("noise", "ptq", 1): 200,
    ("noise", "qat", 0): 380,
    ("noise", "qat", 1): 380,
    ("real", "ptq", 0): 360,
    ("real", "ptq", 1): 360,
    ("real", "qat", 0): 380,
    ("real", "qat", 1): 380,
}


CHECK = Verification(
    num_images=10,
    num_decided=10,
    agreement_literal=100.0,
    agreement_optimized=100.0,
    decided_agreement=100.0,
    max_logit_difference_steps=0.0,
    decided_self_agreement=100.0,
    decided_agreement_optimized=99.5,
)


class Ran:
    """What was really done: fits by method, and cells."""

    def __init__(self) -> None:
        self.fits: list[str] = []
        self.cells: list[str] = []
        self.first_weights: list[float] = []
        self.stop_before: str | None = None
        self.fail: str | None = None


@pytest.fixture(scope="module")
def digits() -> Teacher:
    return load_teacher("digits")


@contextlib.contextmanager
def known_figures(digits: Teacher) -> Iterator[Ran]:
    """Replace what follows the fit by a record with known figures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield replaced(monkeypatch, digits)


@pytest.fixture
def ran(digits) -> Iterator[Ran]:
    with known_figures(digits) as seen:
        yield seen


def replaced(monkeypatch: pytest.MonkeyPatch, digits: Teacher) -> Ran:
    seen = Ran()
    monkeypatch.setattr(
        "zsq.comparison.recipe.load", lambda network: digits if network.model == "digits" else load(network)
    )

    def counted_fit(job: Job) -> Surrogate:
        if job.fitted is None:
            seen.fits.append(f"{job.settings.method.name}/{job.run.seed}")
        return fit(job)

    def figures(job: Job, surrogate: Surrogate, recognition: float | None, watch: Stopwatch) -> Result:
        del watch
        method, quantizer, seed = job.settings.method.name, job.settings.quantizer, job.run.seed
        name = f"{method}/{quantizer.name}-{quantizer.bits}/{seed}"
        if name == seen.stop_before:
            raise KeyboardInterrupt
        if name == seen.fail:
            raise ExportError("the file disagrees\nwith the simulation")
        seen.cells.append(name)
        if method == "zscgan":
            weight = next(iter(surrogate.source.state_dict().values()))
            seen.first_weights.append(float(weight.flatten()[0]))
            surrogate.source.batch(0, None)  # as distillation does: the generator goes on learning
        right = RIGHT[method, quantizer.name, seed]
        labels = np.zeros(400, np.int32)
        predictions = (np.arange(400) >= right).astype(np.int32)
        floats = (np.arange(400) >= 394).astype(np.int32)
        np.savez(job.folder / "predictions.npz", predictions=predictions, labels=labels, float_predictions=floats)
        record = Record(
            model="digits",
            weights="bundled",
            weights_sha256=job.teacher.weights_sha256,
            method=method,
            data_free=method != "real",
            quantizer=quantizer.name,
            bits=quantizer.bits,
            activation_scope="all",
            range_rule="minmax",
            seed=seed,
            verification=CHECK,
            num_eval_images=400,
            evaluation={
                "float": Evaluation(num_images=400, top1_correct=394, top5_correct=400),
                "quantized": Evaluation(num_images=400, top1_correct=right, top5_correct=400),
            },
            artifacts={"model.onnx": Artifact(bytes=2048, sha256="0" * 64)},
            label_recognition=recognition,
            num_calibration_images=32,
            seconds=2.0 + seed,
        )
        return Result(record, job.folder)

    monkeypatch.setattr("zsq.comparison.cell.fit", counted_fit)
    monkeypatch.setattr("zsq.comparison.cell.finish", figures)
    return seen


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def grid(digits, tmp_path_factory) -> tuple[Comparison, Ran, Path]:
    """The whole recipe: the comparison, what it did, and its folder."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.toml").write_text(RECIPE)
    with known_figures(digits) as seen:
        return compare(folder / "grid.toml", out=folder / "out"), seen, folder / "out"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "cells.jsonl").read_text().splitlines()]


def test_every_cell_has_a_line_and_every_fit_is_made_once(grid):
    done, ran, folder = grid
    lines = lines_of(folder)
    assert len(lines) == len(done.lines) == len(ran.cells) == 18
    assert [line["cell"] for line in lines[:3]] == [
        "digits/zscgan/ptq-8/seed0",
        "digits/zscgan/ptq-4/seed0",
        "digits/zscgan/qat-4/seed0",
    ]
    assert {line["status"] for line in lines} == {"finished"}
    assert lines[0].keys() >= {"seconds", "fit_seconds", "num_calibration_images", "score", "digest"}
    assert sorted(ran.fits) == sorted(f"{name}/{seed}" for name in ("zscgan", "noise", "real") for seed in (0, 1))


def test_every_cell_starts_from_the_fitted_generator(ran, recipe, tmp_path):
    compare(recipe, out=tmp_path / "out", only="*/zscgan/*/seed0")
    assert len(ran.first_weights) == 3
    assert len(set(ran.first_weights)) == 1
    settings = (tmp_path / "out" / "fits" / "digits" / "zscgan" / "seed0" / "settings.toml").read_text()
    assert 'name = "qat"' in settings  # whose two steps the schedule spans, also for ptq
    assert (tmp_path / "out" / "fits" / "digits" / "zscgan" / "seed0" / "samples.png").exists()


def test_a_fit_serves_other_runs_by_from(ran, recipe, tmp_path):
    compare(recipe, out=tmp_path / "out", only="*/zscgan/ptq-8/seed1")
    found = FittedRun.open(tmp_path / "out" / "fits" / "digits" / "zscgan" / "seed1", load_teacher("digits"))
    assert found.method.steps == 4


@pytest.mark.slow
def test_a_stopped_comparison_continues_with_the_missing_cells(ran, recipe, tmp_path):
    ran.stop_before = "zscgan/qat-4/0"
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, out=tmp_path / "out")
    assert [line["cell"] for line in lines_of(tmp_path / "out")] == [
        "digits/zscgan/ptq-8/seed0",
        "digits/zscgan/ptq-4/seed0",
    ]
    assert "16 of 18 cells have not been run" in (tmp_path / "out" / "table.md").read_text()
    with open(tmp_path / "out" / "cells.jsonl", "a") as file:
        file.write('{"cell": "digits/zscgan/qat-4/seed0", "sta')  # a kill in the middle of a line
    ran.stop_before = None
    ran.cells.clear()
    done = compare(recipe, out=tmp_path / "out", resume=True)
    assert len(ran.cells) == 16
    assert len(done.lines) == 18
    assert ran.fits.count("zscgan/0") == 1
    assert len(read_lines(Layout(tmp_path / "out").lines)) == 18
    ran.cells.clear()
    compare(recipe, out=tmp_path / "out", resume=True)
    assert ran.cells == []


@pytest.mark.slow
def test_cells_whose_files_are_damaged_are_run_again_and_said(ran, recipe, tmp_path, said, digits, monkeypatch):
    out, only = tmp_path / "out", "*/zscgan/*/seed0"
    first, second, third = [line.cell for line in compare(recipe, out=out, only=only).lines.values()]
    lines = out / "cells.jsonl"
    lines.write_text(lines.read_text().replace('"num_eval_images": 400', '"num_eval_images": 500', 1))
    predictions, fitted = out / "cells" / second / "predictions.npz", next(out.glob("fits/**/fit.json"))
    predictions.write_bytes(predictions.read_bytes()[:-40])
    fitted.write_text(fitted.read_text().replace("seconds", "minutes"))
    ran.cells.clear()
    compare(recipe, out=out, only=only, resume=True)
    assert [f"digits/{name.rpartition('/')[0]}/seed0" for name in ran.cells] == [first, second]
    told = "\n".join(said)
    assert f"1 lines of {lines} are damaged or cut short; their cells are run again" in told
    assert re.search(f"{predictions} is damaged: .* The cell is run again", told)
    assert f"{fitted} is damaged. {fitted.parent} is fitted anew" in told

    changed = replace(digits, graph_sha256="0" * 64)
    monkeypatch.setattr("zsq.comparison.recipe.load", lambda network: changed)
    compare(recipe, out=out, only=f"*{third}", resume=True)
    assert len(ran.cells) == 3
    assert sum(f"{third} is of 'digits' as it was before its definition changed" in line for line in said) == 1


@pytest.mark.slow
def test_cells_are_run_again_only_where_the_recipe_changed_them(ran, recipe, tmp_path):
    compare(recipe, out=tmp_path / "out")
    ran.cells.clear()
    recipe.write_text(
        RECIPE.replace('title = "ZS-CGAN"', 'title = "ours"').replace('bits = ["8", "4"]', 'bits = ["4"]')
    )
    assert len(compare(recipe, out=tmp_path / "out", resume=True).lines) == 12
    assert ran.cells == []
    recipe.write_text(RECIPE.replace("num_samples = 32\nsteps = 2", "num_samples = 31\nsteps = 2"))
    compare(recipe, out=tmp_path / "out", resume=True)
    assert sorted(ran.cells) == sorted(f"{m}/qat-4/{s}" for m in ("zscgan", "noise", "real") for s in (0, 1))
    ran.cells.clear()
    recipe.write_text(RECIPE.replace("steps = 4", "steps = 3"))
    compare(recipe, out=tmp_path / "out", resume=True, only="*/seed0")
    assert sorted(ran.cells) == [
        *("noise/qat-4/0", "real/qat-4/0"),  # of which the latest line has 31 images
        *("zscgan/ptq-4/0", "zscgan/ptq-8/0", "zscgan/qat-4/0"),
    ]


def test_a_folder_that_holds_another_comparison(ran, recipe, tmp_path):
    compare(recipe, out=tmp_path / "out", only="*/noise/ptq-8/seed0")
    before = (tmp_path / "out" / "cells.jsonl").read_bytes()
    with pytest.raises(
        InputError, match="holds another comparison; resume=True continues it, overwrite=True discards it"
    ):
        compare(recipe, out=tmp_path / "out")
    with pytest.raises(InputError, match="give one of them"):
        compare(recipe, out=tmp_path / "out", resume=True, overwrite=True)
    with pytest.raises(InputError, match="out takes a folder"):
        compare(recipe, out=recipe)
    recipe.write_text(RECIPE.replace('real = "digits:train"', 'real = "nowhere"'))
    with pytest.raises(InputError, match="no such data set: 'nowhere'"):
        compare(recipe, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "cells.jsonl").read_bytes() == before  # finished cells are kept
    recipe.write_text(RECIPE)
    compare(recipe, out=tmp_path / "out", overwrite=True, only="*/noise/ptq-4/seed0")
    assert list(read_lines(Layout(tmp_path / "out").lines)) == ["digits/noise/ptq-4/seed0"]


def test_all_that_a_comparison_writes_is_known_to_its_layout(ran, recipe, tmp_path):
    recipe.write_text(RECIPE + "[figure]\n")
    compare(recipe, out=tmp_path / "out", only="*/zscgan/*/seed0")
    (tmp_path / "out" / "notes.txt").touch()
    layout = Layout(tmp_path / "out")
    layout.discard()
    assert {path.name for path in layout.folder.iterdir()} == {"recipe.toml", "notes.txt"}


def test_real_images_of_other_classes_are_found_before_the_first_cell(ran, recipe, tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([3, 10]))
    recipe.write_text(RECIPE.replace("digits:train", "other.npz"))
    with pytest.raises(InputError, match=r"label 10 of image 1 is outside 0\.\.9"):
        compare(recipe, out=tmp_path / "out", data_root=tmp_path)
    assert ran.cells == []
    assert not (tmp_path / "out").exists()


def test_names_of_weights_are_checked_before_the_first_cell(ran, recipe, tmp_path):
    recipe.write_text(RECIPE.replace("steps = 2\n", "steps = 2\nweight_bits = {nope = 4}\n"))
    with pytest.raises(InputError, match="Unknown weight 'nope'"):
        compare(recipe, out=tmp_path / "out")
    assert ran.cells == []


def test_only_picks_cells_by_name(ran, recipe, tmp_path):
    assert len(list_cells(read_recipe(recipe), "digits/*/qat-4/*")) == 6
    compare(recipe, out=tmp_path / "out", only="digits/*/qat-4/seed1")
    assert sorted(ran.cells) == ["noise/qat-4/1", "real/qat-4/1", "zscgan/qat-4/1"]
    with pytest.raises(InputError, match=r"only 'x\*' matches none of 18 cells, which have names such as digits/"):
        compare(recipe, out=tmp_path / "out", only="x*", resume=True)


def test_a_pair_that_does_not_work_is_skipped_with_its_reason(ran, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["noise"], "quantizers", ("ptq",))
    done = compare(recipe, out=tmp_path / "out", only="*/noise/*/seed0")
    line = done.lines["digits/noise/qat-4/seed0"]
    assert line.status == "skipped"
    assert "it works with: ptq" in line.reason
    assert ran.cells == ["noise/ptq-8/0", "noise/ptq-4/0"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"- `digits/noise/qat-4/seed0`: {line.reason}" in text
    assert "noise DF-QAT" not in text


PLAIN = """
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
"""


def test_a_method_that_needs_what_the_teacher_lacks_is_skipped_and_the_rest_goes_on(ran, recipe, tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    teacher = 'model = "plain.py:plain"\ninput = [1, 8, 8]\nclasses = 10\n'
    recipe.write_text(RECIPE.replace('model = "digits"\n', teacher))
    done = compare(recipe, out=tmp_path / "out", only="*/ptq-8/seed0", data_root=tmp_path)
    assert {name: line.status for name, line in done.lines.items()} == {
        "plain/zscgan/ptq-8/seed0": "skipped",
        "plain/noise/ptq-8/seed0": "finished",
        "plain/real/ptq-8/seed0": "finished",
    }
    assert "has no batch norm" in done.lines["plain/zscgan/ptq-8/seed0"].reason


def test_a_cell_that_fails_is_skipped_and_tried_again_on_resume(ran, recipe, tmp_path):
    ran.fail = "noise/ptq-4/0"
    done = compare(recipe, out=tmp_path / "out", only="*/noise/ptq-*/seed0")
    assert done.lines["digits/noise/ptq-4/seed0"].reason == "the file disagrees with the simulation"
    assert ran.cells == ["noise/ptq-8/0"]
    ran.fail = None
    done = compare(recipe, out=tmp_path / "out", only="*/noise/ptq-*/seed0", resume=True)
    assert ran.cells == ["noise/ptq-8/0", "noise/ptq-4/0"]
    assert {line.status for line in done.lines.values()} == {"finished"}


def test_a_cell_without_room_in_memory_is_skipped_and_the_rest_goes_on(ran, recipe, tmp_path, monkeypatch):
    finish = cell_module.finish

    def full(job: Job, *rest: Any) -> Result:
        if job.settings.method.name == "noise":
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")
        return finish(job, *rest)

    monkeypatch.setattr(cell_module, "finish", full)
    done = compare(recipe, out=tmp_path / "out", only="*/ptq-8/seed0")
    assert "too little memory" in done.lines["digits/noise/ptq-8/seed0"].reason
    assert ran.cells == ["zscgan/ptq-8/0", "real/ptq-8/0"]


# Tables


@pytest.fixture
def outcomes(grid) -> Outcomes:
    return grid[0].outcomes


def test_the_table_in_columns(outcomes, grid):
    folder = grid[2]
    table = main_table(outcomes)
    heads = ["ZS-CGAN DF-PTQ", "ZS-CGAN DF-QAT", "noise DF-PTQ", "noise DF-QAT", "real DD-PTQ", "real DD-QAT"]
    assert list(table.header) == ["network", "bits", "float", *heads]
    eight, four = table.rows
    # seeds 80 and 85 %: mean 82.5, deviation 5 / sqrt 2 = 3.54 (2.50 with n in the denominator)
    assert [entry.text for entry in four] == [
        *("digits", "INT4", "98.50", "82.50 ± 3.54", "95.00 ± 0.00"),
        *("50.00 ± 0.00", "95.00 ± 0.00", "90.00 ± 0.00", "95.00 ± 0.00"),
    ]
    bold = [head for head, entry in zip(heads, four[3:], strict=True) if entry.bold]
    assert bold == ["ZS-CGAN DF-QAT", "noise DF-QAT"]  # as good in print; real images are not data-free
    assert [entry.bold for entry in eight[3:]] == [True, False, False, False, False, False]
    text = (folder / "table.md").read_text()
    assert "| digits | INT4 | 98.50 | 82.50 ± 3.54 | **95.00 ± 0.00** |" in text
    assert "\\textbf{95.00 $\\pm$ 0.00}" in (folder / "table.tex").read_text()
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert rows[0]["ZS-CGAN DF-QAT"] == ""
    assert rows[1]["ZS-CGAN DF-PTQ"] == "82.50 ± 3.54"


@pytest.mark.slow
def test_the_table_in_rows(ran, recipe, tmp_path):
    recipe.write_text('layout = "rows"\n' + RECIPE.replace("seeds = [0, 1]", "seeds = [1]"))
    table = main_table(compare(recipe, out=tmp_path / "out").outcomes)
    assert list(table.header) == ["data", "weights", "activations", "digits"]
    rows = [[entry.text for entry in row] for row in table.rows]
    assert rows[0] == ["pretrained", "FL32", "FL32", "98.50"]
    assert ["ZS-CGAN DF-PTQ", "INT4", "INT4", "85.00"] in rows
    assert len(rows) == 1 + 2 * 6


def test_claims_by_paired_intervals(outcomes):
    found = {(v.claim.label, v.bits): v for v in outcomes.verdicts()}
    assert set(found) == {
        ("DF-QAT above DF-PTQ", "4"),
        ("DF above noise", "8"),
        ("DF above noise", "4"),
        ("noise not worse than real by more than 60", "4"),
    }
    first = found["DF-QAT above DF-PTQ", "4"]
    # of 400 images: 320 right always, 20 with one seed more, 40 with both: d = 0, 1/2, 1 and 20 never
    d = np.array([0.0] * 320 + [0.5] * 20 + [1.0] * 40 + [0.0] * 20 + [1, -1])  # the last two keep it honest
    middle, reach = 100 * d.mean(), 1.959964 * 100 * d.std() / 402**0.5
    assert first.difference.mean == pytest.approx(12.5)
    assert first.difference.high == pytest.approx(middle + reach, rel=1e-5)
    assert (first.word, first.num_seeds) == ("holds", 2)
    last = found["noise not worse than real by more than 60", "4"]
    assert (last.difference.mean, last.word) == (0, "holds")


@pytest.mark.slow
def test_a_claim_without_doubt_either_way_is_open_and_the_opposite_is_contradicted(ran, recipe, tmp_path):
    text = RECIPE.partition("[[claims]]")[0]
    text += '[[claims]]\nabove = "noise/qat"\nbelow = "real/qat"\n[[claims]]\nabove = "noise/ptq"\nbelow = "real/ptq"\n'
    recipe.write_text(text)
    done = compare(recipe, out=tmp_path / "out")
    assert [(v.bits, v.word) for v in done.outcomes.verdicts()] == [
        ("4", "open"),
        ("8", "contradicted"),
        ("4", "contradicted"),
    ]
    claims = done.as_dict()["claims"]
    assert claims[1]["difference"] == pytest.approx(-40)
    assert claims[1]["interval"][0] < -40 < claims[1]["interval"][1] < 0
    assert "| noise/ptq above real/ptq | digits | INT8 |" in (tmp_path / "out" / "table.md").read_text()


def test_the_share_of_the_gap_is_shown_only_where_there_is_a_gap(outcomes):
    table = gaps_table(outcomes)
    assert list(table.header) == ["network", "quantizer", "bits", "real minus noise (95 %)", "ZS-CGAN"]
    rows = {(row[1].text, row[2].text): [entry.text for entry in row[3:]] for row in table.rows}
    assert rows["ptq", "INT4"][1] == "81 %"  # (82.5 - 50) / (90 - 50)
    assert rows["qat", "INT4"] == ["+0.00 (-0.69 to +0.69)", "no gap"]  # on 400 images


def test_differences_are_of_the_same_images(outcomes):
    table = differences_table(outcomes)
    assert list(table.header[4:]) == ["top-1 %", "minus float", "minus ZS-CGAN", "minus noise", "minus real"]
    rows = {tuple(entry.text for entry in row[1:4]): [entry.text for entry in row[5:]] for row in table.rows}
    found = rows["INT4", "noise", "ptq"]
    assert [text.split()[0] for text in found] == ["-48.50", "-32.50", "-", "-40.00"]  # float 98.5, 82.5, 50 and 90
    group = outcomes.groups["digits", "noise", "ptq", "4"]
    assert found[0] == f"-48.50 ({group.minus_float.low:+.2f} to {group.minus_float.high:+.2f})"


def test_costs_stand_beside_accuracy(outcomes, grid):
    rows = {row[0].text: [entry.text for entry in row] for row in costs_table(outcomes).rows}
    assert rows["digits/zscgan/ptq-4"][3:5] == ["2.5", "32"]
    assert rows["digits/zscgan/ptq-4"][6] == "2"
    figures = list(csv.DictReader(io.StringIO((grid[2] / "figures.csv").read_text())))
    assert len(figures) == 9
    assert figures[1]["mean"] == "82.5000"
    assert figures[1]["cell_seconds"] == "2.50"
    assert float(figures[1]["fit_seconds"]) > 0
    assert figures[1]["calibration_images"] == "32"


def test_figures_show_samples_with_the_names_of_their_classes(ran, recipe, tmp_path):
    text = RECIPE.partition("[[quantizers]]")[0].replace("seeds = [0, 1]", "") + "[figure]\nshow = [3, 7]\nrows = 2\n"
    recipe.write_text(text)
    done = compare(recipe, out=tmp_path / "out")
    assert [line.outcome.figure for line in done.lines.values()] == [
        f"figures/digits-{name}-seed0.png" for name in ("zscgan", "noise", "real")
    ]
    for line in done.lines.values():
        with Image.open(tmp_path / "out" / line.outcome.figure) as picture:
            assert picture.size == (2 * 116 + 4, 20 + 2 * 116 + 4)
    assert ran.cells == []
    assert "![digits/zscgan/figure/seed0](figures/digits-zscgan-seed0.png)" in (tmp_path / "out/table.md").read_text()
    assert "<h2>digits: samples of ZS-CGAN</h2>" in (tmp_path / "out/report.html").read_text()
    assert not (tmp_path / "out" / "table.csv").exists()


# The command line


def zsq(*arguments: object) -> None:
    main.main([str(argument) for argument in arguments])


def test_a_dry_run_lists_the_cells_and_writes_nothing(recipe, tmp_path, capsys):
    zsq("compare", recipe, "--out", tmp_path / "out", "--dry-run", "--only", "*/qat-4/seed1")
    *cells, counted = capsys.readouterr().out.splitlines()
    assert cells == [f"digits/{name}/qat-4/seed1" for name in ("zscgan", "noise", "real")]
    assert re.fullmatch(r"3 of 3 cells, 3 fits that they share, about \d:\d\d and \d\.\d MB", counted)
    assert not (tmp_path / "out").exists()


def test_a_shared_fit_counts_once_in_the_time_left(recipe, monkeypatch):
    now = 0.0
    monkeypatch.setattr("zsq.comparison.grid.time.monotonic", lambda: now)
    grid = [cell for cell in cells(read_recipe(recipe)) if cell.method.name == "zscgan"]
    fits = len({cell.fit_name for cell in grid})
    clock = _Clock(grid)
    now = 100.0 + 3.0  # a fit of 100 s, and a cell of 3
    clock.add(100.0)
    assert clock.left(1) == pytest.approx(100 * (fits - 1) + 3 * (len(grid) - 1))


def test_progress_goes_to_stderr_and_json_to_stdout(ran, recipe, tmp_path, capsys):
    zsq("compare", recipe, "--out", tmp_path / "out", "--only", "*/noise/ptq-*/seed0", "--json")
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert [line["cell"] for line in record["cells"]] == ["digits/noise/ptq-8/seed0", "digits/noise/ptq-4/seed0"]
    assert "== cell 1 of 2: digits/noise/ptq-8/seed0\n" in err
    assert re.search(r"== cell 2 of 2: digits/noise/ptq-4/seed0, about \d+ s left\n", err)


def test_a_mistake_in_a_recipe_is_one_line(recipe, tmp_path, capsys):
    recipe.write_text(RECIPE.replace("[[quantizers]]", "[[quantisers]]"))
    with pytest.raises(SystemExit):
        zsq("compare", recipe, "--out", tmp_path / "out")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "grid.toml: Unknown recipe key 'quantisers'. Did you mean 'quantizers'?" in err


# The real thing


@pytest.mark.slow
def test_a_small_grid_of_verified_files(recipe, tmp_path):
    recipe.write_text(RECIPE.replace('bits = ["8", "4"]', 'bits = ["4"]').replace("seeds = [0, 1]", "seeds = [0]"))
    done: Comparison = compare(recipe, out=tmp_path / "out", only="*/zscgan/*", log="csv")
    assert {line.status for line in done.lines.values()} == {"finished"}
    folder = tmp_path / "out" / "cells" / "digits" / "zscgan" / "qat-4" / "seed0"
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "predictions.npz", "report.html", "result.json", "settings.toml", "metrics.jsonl", "log")
    }
    assert (folder / "log" / "distill" / "metrics.csv").read_text().startswith("agreement,bns,")
    line = done.lines["digits/zscgan/qat-4/seed0"].outcome
    record = json.loads((folder / "result.json").read_text())
    assert record["artifacts"].keys() == {"model.onnx"}
    assert record["verification"]["num_decided"] >= 100
    assert line.score == record["quantized_top1"]
    with np.load(folder / "predictions.npz") as arrays:
        hits = arrays["predictions"] == arrays["labels"]
    assert 100 * hits.mean() == pytest.approx(line.score)
    assert line.float_score > 95
    fitted = tmp_path / "out" / "fits" / "digits" / "zscgan" / "seed0"
    assert (fitted / "log" / "fit" / "metrics.csv").exists()
    alone = quantize(
        load_teacher("digits"),
        out=tmp_path / "alone",
        from_run=fitted,
        settings=("quantizer.num_samples=32",),
        bits=4,
        data="digits",
    )
    same = done.lines["digits/zscgan/ptq-4/seed0"].outcome
    assert alone.record.quantized_top1 == same.score
    assert alone.record.teacher_agreement == same.teacher_agreement


HEADS = """
title = "Other outputs"
[[teachers]]
model = "own.py:segmenter"
input = [1, 16, 16]
classes = 3
data = "masks.npz"
measure = "mean IoU"
[[teachers]]
model = "own.py:detector"
input = [3, 16, 16]
outputs = "heat=values,size=values"
data = "plain.npz"
[[methods]]
name = "noise"
[[quantizers]]
name = "ptq"
bits = ["8", "3"]
num_samples = 16
"""


@pytest.fixture
def heads(tmp_path, monkeypatch) -> Path:
    """A recipe of networks that do not name one class an image, in the current folder."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez("masks.npz", images=images[..., 0], masks=random.integers(0, 3, (24, 16, 16), dtype=np.uint8))
    np.savez("plain.npz", images=images)
    Path("own.py").write_text(
        "from tests.heads import NETWORKS\n\nsegmenter, detector = NETWORKS['segmenter'], NETWORKS['detector']\n"
    )
    Path("heads.toml").write_text(HEADS)
    return Path("heads.toml")


@pytest.mark.slow
def test_networks_of_other_outputs(heads):
    done = compare(heads, out="out", quiet=True)
    found = {name.removesuffix("/seed0"): line.outcome for name, line in done.lines.items()}
    for bits in ("8", "3"):
        dense, boxes = found[f"segmenter/noise/ptq-{bits}"], found[f"detector/noise/ptq-{bits}"]
        record = Record.read(Path("out", "cells", "segmenter", "noise", f"ptq-{bits}", "seed0"))
        truths = {m.name: 100 * m.value for m in record.evaluation["quantized"].truths}
        assert (dense.measure, dense.score, dense.interval) == ("mean IoU", truths["mean IoU"], None)
        assert (boxes.measure, boxes.float_score, boxes.score) == ("agreement", 100.0, boxes.teacher_agreement)
        assert boxes.interval[0] < boxes.score < boxes.interval[1]
    eight, three = (done.outcomes.groups["detector", "noise", "ptq", bits] for bits in ("8", "3"))
    assert eight.mean > three.mean + 5
    assert 100 * eight.scores[0].mean() == pytest.approx(eight.mean)
    assert not done.outcomes.groups["segmenter", "noise", "ptq", "8"].scores
    text = Path("out/table.md").read_text()
    assert f"| detector (agreement) | INT8 | 100.00 | **{eight.mean:.2f}** |" in text
    assert "Each network's measure, in parentheses, of the quantized files in percent" in text
    differences = differences_table(done.outcomes)
    assert differences.header[4:] == ("score %", "minus float")
    lost = [(row[0].text, row[5].text.split()[0]) for row in differences.rows]
    assert lost[:2] == [("segmenter (mean IoU)", EMPTY)] * 2
    assert lost[2:] == [("detector (agreement)", f"{each.mean - 100:+.2f}") for each in (eight, three)]
    page = Path("out/report.html").read_text()
    assert f"best without data noise, ptq: agreement {eight.mean:.2f} % (95 % interval" in page
    assert Path("out/figures.csv").read_text().splitlines()[1].startswith("segmenter,noise,ptq,8,true,1,mean IoU,")
    again = compare(heads, out="out", resume=True, quiet=True)
    assert [line.to_json() for line in again.lines.values()] == [line.to_json() for line in done.lines.values()]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"mean IoU"', '"mean iou"', "Unknown measure of teacher 'segmenter' on masks.npz 'mean iou'. Did you mean"),
        ('"plain.npz"', '"plain.npz"\nmeasure = "R2"', "'R2'. Known: agreement."),
        ('"heat=values,size=values"', '"heat=value"', "outputs is 'heat=value'; a kind is expected"),
        (
            "[[methods]]",
            '[[claims]]\nabove = "noise/ptq"\nbelow = "noise/ptq"\n[[methods]]',
            "mean IoU of teacher 'segmenter' is one figure of all images; its measure = \"pixel accuracy\" or ",
        ),
        ("[[methods]]", "[figure]\n[[methods]]", "'own.py:segmenter' does not name one an image"),
    ],
)
def test_what_other_outputs_cannot_be_asked(heads, old, new, text):
    heads.write_text(HEADS.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(text)):
        compare(heads, out="out", quiet=True)
    assert not Path("out").exists()


@pytest.mark.slow
def test_rows_without_a_finished_cell_are_left_out(ran, recipe, tmp_path):
    compare(recipe, out=tmp_path / "out", only="*/ptq-8/*")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert [row["bits"] for row in rows] == ["INT8"]


def test_jobs_divide_the_cells_and_keep_fits_together(recipe: Path, tmp_path: Path) -> None:
    grid = cells(read_recipe(recipe))
    shares = share_out(grid, 2)
    assert sorted(cell.name for share in shares for cell in share) == sorted(cell.name for cell in grid)
    fits = [{cell.fit_name for cell in share} for share in shares]
    assert not fits[0] & fits[1]
    assert abs(len(shares[0]) - len(shares[1])) <= 3  # a fit's cells
    assert len(share_out(grid, 100)) == len({cell.fit_name for cell in grid})


@pytest.mark.slow
def test_two_jobs_run_the_cells_of_a_comparison(recipe: Path, tmp_path: Path, said: list[str]) -> None:
    pytest.importorskip("submitit")
    done = compare(recipe, out=tmp_path / "out", only="*/ptq-8/seed0", jobs=2)
    assert {line.cell for line in done.lines.values()} == {
        f"digits/{method}/ptq-8/seed0" for method in ("zscgan", "noise", "real")
    }
    assert all(line.status == "finished" for line in done.lines.values())
    assert any("3 cells in 2 jobs on local" in text for text in said)
    assert "98." in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_without_the_engine_the_cells_run_in_order(
    ran: Ran, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said
) -> None:
    monkeypatch.setattr("zsq.comparison.compare.available", lambda: False)
    compare(recipe, out=tmp_path / "out", only="*/noise/ptq-8/seed0", jobs=3)
    assert said[0] == "submitit is not installed (pip install 'zsq[cluster]'): the cells run in order"
    assert len(read_lines(Layout(tmp_path / "out").lines)) == 1


def test_wrong_jobs_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="jobs is 0; it must be at least 1"):
        compare(recipe, out=tmp_path / "out", jobs=0)
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="job_options"):
        compare(recipe, out=tmp_path / "out", jobs=2, job_options={"colour": 3}, only="*/noise/*")


def test_a_cell_that_failed_is_told_by_the_exit_code(ran, recipe, tmp_path, capsys):
    ran.fail = "noise/ptq-4/0"
    arguments = ["compare", str(recipe), "--only", "*/noise/ptq-4/*", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "Small grid" in out
    assert err.splitlines()[-1] == (
        "Error: 1 of 2 cells failed, such as digits/noise/ptq-4/seed0: the file disagrees with the "
        "simulation. --resume tries them again."
    )
    ran.fail = None
    main.main([*arguments, "--resume"])


def test_a_dry_run_checks_networks_and_data(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace('data = "digits"', 'data = "gone.npz"'))
    found = estimate(recipe, "*/qat-4/*")
    assert len(found.lacking) == len(found.cells) == 6
    assert found.reasons[0].startswith("6 cells lack something: no such data set: 'gone.npz'")
    assert (found.fits, found.seconds, found.bytes) == (set(), 0.0, 0)
    weights = 'model = "digits"\nweights = "gone.pth"\nsource = "package x holds them"\n'
    recipe.write_text(recipe.read_text().replace('model = "digits"\n', weights))
    (reason,) = estimate(recipe, "*/qat-4/*").reasons
    assert reason == "6 cells lack something: no such weights file: gone.pth; package x holds them."


def test_a_failed_job_is_told_by_its_fault_or_its_log() -> None:
    from_job = "Job (task=0) failed during processing with trace:\n----\nTraceback\nzsq.errors.ZsqError: no room\n"
    assert last_words(from_job, "srun: error: task 0: Exited with exit code 1\n") == "zsq.errors.ZsqError: no room"
    silent = "Job 3 has not produced any output (state: FAILED)\nCheck: - jobs/3_0_log.out"
    assert last_words(silent, "Killed\nsrun: error: vm: task 0: Killed\n") == "Killed"
    assert last_words(silent, None) == "Check: - jobs/3_0_log.out"
    assert last_words("", None) == ""


def test_jobs_on_this_machine_see_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert visible_gpus() == ["3", "GPU-5"]


def test_the_report_draws_each_method_and_names_what_is_missing(grid, tmp_path):
    _, _, folder = grid
    shutil.copytree(folder, tmp_path / "out")
    text = write_comparison_report(tmp_path / "out").read_text()
    assert "18 of 18 cells are finished." in text
    assert "bits 4: best without data ZS-CGAN, qat: 95.00 % (95 % interval 92.86 to 97.14); float 98.50 %" in text
    assert "digits: accuracy against size and time" in text
    assert text.count(">ZS-CGAN</text>") == 2  # in both legends
    assert text.count(">ptq 8</text>") >= 2
    assert "Missing cells" not in text
    (tmp_path / "out" / "cells" / "digits" / "noise" / "ptq-8" / "seed0" / "predictions.npz").write_bytes(b"PK")
    text = write_comparison_report(tmp_path / "out").read_text()
    assert "17 of 18 cells are finished." in text
    assert "<li>digits/noise/ptq-8/seed0</li>" in text


def test_the_report_of_nothing_finished_has_no_empty_table(grid, tmp_path):
    _, _, folder = grid
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "cells.jsonl").unlink()
    text = write_comparison_report(tmp_path / "out").read_text()
    assert "0 of 18 cells are finished." in text
    assert "<table>" not in text
    assert text.count("<li>digits/") == 18

"""A run is a comparison of one cell: either command reads either form, or names the other."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.heads import NETWORKS, spec_of
from zsq.cli import main
from zsq.comparison.compare import compare
from zsq.comparison.recipe import cells, read_recipe
from zsq.errors import InputError
from zsq.export.content_hash import canonical_sha256
from zsq.methods import ZSCGAN, Real
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ, QAT
from zsq.runs.quantize import quantize
from zsq.runs.recipe_file import comparison_tables, run_tables
from zsq.runs.resume import chosen_seed
from zsq.runs.settings import resolve
from zsq.runs.settings_file import teacher_table, write_settings

RECIPES = Path(__file__).parents[2] / "recipes"
ONE_CELL = """
title = "One"
seeds = [4]
[[teachers]]
model = "digits"
data = "digits"
quantizer = {num_samples = 20}
[teachers.methods.mine]
steps = 7
[[methods]]
name = "zscgan"
label = "mine"
steps = 3
width = 8
[[quantizers]]
name = "qat"
bits = ["W4A8"]
steps = 5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_run_takes_the_settings_of_a_comparisons_only_cell(tmp_path: Path) -> None:
    path = written(tmp_path, ONE_CELL)
    settings = resolve(recipe=path)
    assert settings.method == ZSCGAN(steps=7, width=8)
    assert settings.quantizer == QAT(bits="W4A8", steps=5, num_samples=20)
    (cell,) = cells(read_recipe(path))
    assert (cell.settings.method, cell.settings.quantizer) == (settings.method, settings.quantizer)
    assert chosen_seed(None, path, tmp_path / "run", resume=False) == cell.seed == 4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_recipe_of_the_repository_is_taken_by_one_command_and_the_other_names_it(path: Path) -> None:
    if "\n[[" in path.read_text():
        assert len(cells(read_recipe(path))) > 1
        with pytest.raises(InputError, match=f"is a comparison of several cells.* zsq compare {path}"):
            resolve(recipe=path)
    else:
        assert resolve(recipe=path).chosen
        with pytest.raises(InputError, match=f"zsq quantize NETWORK --recipe {path}"):
            read_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[method]\nsteps = 3\n[[methods]]\nname = 'noise'\n",
            "has both 'method' of a run and 'methods' of a comparison",
        ),
        ("[teacher]\nmodel = 'digits'\nseeds = 1\n[[claims]]\n", "has both 'teacher' of a run and 'claims'"),
        ("methods = 3\n", r"'methods' is no list of tables; write \[\[methods\]\]"),
        ("method = 3\n", r"'method' is a value; a table \[method\] is expected"),
    ],
)
def test_what_is_in_neither_form_is_refused_by_both(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=message):
        read_recipe(path)
    if "claims" not in text:
        with pytest.raises(InputError, match=message):
            run_tables(path)


def test_an_unknown_table_is_quoted(tmp_path: Path) -> None:
    path = written(tmp_path, "[quantiser]\nbits = '8'\n")
    with pytest.raises(InputError, match="Unknown table 'quantiser'"):
        run_tables(path)


def test_a_run_without_images_is_no_comparison_yet(tmp_path: Path) -> None:
    path = written(tmp_path, "[teacher]\nmodel = 'digits'\n[run]\nseed = 0\n")
    with pytest.raises(InputError, match=r'add data = "SET" to its table \[run\]'):
        read_recipe(path)
    path.write_text(path.read_text() + "data = 'digits'\n")
    assert len(cells(read_recipe(path))) == 1


def test_the_table_of_a_run_becomes_an_entry(tmp_path: Path) -> None:
    text = (
        "[teacher]\nmodel = 'net.py:build'\nweights = 'w.pth'\nweights_file = '/data/w.pth'\nweights_sha256 = '0'\n"
        "channels = 3\nheight = 32\nwidth = 24\nclasses = 5\nmean = [0.5, 0.5, 0.5]\nstd = [0.2, 0.2, 0.2]\n"
        "[method]\nname = 'real'\ndata = 'a'\n[quantizer]\nbits = 4\n[run]\nseed = 2\ndata = 'test.npz'\n"
    )
    path = written(tmp_path, text)
    (teacher,) = comparison_tables(path)["teachers"]
    assert teacher == {
        "model": "net.py:build",
        "weights": "/data/w.pth",
        "input": [3, 32, 24],
        "classes": 5,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "resize": "none",
        "data": "test.npz",
    }
    (cell,) = cells(read_recipe(path))
    assert (cell.settings.method, cell.settings.quantizer, cell.seed) == (Real(data="a"), PTQ(bits="4"), 2)


@pytest.mark.parametrize("name", ["detector", "embedder", "signals"])
def test_other_inputs_and_outputs_of_a_run_become_those_of_an_entry(tmp_path: Path, name: str) -> None:
    teacher = teacher_from_module(NETWORKS[name](), spec_of(name), name="own.py:build", weights_source="factory")
    facts = {"data": "test.npz", "decode": "own.py:decode", "seed": 0}
    write_settings(tmp_path / "settings.toml", resolve(), teacher_table(teacher), facts)
    (cell,) = cells(read_recipe(tmp_path / "settings.toml"))
    entry, known = cell.teacher, teacher.spec
    outputs = tuple(replace(output, shape=()) for output in known.outputs)
    assert (entry.input, entry.outputs or (), entry.classes or 0) == (known.shape, outputs, known.classes)
    assert entry.decode == "own.py:decode"


@pytest.mark.slow
def test_settings_of_a_run_repeat_it_as_a_run_and_as_a_comparison(tmp_path: Path) -> None:
    settings = ("method.steps=5", "method.width=8", "method.batch_size=16", "quantizer.num_samples=50")
    first = quantize("digits", out=tmp_path / "a", settings=settings, data="digits", seed=3, bits=6, quiet=True)
    recipe = tmp_path / "a" / "settings.toml"
    again = quantize("digits", out=tmp_path / "b", recipe=recipe, data="digits", quiet=True)
    assert again.record.artifacts == first.record.artifacts
    done = compare(recipe, out=tmp_path / "c", quiet=True)
    (name,) = done.lines
    assert name == "digits/zscgan/ptq-6/seed3"
    assert (
        canonical_sha256(tmp_path / "c" / "cells" / name / "model.onnx") == first.record.artifacts["model.onnx"].sha256
    )


@pytest.mark.parametrize("command", ["quantize", "compare"])
def test_the_command_line_says_which_command_takes_a_recipe(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", str(RECIPES / "quick.toml")]
    if command == "quantize":
        arguments = ["quantize", "digits", "--recipe", str(RECIPES / "digits.toml")]
    with pytest.raises(SystemExit) as ended:
        main.main([*arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 1
    assert f"zsq {'compare' if command == 'quantize' else 'quantize'} " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Recipes of comparisons: what they mean, and what is said of a mistyped one."""

import json
from pathlib import Path

import pytest

from zsq.comparison.recipe import Figure, below, cells, gap_of, read_recipe
from zsq.comparison.sample_figure import class_names, shown_labels
from zsq.errors import InputError
from zsq.methods import METHODS
from zsq.runs.settings import read_toml

RECIPES = Path(__file__).parents[2] / "recipes"

GRID = """
title = "two by two"
seeds = [0, 3]
[[teachers]]
model = "digits"
data = "digits"
real = "digits:train"
[[methods]]
name = "zscgan"
label = "CE"
title = "ZS-CGAN (CE)"
bns_weight = 0
[methods.quantizer]
learning_rate = 0.02
[[methods]]
name = "real"
[[quantizers]]
name = "ptq"
bits = [8, "W4A8"]
num_samples = 50
[[quantizers]]
name = "qat"
steps = 7
"""


@pytest.fixture
def read(tmp_path):
    def from_text(text: str):
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return read_recipe(path)

    return from_text


def test_the_grid_is_teachers_x_seeds_x_methods_x_quantizers_x_bits(read):
    found = cells(read(GRID))
    assert [cell.name for cell in found[:6]] == [
        "digits/CE/ptq-8/seed0",
        "digits/CE/ptq-W4A8/seed0",
        "digits/CE/qat-8/seed0",
        "digits/real/ptq-8/seed0",
        "digits/real/ptq-W4A8/seed0",
        "digits/real/qat-8/seed0",
    ]
    assert [cell.seed for cell in found] == [0] * 6 + [3] * 6
    assert len({cell.fit_name for cell in found}) == 4


def test_settings_come_from_method_quantizer_and_their_overrides(read):
    by_name = {cell.name: cell.settings for cell in cells(read(GRID))}
    assert by_name["digits/CE/ptq-8/seed0"].method.bns_weight == 0
    assert by_name["digits/CE/ptq-W4A8/seed0"].quantizer.bits == "W4A8"
    assert by_name["digits/CE/ptq-8/seed0"].quantizer.num_samples == 50  # which has no learning rate to override
    assert by_name["digits/CE/qat-8/seed0"].quantizer.learning_rate == 0.02
    assert by_name["digits/real/qat-8/seed0"].quantizer.learning_rate == 1e-3
    assert by_name["digits/real/ptq-8/seed0"].method.data == "digits:train"


def test_a_network_may_have_settings_and_widths_of_its_own(read):
    own = '\nbits = ["8"]\nquantizer = {num_samples = 9}\nmethods = {CE = {steps = 3}}\n[[methods]]'
    found = cells(read(GRID.replace("\n[[methods]]", own, 1)))
    assert {cell.bits for cell in found} == {"8"}
    assert {cell.settings.quantizer.num_samples for cell in found} == {9}
    assert found[0].settings.method.steps == 3


def test_the_fit_spans_the_longest_distillation_of_its_cells(read):
    more = GRID + '[[quantizers]]\nname = "qat"\nlabel = "long"\nsteps = 40\n'
    assert {cell.fit_settings.distill_steps for cell in cells(read(GRID))} == {7}
    assert {cell.fit_settings.distill_steps for cell in cells(read(more))} == {40}


def test_a_pair_that_does_not_work_is_a_cell_with_its_reason(read, monkeypatch):
    monkeypatch.setattr(METHODS["zscgan"], "quantizers", ("ptq",))
    reasons = {cell.name: cell.reason for cell in cells(read(GRID)) if cell.seed == 0 and cell.reason}
    assert list(reasons) == ["digits/CE/qat-8/seed0"]
    assert "it works with: ptq" in reasons["digits/CE/qat-8/seed0"]
    assert {cell.fit_settings.distill_steps for cell in cells(read(GRID)) if cell.method.label == "CE"} == {0}


def test_a_method_may_be_used_with_some_quantizers_only(read):
    text = GRID.replace('name = "real"', 'name = "real"\nonly = ["qat"]')
    assert next(c.name for c in cells(read(text)) if c.method.name == "real") == "digits/real/qat-8/seed0"


def test_the_gap_is_that_from_noise_to_real_where_both_are_there(read):
    assert gap_of(read(GRID)) is None
    assert gap_of(
        read(GRID.replace('name = "zscgan"\nlabel = "CE"\ntitle = "ZS-CGAN (CE)"\nbns_weight = 0', 'name = "noise"'))
    ) == ("noise", "real")
    assert gap_of(read('gap = ["CE", "real"]' + GRID)) == ("CE", "real")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "titel", "Unknown recipe key 'titel'. Did you mean 'title'?"),
        ('title = "two by two"', "", "a recipe without 'title'"),
        ("data =", "dta =", "Unknown teacher key 'dta'. Did you mean 'data'?"),
        ('data = "digits"\n', "", "teacher 'digits' names no images for evaluation: data = SET."),
        ('name = "zscgan"', 'name = "zs-cgan"', "Unknown method 'zs-cgan'. Did you mean 'zscgan'?"),
        ('name = "zscgan"', 'nam = "zscgan"', "a method without 'name'"),
        ("bns_weight", "bns_weigth", "Unknown method setting 'method.bns_weigth'. Did you mean 'method.bns_weight'?"),
        ("bns_weight = 0", "bns_weight = -1", "method.bns_weight is -1; it must be at least 0"),
        ("learning_rate", "learnin_rate", "Did you mean 'quantizer.learning_rate'?"),
        ('name = "ptq"', 'name = "ptqs"', "Unknown quantizer 'ptqs'. Did you mean 'ptq'?"),
        ("num_samples", "num_sample", "Did you mean 'quantizer.num_samples'?"),
        ("W4A8", "W4A9", "'W4A9'"),
        ("steps = 7", "steps = true_", "grid.toml is not TOML"),
        ("steps = 7", 'steps = "x"', "quantizer.steps is 'x'"),
        ("seeds = [0, 3]", "seeds = [1, 1]", "seeds are [1, 1]; each may stand once."),
        ('bits = [8, "W4A8"]', 'bits = [8, "8"]', "bits of quantizer 'ptq' are ['8', '8']; each may stand once."),
        ('data = "digits"', 'data = "digits"\nbits = ["3"]', "no cell is left; networks and quantizers have no `bits`"),
        ("seeds = [0, 3]", 'seeds = ["a"]', "recipe: seeds.0 is 'a'"),
        ("seeds = [0, 3]", 'layout = "colums"', "recipe: layout is 'colums'"),
        ("seeds = [0, 3]", 'gap = ["noise", "real"]', "Unknown method of the gap 'noise'."),
        ('label = "CE"', 'label = "C/E"', "method label 'C/E'; letters, digits, dot, plus, minus and underscore work."),
        ('label = "CE"', 'label = "real"', "two methods are labelled 'real'"),
        ('label = "CE"', 'only = ["qta"]', "Unknown quantizer of method 'zscgan' 'qta'. Did you mean 'qat'?"),
        ('real = "digits:train"', "methods = {ce = {steps = 1}}", "Unknown method of teacher 'digits' 'ce'."),
        ("[[teachers]]", "[teachers]", "'teachers' is no list of tables; write [[teachers]]."),
        ("steps = 7", 'steps = 7\n[[claims]]\nabove = "CE/qta"\nbelow = "CE/ptq"', "Did you mean 'CE/qat'?"),
        (
            "steps = 7",
            'steps = 7\n[[claims]]\nabove = "CE/qat"\nbelow = "CE/ptq"\nmargin = -1',
            "margin of a claim is -1",
        ),
        ("steps = 7", "steps = 7\n[figure]\nshown = [1]", "Unknown figure key 'shown'. Did you mean 'show'?"),
    ],
)
def test_a_mistake_is_named_with_the_file(read, old, new, message):
    assert old in GRID
    with pytest.raises(InputError) as caught:
        read(GRID.replace(old, new, 1))
    assert "grid.toml" in str(caught.value)
    assert message in str(caught.value)


def test_a_recipe_needs_something_to_do(read):
    with pytest.raises(InputError, match=r"neither \[\[quantizers\]\] nor a \[figure\]"):
        read('title = "x"\n[[teachers]]\nmodel = "digits"\ndata = "digits"\n[[methods]]\nname = "noise"\n')
    with pytest.raises(InputError, match=r"a recipe without 'methods'"):
        read('title = "x"\n[[teachers]]\nmodel = "digits"\ndata = "digits"\n[figure]\n')


def test_a_figure_needs_neither_quantizers_nor_data(read):
    found = cells(read('title = "x"\n[[teachers]]\nmodel = "digits"\n[[methods]]\nname = "noise"\n[figure]\n'))
    assert [cell.name for cell in found] == ["digits/noise/figure/seed0"]


def test_paths_lie_below_the_root_where_they_exist_there(tmp_path):
    (tmp_path / "net.py").touch()
    assert below(tmp_path, "net.py:build") == f"{tmp_path}/net.py:build"
    assert below(tmp_path, "net.py") == f"{tmp_path}/net.py"
    assert below(tmp_path, "digits:train") == "digits:train"
    assert below(None, "net.py:build") == "net.py:build"


def test_names_of_classes(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["cat", "dog", "cow"]))
    figure = Figure(names="names.json", show=("cow", 0))
    names = class_names(figure, 3, tmp_path)
    assert shown_labels(figure, names) == [2, 0]
    assert class_names(Figure(), 3, None) == ["0", "1", "2"]
    assert shown_labels(Figure(), names) == [0, 1, 2]
    with pytest.raises(InputError, match=r"figure\.names holds 3 names; the teacher knows 4 classes"):
        class_names(figure, 4, tmp_path)
    with pytest.raises(InputError, match=r"Did you mean 'cow'"):
        shown_labels(Figure(show=("cows",)), names)
    with pytest.raises(InputError, match=r"figure\.show has class 3; the teacher knows 0\.\.2"):
        shown_labels(Figure(show=(3,)), names)
    with pytest.raises(InputError, match=r"nowhere\.json: No such file"):
        class_names(Figure(names="nowhere.json"), 3, tmp_path)
    (tmp_path / "names.json").write_text("cat")
    with pytest.raises(InputError, match=r"is not JSON"):
        class_names(figure, 3, tmp_path)


COMPARISONS = sorted(path.name for path in RECIPES.glob("*.toml") if "teachers" in read_toml(path))


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_of_the_repository_can_be_read(name):
    recipe = read_recipe(RECIPES / name)
    assert all(bool(teacher.source) == bool(teacher.weights) for teacher in recipe.teachers)
    found = cells(recipe)
    assert recipe.title
    assert found
    assert len({cell.name for cell in found}) == len(found)


@pytest.mark.parametrize("table", ["table1a", "table1b", "table2", "figure2"])
def test_each_table_of_the_paper_has_a_recipe_at_both_sizes(table):
    assert {f"{table}.toml", f"{table}_cores2.toml"} <= set(COMPARISONS)


def test_digits_runs_every_method():
    recipe = read_recipe(RECIPES / "digits.toml")
    assert {entry.name for entry in recipe.methods} == set(METHODS)
    assert {(cell.quantizer.label, cell.bits) for cell in cells(recipe)} == {
        *(("ptq", "8"), ("ptq", "4"), ("qat", "8"), ("qat", "4"))
    }

"""Digests: what makes a cell or a fit be run again, and what does not."""

from dataclasses import replace

import pytest

from zsq.comparison.digests import digest, fit_digest
from zsq.comparison.recipe import Cell, cells, read_recipe
from zsq.models.teacher import load_teacher

GRID = """
title = "two by two"
[[teachers]]
model = "digits"
data = "digits"
real = "digits:train"
[[methods]]
name = "zscgan"
steps = 3
[[methods]]
name = "noise"
[[quantizers]]
name = "ptq"
bits = ["8", "4"]
[[quantizers]]
name = "qat"
steps = 7
"""


@pytest.fixture
def grid(tmp_path):
    def from_text(text: str) -> dict[str, Cell]:
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return {cell.name: cell for cell in cells(read_recipe(path))}

    return from_text


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ('title = "two by two"', 'title = "other"', set()),
        ('model = "digits"', 'model = "digits"\ntitle = "Ten digits"', set()),
        ('real = "digits:train"', "", set()),
        ('bits = ["8", "4"]', 'bits = ["4", "8"]', set()),
        ('data = "digits"', 'data = "digits:train"', {"zscgan/ptq", "zscgan/qat", "noise/ptq", "noise/qat"}),
        ("steps = 3", "steps = 4", {"zscgan/ptq", "zscgan/qat"}),
        # the schedule of a fit spans the longest distillation among its cells; noise learns nothing
        ("steps = 7", "steps = 8", {"zscgan/ptq", "zscgan/qat", "noise/qat"}),
        ('name = "ptq"', 'name = "ptq"\nnum_samples = 9', {"zscgan/ptq", "noise/ptq"}),
    ],
)
def test_a_cell_is_another_only_where_its_result_may_be(grid, old, new, changed):
    assert old in GRID
    before = {name: digest(cell) for name, cell in grid(GRID).items()}
    after = {name: digest(cell) for name, cell in grid(GRID.replace(old, new, 1)).items()}
    differing = {name for name in before if before[name] != after[name]}
    assert {name.removeprefix("digits/").rpartition("-")[0] for name in differing} == changed
    assert len(set(before.values())) == len(before)


def test_cells_that_share_a_fit_share_its_digest(grid):
    teacher = load_teacher("digits")
    found = grid(GRID).values()
    by_fit = {(cell.fit_name, fit_digest(cell, teacher)) for cell in found}
    assert len(by_fit) == len({mark for _, mark in by_fit}) == 2


def test_a_fit_is_another_with_other_weights_images_or_seeds_but_not_by_another_name(grid):
    teacher = load_teacher("digits")
    cell = grid(GRID)["digits/zscgan/ptq-8/seed0"]
    mark = fit_digest(cell, teacher)
    assert fit_digest(cell, replace(teacher, name="ours")) == mark
    assert fit_digest(cell, replace(teacher, weights_sha256="0" * 64)) != mark
    assert fit_digest(cell, replace(teacher, spec=replace(teacher.spec, std=(0.5,)))) != mark
    assert fit_digest(replace(cell, seed=1), teacher) != mark

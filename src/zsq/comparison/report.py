"""The report of a comparison, made from its folder alone; nothing here runs a network."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from zsq.comparison.digests import digest
from zsq.comparison.document import CLAIMS_NOTE, DIFFERENCES_NOTE, GAPS_NOTE, scored
from zsq.comparison.layout import Layout, read_scores
from zsq.comparison.lines import CellLine, Drawn, Quantized, Skipped, read_lines
from zsq.comparison.recipe import Cell, TeacherEntry, cells, read_recipe
from zsq.comparison.result import Comparison
from zsq.comparison.statistics import Group
from zsq.comparison.tables import claims_table, costs_table, differences_table, gaps_table, main_table
from zsq.errors import InputError
from zsq.evaluation.measures import CONFIDENCE_Z
from zsq.reports import html
from zsq.reports.html import REPORT, Drawings, Lines, Page, Point, Section
from zsq.reports.text_tables import TextTable

MOST_REASONS = 6
"""Networks and widths of which the first screen names the best file; the table has them all."""


def write_comparison_report(folder: Path) -> Path:
    """Write `report.html` to a comparison's folder from its recipe, lines and predictions, and return its path.

    Cells that have not been run, whose settings have changed, or whose predictions are lost, are named as missing.

    Raises:
        InputError: the recipe cannot be read.
    """
    layout = Layout(folder)
    recipe, lines = read_recipe(layout.recipe), read_lines(layout.lines)
    wanted = cells(recipe)
    found = {c.name: line for c in wanted if (line := lines.get(c.name)) is not None and _counts(c, line, layout)}
    path = folder / REPORT
    html.write_page(_page(Comparison(layout, recipe, found), [c.name for c in wanted if c.name not in found]), path)
    return path


def _counts(cell: Cell, line: CellLine, layout: Layout) -> bool:
    """Whether a line is of the recipe as it is now, and what it is about is there."""
    if line.digest != digest(cell):
        return False
    if not isinstance(line.outcome, Quantized):
        return isinstance(line.outcome, Skipped) or layout.result(cell).exists()
    try:
        read_scores(layout.predictions(cell))
    except InputError:
        return False
    return True


def _page(comparison: Comparison, missing: list[str]) -> Page:
    recipe, outcomes = comparison.recipe, comparison.outcomes
    count = len(cells(recipe))
    reasons = list(itertools.islice(_best(comparison), MOST_REASONS))
    reasons += [f"{verdict.claim.label or 'claim'}: {verdict.word}." for verdict in outcomes.verdicts()]
    done = f"{sum(line.status == 'finished' for line in comparison.lines.values())} of {count} cells are finished."
    title = f"zsq: {recipe.title}"
    return Page(title, comparison.folder.name, "weak", done, tuple(reasons), tuple(_sections(comparison, missing)))


def _best(comparison: Comparison) -> Iterator[str]:
    """Yield the best data-free file of each network and width in words."""
    outcomes = comparison.outcomes
    titles = {method.label: method.title for method in comparison.recipe.methods}
    for teacher in comparison.recipe.teachers:
        for bits in outcomes.bits:
            found = {
                f"{titles[method]}, {quantizer}": group
                for (label, method, quantizer, width), group in outcomes.groups.items()
                if (label, width) == (teacher.label, bits) and group.data_free
            }
            if found:
                name, best = max(found.items(), key=lambda item: item[1].mean)
                interval = _interval(best)
                about = "" if interval is None else " (95 % interval {:.2f} to {:.2f})".format(*interval)
                measure = "" if best.measure == "top-1" else f"{best.measure} "
                found_score = f"{measure}{best.mean:.2f} %{about}; float {best.float_score:.2f} %"
                if (lost := best.minus_float) is not None:
                    found_score += f", a difference of {lost.mean:+.2f} points ({lost.low:+.2f} to {lost.high:+.2f})"
                yield f"{teacher.title}, bits {bits}: best without data {name}: {found_score}."


def _pictures(comparison: Comparison) -> Iterator[Section]:
    """Yield the samples of each network and method that were drawn."""
    networks = {teacher.label: teacher.title for teacher in comparison.recipe.teachers}
    methods = {method.label: method.title for method in comparison.recipe.methods}
    for line in comparison.lines.values():
        if isinstance(line.outcome, Drawn):
            title = f"{networks[line.teacher]}: samples of {methods[line.method]}"
            yield Section(title, (html.picture(comparison.folder / line.outcome.figure, title),))


def _sections(comparison: Comparison, missing: list[str]) -> Iterator[Section]:
    recipe, outcomes = comparison.recipe, comparison.outcomes
    if outcomes.groups:
        note = f"{scored(outcomes)}. DF: data-free; DD: made with real images."
        yield Section("Accuracy", (_table(main_table(outcomes)),), note)
    for teacher in recipe.teachers:
        if drawings := _drawings(comparison, teacher):
            note = (
                "Labels: quantizer and bits. Intervals of 95 % are about other test images, not about other seeds. "
                "Marks of one place stand beside each other."
            )
            yield Section(f"{teacher.title}: accuracy against size and time", (drawings,), note)
    yield from _pictures(comparison)
    for title, found, note in (
        ("Differences on the same images", differences_table(outcomes), DIFFERENCES_NOTE),
        ("Claims", claims_table(outcomes), CLAIMS_NOTE),
        ("Share of the gap", gaps_table(outcomes), GAPS_NOTE),
    ):
        if found is not None:
            yield Section(title, (_table(found),), note.strip().replace("`", ""))
    if outcomes.groups:
        yield Section("Cost", (_table(costs_table(outcomes)),))
    skipped = [
        f"{n}: {line.outcome.reason}" for n, line in comparison.lines.items() if isinstance(line.outcome, Skipped)
    ]
    if skipped:
        yield Section("Skipped", (Lines(tuple(skipped)),))
    if missing:
        note = "Not run, of other settings than the recipe's, or without their files; --resume runs them."
        yield Section("Missing cells", (Lines(tuple(missing)),), note)
    lines = (f"zsq compare {comparison.layout.recipe.name} --out AGAIN",)
    yield Section("Repeat it", (Lines(lines, verbatim=True),))


def _table(found: TextTable) -> html.Table:
    return html.table(
        found.header,
        [[_cell(e.text, number=i >= found.text_columns) for i, e in enumerate(row)] for row in found.rows],
    )


def _cell(text: str, *, number: bool) -> html.Cell:
    """Return a cell that sorts by the number it begins with, where it is a figure."""
    try:
        return html.Cell(text, float(text.removeprefix("≥ ").split()[0]) if number else None)
    except (ValueError, IndexError):
        return html.Cell(text)


def _drawings(comparison: Comparison, teacher: TeacherEntry) -> Drawings | None:
    """Return the measure against bytes and against seconds of one network; None before a cell is finished."""
    axes: dict[str, Callable[[Group], float]] = {
        "size of the file, KiB": lambda group: group.model_bytes / 1024,
        "fit and quantization, seconds": lambda group: group.fit_seconds + group.cell_seconds,
    }
    groups = {key[1:]: group for key, group in comparison.outcomes.groups.items() if key[0] == teacher.label}
    if not groups:
        return None
    titles = {method.label: method.title for method in comparison.recipe.methods}
    drawings = []
    first = next(iter(groups.values()))
    for x_label, place in axes.items():
        series: dict[str, list[Point]] = {title: [] for title in titles.values()}
        for (method, quantizer, bits), group in groups.items():
            low, high = _interval(group) or (group.mean, group.mean)
            series[titles[method]].append(Point(place(group), group.mean, low, high, f"{quantizer} {bits}"))
        drawings.append(html.scatter(f"{first.measure}, %", x_label, series, ("float", first.float_score)))
    return Drawings(tuple(drawings))


def _interval(group: Group) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of the mean over seeds, about other images, in percent; None without one."""
    if len(group.results) == 1:
        return group.results[0].interval
    if not group.scores:
        return None
    shares = 100 * np.mean(list(group.scores.values()), axis=0)
    reach = CONFIDENCE_Z * float(shares.std()) / len(shares) ** 0.5
    return max(0.0, group.mean - reach), min(100.0, group.mean + reach)

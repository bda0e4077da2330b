"""What the lines of a comparison say, in numbers: means over seeds, paired differences, claims, shares of a gap."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsq.comparison.layout import Layout, read_scores
from zsq.comparison.lines import CellLine, Quantized
from zsq.comparison.recipe import Cell, Claim, MethodEntry, QuantizerEntry, Recipe, TeacherEntry, cells, gap_of
from zsq.evaluation.accuracy import Difference, paired_difference

Key = tuple[str, str, str, str]
"""Labels of teacher, method and quantizer, and bits."""


@dataclass(frozen=True, slots=True)
class Group:
    """The finished cells that differ in their seeds only; at least one."""

    results: tuple[Quantized, ...]
    scores: dict[int, np.ndarray]
    """How well the file does on each image, from 0 to 1, [N], by seed; empty where the measure is no mean over them."""
    float_scores: np.ndarray | None = None
    """How well the float network does, [N]; None where it is not known."""

    @property
    def measure(self) -> str:
        """What is compared."""
        return self.results[0].measure

    @property
    def minus_float(self) -> Difference | None:
        """Difference to the float network, image by image; None where that does not make the measure, or is unknown."""
        if self.float_scores is None or not self.scores:
            return None
        return paired_difference(np.mean(list(self.scores.values()), axis=0), self.float_scores)

    @property
    def mean(self) -> float:
        """The measure in percent, over seeds."""
        return statistics.fmean(result.score for result in self.results)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, n - 1 in the denominator; None for one seed."""
        scores = [result.score for result in self.results]
        return statistics.stdev(scores) if len(scores) > 1 else None

    @property
    def data_free(self) -> bool:
        """Whether no real image was used."""
        return self.results[0].data_free

    @property
    def float_score(self) -> float:
        """The float network's measure in percent, the same for all seeds."""
        return self.results[0].float_score

    @property
    def num_eval_images(self) -> int:
        """Images on which accuracy was measured."""
        return self.results[0].num_eval_images

    @property
    def model_bytes(self) -> int:
        """Size of the first seed's `model.onnx`."""
        return self.results[0].model_bytes

    @property
    def fit_seconds(self) -> float:
        """Wall clock of a fit, mean over seeds."""
        return statistics.fmean(result.fit_seconds for result in self.results)

    @property
    def cell_seconds(self) -> float:
        """Wall clock of a cell without its fit, mean over seeds."""
        return statistics.fmean(result.seconds for result in self.results)

    @property
    def resumed(self) -> bool:
        """Whether a cell or fit was stopped and continued, so that the seconds are not all."""
        return any(result.resumed for result in self.results)

    @property
    def num_calibration_images(self) -> float:
        """Images that calibrated, mean over seeds."""
        return statistics.fmean(result.num_calibration_images for result in self.results)

    @property
    def label_recognition(self) -> float | None:
        """Percent of samples of which the teacher recognises the label, mean over seeds; None where none is asked."""
        shares = [result.label_recognition for result in self.results if result.label_recognition is not None]
        return statistics.fmean(shares) if shares else None


def difference(first: Group, second: Group) -> Difference | None:
    """Return the paired difference of two groups over the seeds that both have; None without a common seed, or
    where the measure is no mean over images."""
    seeds = sorted(first.scores.keys() & second.scores.keys())
    if not seeds:
        return None
    return paired_difference(*(np.mean([group.scores[seed] for seed in seeds], axis=0) for group in (first, second)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the cells say of a claim in one row of the table."""

    claim: Claim
    teacher: TeacherEntry
    bits: str
    above: Group
    below: Group
    difference: Difference
    num_seeds: int

    @property
    def word(self) -> str:
        """`holds` or `contradicted` where the whole interval says so, else `open`."""
        if self.difference.low > -self.claim.margin:
            return "holds"
        return "contradicted" if self.difference.high < -self.claim.margin else "open"

    def as_dict(self) -> dict[str, Any]:
        """Return claim and verdict as plain values."""
        return {
            "claim": self.claim.label,
            "above": self.claim.above,
            "below": self.claim.below,
            "margin": self.claim.margin,
            "network": self.teacher.label,
            "bits": self.bits,
            "num_seeds": self.num_seeds,
            "difference": self.difference.mean,
            "interval": [self.difference.low, self.difference.high],
            "verdict": self.word,
        }


@dataclass(frozen=True, slots=True)
class Gap:
    """The difference between the two methods that bound a row's accuracies, such as noise and real images."""

    teacher: TeacherEntry
    quantizer: QuantizerEntry
    bits: str
    low: Group
    high: Group
    difference: Difference
    """High minus low."""
    others: dict[str, Group]
    """The other methods' groups, by label, where a cell is finished."""

    @property
    def exists(self) -> bool:
        """Whether the difference is above 0 by its whole interval, so that a share of it means something."""
        return self.difference.low > 0

    def share(self, group: Group) -> float:
        """Return the percentage of the gap that a group closes."""
        return 100 * (group.mean - self.low.mean) / (self.high.mean - self.low.mean)


class Outcomes:
    """Groups of cells that differ in their seeds only, and what follows from them.

    Args:
        recipe: the comparison.
        lines: the latest line of each cell, by the cell's name.
        layout: where the cells' predictions lie.
    """

    def __init__(self, recipe: Recipe, lines: Mapping[str, CellLine], layout: Layout) -> None:
        self.recipe = recipe
        grid = cells(recipe)
        self.groups = _groups(grid, lines, layout)
        self.bits = tuple(dict.fromkeys(bits for entry in recipe.quantizers for bits in entry.bits))
        possible = {(cell.method.label, cell.quantizer.label) for cell in grid if cell.quantizer and not cell.reason}
        self.columns = [
            (method, quantizer)
            for method in recipe.methods
            for quantizer in recipe.quantizers
            if (method.label, quantizer.label) in possible
        ]
        """Pairs of method and quantizer that can be run, in the recipe's order."""

    def first(self, teacher: TeacherEntry) -> Group | None:
        """Return the first group of a network, which knows its measure and float score; None before a cell of it."""
        return next((group for (label, *_), group in self.groups.items() if label == teacher.label), None)

    @property
    def measure(self) -> str:
        """What all finished cells are compared by; `score` where networks differ in it."""
        names = {group.measure for group in self.groups.values()}
        return names.pop() if len(names) == 1 else "score"

    def titled(self, teacher: TeacherEntry) -> str:
        """Return a network's title, with its measure where networks differ in it."""
        first = self.first(teacher)
        return f"{teacher.title} ({first.measure})" if first and first.measure != self.measure else teacher.title

    def data_free(self, method: MethodEntry, quantizer: QuantizerEntry) -> bool | None:
        """Return whether a column was made without real images; None as long as no cell of it is finished."""
        for (_, *labels, _), group in self.groups.items():
            if labels == [method.label, quantizer.label]:
                return group.data_free
        return None

    def verdicts(self) -> Iterator[Verdict]:
        """Yield what is known of each claim, row by row of the table."""
        for claim in self.recipe.claims:
            for teacher in self.recipe.teachers:
                for bits in self.bits:
                    above = self._of_column(teacher, claim.above, bits)
                    below = self._of_column(teacher, claim.below, bits)
                    if above is None or below is None or (found := difference(above, below)) is None:
                        continue
                    seeds = len(above.scores.keys() & below.scores.keys())
                    yield Verdict(claim, teacher, bits, above, below, found, seeds)

    def _of_column(self, teacher: TeacherEntry, column: str, bits: str) -> Group | None:
        method, quantizer = column.split("/")
        return self.groups.get((teacher.label, method, quantizer, bits))

    def gaps(self) -> Iterator[Gap]:
        """Yield the gap between the two methods that bound it, row by row of the table; nothing without the two."""
        ends = gap_of(self.recipe)
        if ends is None:
            return
        for teacher in self.recipe.teachers:
            for quantizer in self.recipe.quantizers:
                for bits in quantizer.bits:
                    found = {
                        method.label: group
                        for method in self.recipe.methods
                        if (group := self.groups.get((teacher.label, method.label, quantizer.label, bits)))
                    }
                    low, high = (found.pop(end, None) for end in ends)
                    if low and high and (gap := difference(high, low)):
                        yield Gap(teacher, quantizer, bits, low, high, gap, found)


def _groups(grid: Iterable[Cell], lines: Mapping[str, CellLine], layout: Layout) -> dict[Key, Group]:
    """Return the groups of which a cell is finished, in the order of the grid."""
    members: dict[Key, list[Cell]] = {}
    for cell in grid:
        if cell.quantizer is not None:
            key = (cell.teacher.label, cell.method.label, cell.quantizer.label, cell.bits)
            members.setdefault(key, []).append(cell)
    groups = {key: _group(found, lines, layout) for key, found in members.items()}
    return {key: group for key, group in groups.items() if group.results}


def _group(members: Iterable[Cell], lines: Mapping[str, CellLine], layout: Layout) -> Group:
    results: list[Quantized] = []
    scores: dict[int, np.ndarray] = {}
    floats: np.ndarray | None = None
    for cell in members:
        line = lines.get(cell.name)
        if line is not None and isinstance(line.outcome, Quantized):
            results.append(line.outcome)
            read, measure = read_scores(layout.predictions(cell)), line.outcome.measure
            scores |= {cell.seed: read.file[measure]} if measure in read.file else {}
            floats = read.floats.get(measure, floats)
    return Group(tuple(results), scores, floats)

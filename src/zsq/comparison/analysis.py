"""What the lines of a comparison say: means over seeds, paired intervals, claims, costs; no network is run."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsq.comparison.recipe import Cell, Claim, MethodEntry, QuantizerEntry, Recipe, TeacherEntry, cells, gap_of
from zsq.evaluation.accuracy import Difference, paired_difference
from zsq.quantization.prepare import Bits
from zsq.reports.text_tables import EMPTY, Entry, TextTable, text_table, to_markdown
from zsq.runs.stages import PREDICTIONS

Key = tuple[str, str, str, str]
"""Labels of teacher, method and quantizer, and bits."""

FINISHED, SKIPPED = "finished", "skipped"


@dataclass(frozen=True, slots=True)
class Group:
    """The cells that differ in their seeds only."""

    lines: tuple[dict[str, Any], ...]
    """Of those that are finished."""
    hits: dict[int, np.ndarray]
    """Whether each image was recognised, bool [N], by seed."""

    @property
    def mean(self) -> float:
        """Top-1 in percent, over seeds."""
        return statistics.fmean(line["quantized_top1"] for line in self.lines)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, n - 1 in the denominator; None for one seed."""
        return statistics.stdev(line["quantized_top1"] for line in self.lines) if len(self.lines) > 1 else None

    @property
    def data_free(self) -> bool:
        """Whether no real image was used."""
        return bool(self.lines[0]["data_free"])

    @property
    def text(self) -> str:
        """Mean and spread."""
        return f"{self.mean:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")

    def cost(self, name: str, digits: int = 2) -> str:
        """Return the mean over seeds of a figure; a dash where it does not apply."""
        values = [line[name] for line in self.lines if line[name] is not None]
        return f"{statistics.fmean(values):.{digits}f}" if values else EMPTY


def difference(first: Group, second: Group) -> Difference | None:
    """Return the paired difference of two groups over the seeds that both have; None without a common seed."""
    seeds = sorted(first.hits.keys() & second.hits.keys())
    if not seeds:
        return None
    return paired_difference(*(np.mean([group.hits[seed] for seed in seeds], axis=0) for group in (first, second)))


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


class Outcomes:
    """All that a comparison's tables are made of.

    Args:
        recipe: the comparison.
        lines: the latest line of each cell, by the cell's name.
        folder: of the comparison.
    """

    def __init__(self, recipe: Recipe, lines: dict[str, dict[str, Any]], folder: Path) -> None:
        self.recipe, self.lines, self.folder = recipe, lines, folder
        self.grid = cells(recipe)
        by_key: dict[Key, list[Cell]] = {}
        for cell in self.grid:
            if cell.quantizer is not None:
                key = (cell.teacher.label, cell.method.label, cell.quantizer.label, cell.bits)
                by_key.setdefault(key, []).append(cell)
        groups = {key: self._group(members) for key, members in by_key.items()}
        self.groups = {key: group for key, group in groups.items() if group.lines}
        self.bits = tuple(dict.fromkeys(bits for entry in recipe.quantizers for bits in entry.bits))

    def _group(self, members: list[Cell]) -> Group:
        found, hits = [], {}
        for cell in members:
            line = self.lines.get(cell.name)
            if line is not None and line["status"] == FINISHED:
                found.append(line)
                with np.load(self.folder / "cells" / cell.name / PREDICTIONS) as arrays:
                    hits[cell.seed] = arrays["predictions"] == arrays["labels"]
        return Group(tuple(found), hits)

    def table(self) -> TextTable:
        """Return the table in the form that the recipe asks for; without the rows of which no cell is finished."""
        return self._rows() if self.recipe.layout == "rows" else self._columns()

    def columns(self) -> list[tuple[MethodEntry, QuantizerEntry]]:
        """List the pairs of method and quantizer that can be run, in the recipe's order."""
        possible = {
            (cell.method.label, cell.quantizer.label) for cell in self.grid if cell.quantizer and not cell.reason
        }
        pairs = [(method, quantizer) for method in self.recipe.methods for quantizer in self.recipe.quantizers]
        return [pair for pair in pairs if (pair[0].label, pair[1].label) in possible]

    def heading(self, method: MethodEntry, quantizer: QuantizerEntry) -> str:
        """Name a column as the paper does: DF-PTQ, DD-QAT; without prefix as long as nothing is finished."""
        title = quantizer.title if quantizer.title != quantizer.label else quantizer.label.upper()
        for (_, m, q, _), group in self.groups.items():
            if (m, q) == (method.label, quantizer.label):
                return f"{method.title} {'DF' if group.data_free else 'DD'}-{title}"
        return f"{method.title} {title}"

    def _entries(self, keys: list[Key]) -> list[Entry]:
        """Return one entry a group, the best data-free ones bold; equal in print is equal."""
        found = [self.groups.get(key) for key in keys]
        shown = [f"{group.mean:.2f}" if group and group.data_free else "" for group in found]
        best = max((text for text in shown if text), key=float, default="none")
        return [
            Entry(group.text if group else EMPTY, bold=text == best) for group, text in zip(found, shown, strict=True)
        ]

    def _float(self, teacher: TeacherEntry) -> str:
        for (label, *_), group in self.groups.items():
            if label == teacher.label:
                return f"{group.lines[0]['float_top1']:.2f}"
        return EMPTY

    def _columns(self) -> TextTable:
        columns = self.columns()
        rows: list[list[str | Entry]] = []
        for teacher in self.recipe.teachers:
            for bits in [b for b in self.bits if b in (teacher.bits or self.bits)]:
                keys = [(teacher.label, method.label, quantizer.label, bits) for method, quantizer in columns]
                if any(key in self.groups for key in keys):
                    rows.append([teacher.title, _int(bits), self._float(teacher), *self._entries(keys)])
        header = ["network", "bits", "float", *(self.heading(*column) for column in columns)]
        return text_table(header, rows, text_columns=2)

    def _rows(self) -> TextTable:
        teachers = self.recipe.teachers
        rows: list[list[str | Entry]] = [["pretrained", "FL32", "FL32", *map(self._float, teachers)]]
        columns = self.columns()
        for bits in self.bits:
            by_teacher = [self._entries([(t.label, m.label, q.label, bits) for m, q in columns]) for t in teachers]
            width = Bits.parse(bits)
            for index, column in enumerate(columns):
                entries = [found[index] for found in by_teacher]
                rows.append([self.heading(*column), f"INT{width.weight}", f"INT{width.activation}", *entries])
        return text_table(["data", "weights", "activations", *(t.title for t in teachers)], rows, text_columns=3)

    def gaps(self) -> TextTable | None:
        """Return the share of the gap between two methods that each other one closes; None without the two."""
        ends = gap_of(self.recipe)
        if ends is None:
            return None
        others = [entry for entry in self.recipe.methods if entry.label not in ends]
        rows = []
        for teacher in self.recipe.teachers:
            for quantizer in self.recipe.quantizers:
                for bits in quantizer.bits:
                    groups = {
                        method.label: self.groups.get((teacher.label, method.label, quantizer.label, bits))
                        for method in self.recipe.methods
                    }
                    low, high = groups[ends[0]], groups[ends[1]]
                    if low is None or high is None or (gap := difference(high, low)) is None:
                        continue
                    shares = [_share(groups[m.label], low, high, significant=gap.low > 0) for m in others]
                    rows.append([teacher.title, quantizer.label, _int(bits), interval(gap), *shares])
        header = ["network", "quantizer", "bits", f"{ends[1]} minus {ends[0]} (95 %)", *(m.title for m in others)]
        return text_table(header, rows, text_columns=3) if rows else None

    def verdicts(self) -> Iterator[Verdict]:
        """Yield what is known of each claim, row by row of the table."""
        for claim in self.recipe.claims:
            for teacher in self.recipe.teachers:
                for bits in self.bits:
                    above, below = (
                        self.groups.get((teacher.label, *column.split("/"), bits))  # type: ignore[arg-type]
                        for column in (claim.above, claim.below)
                    )
                    if above is None or below is None or (found := difference(above, below)) is None:
                        continue
                    seeds = len(above.hits.keys() & below.hits.keys())
                    yield Verdict(claim, teacher, bits, above, below, found, seeds)

    def claims(self) -> TextTable | None:
        """Return the claims with their paired differences; None without any."""
        rows: list[list[str | Entry]] = [
            [
                verdict.claim.label or f"{verdict.claim.above} above {verdict.claim.below}",
                verdict.teacher.title,
                _int(verdict.bits),
                verdict.above.text,
                verdict.below.text,
                interval(verdict.difference),
                f"{verdict.claim.margin:g}",
                Entry(verdict.word, bold=verdict.word != "open"),
            ]
            for verdict in self.verdicts()
        ]
        header = ["claim", "network", "bits", "above", "below", "difference (95 %)", "margin", "verdict"]
        return text_table(header, rows, text_columns=3) if rows else None

    def costs(self) -> TextTable:
        """Return seconds and images of each group, means over seeds."""
        header = ["cell", "top-1 %", "fit s", "cell s", "calibration images", "labels %", "KiB"]
        rows = []
        for key, group in self.groups.items():
            resumed = "≥ " if any(line["resumed"] for line in group.lines) else ""
            rows.append(
                [
                    f"{key[0]}/{key[1]}/{key[2]}-{key[3]}",
                    group.text,
                    f"{resumed}{group.cost('fit_seconds', 1)}",
                    f"{resumed}{group.cost('seconds', 1)}",
                    group.cost("num_calibration_images", 0),
                    group.cost("label_recognition", 1),
                    f"{group.lines[0]['model_bytes'] / 1024:.0f}",
                ]
            )
        return text_table(header, rows)

    def figures(self) -> TextTable:
        """Return one row a group with plain numbers, for other programs."""
        header = [
            *("network", "method", "quantizer", "bits", "data_free", "seeds", "top1_mean", "top1_spread", "float_top1"),
            *("num_eval_images", "fit_seconds", "cell_seconds", "calibration_images", "label_recognition"),
        ]
        rows = [
            [
                *key,
                str(group.data_free).lower(),
                str(len(group.lines)),
                f"{group.mean:.4f}",
                "" if group.spread is None else f"{group.spread:.4f}",
                f"{group.lines[0]['float_top1']:.4f}",
                str(group.lines[0]["num_eval_images"]),
                group.cost("fit_seconds"),
                group.cost("seconds"),
                group.cost("num_calibration_images", 0),
                group.cost("label_recognition"),
            ]
            for key, group in self.groups.items()
        ]
        return text_table(header, rows, text_columns=4)

    def document(self) -> str:
        """Return all tables as Markdown, each with what its figures mean."""
        recipe = self.recipe
        parts = [f"# {recipe.title}\n"]
        if recipe.quantizers:
            parts += [self._explain(), to_markdown(self.table())]
        claims, gaps = self.claims(), self.gaps()
        if claims:
            parts += ["## Claims\n", CLAIMS_NOTE, to_markdown(claims)]
        if gaps:
            parts += ["## Share of the gap that is closed\n", GAPS_NOTE, to_markdown(gaps)]
        if self.groups:
            parts += ["## Cost\n", COSTS_NOTE, to_markdown(self.costs())]
        pictures = [(name, line["figure"]) for name, line in self.lines.items() if "figure" in line]
        if pictures:
            parts += ["## Samples\n", *(f"{name}:\n\n![{name}]({path})\n" for name, path in pictures)]
        skipped = [(name, line["reason"]) for name, line in self.lines.items() if line["status"] == SKIPPED]
        if skipped:
            parts += ["## Skipped\n", "".join(f"- `{name}`: {reason}\n" for name, reason in skipped)]
        if missing := len(self.grid) - len(self.lines):
            parts.append(f"{missing} of {len(self.grid)} cells have not been run.\n")
        return "\n".join(parts)

    def _explain(self) -> str:
        sets = ", ".join(dict.fromkeys(str(teacher.data) for teacher in self.recipe.teachers))
        seeds = ", ".join(map(str, self.recipe.seeds))
        over = f"mean ± standard deviation over seeds {seeds}" if len(self.recipe.seeds) > 1 else f"seed {seeds}"
        return (
            f"Top-1 in percent of `model.onnx` in ONNX Runtime on {sets}; {over}. "
            "DF: data-free; DD: made with real images. Bold: the best data-free entry of a network and width.\n"
        )


CLAIMS_NOTE = (
    "Difference in points, image by image, each image's correctness averaged over the seeds that both have, with its "
    "95 % interval: it is about other test images, not about other seeds. `holds`: the interval lies above minus the "
    "margin; `contradicted`: below it; `open`: neither.\n"
)
GAPS_NOTE = "Percent of the difference between the two methods; `no gap` where its 95 % interval reaches 0.\n"
COSTS_NOTE = (
    "Seconds of wall clock; a fit is paid once for all cells of a method and seed. `≥`: resumed after a stop.\n"
)


def interval(found: Difference) -> str:
    """Return a difference with its interval, in points."""
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _int(bits: str) -> str:
    return f"INT{bits}" if bits.isdecimal() else bits


def _share(group: Group | None, low: Group, high: Group, *, significant: bool) -> str:
    """Return the percentage of the gap that is closed; nothing where there is no gap to speak of."""
    if group is None:
        return EMPTY
    if not significant:
        return "no gap"
    return f"{100 * (group.mean - low.mean) / (high.mean - low.mean):.0f} %"

"""Tables of a comparison: its statistics as text."""

from collections.abc import Iterable

from zsq.comparison.recipe import MethodEntry, QuantizerEntry, TeacherEntry, gap_of
from zsq.comparison.statistics import Gap, Group, Key, Outcomes, difference
from zsq.evaluation.accuracy import Difference
from zsq.quantization.prepare import Bits
from zsq.reports.text_tables import EMPTY, Entry, TextTable, text_table


def main_table(outcomes: Outcomes) -> TextTable:
    """Return the table in the form that the recipe asks for; without the rows of which no cell is finished."""
    return _rows(outcomes) if outcomes.recipe.layout == "rows" else _columns(outcomes)


def _columns(outcomes: Outcomes) -> TextTable:
    rows: list[list[str | Entry]] = []
    for teacher in outcomes.recipe.teachers:
        for bits in [b for b in outcomes.bits if b in (teacher.bits or outcomes.bits)]:
            groups = _row(outcomes, teacher, bits)
            if any(groups):
                start = [outcomes.titled(teacher), _int(bits), _float(outcomes, teacher)]
                rows.append([*start, *_entries(groups)])
    header = ["network", "bits", "float", *(_heading(outcomes, *column) for column in outcomes.columns)]
    return text_table(header, rows, text_columns=2)


def _rows(outcomes: Outcomes) -> TextTable:
    teachers = outcomes.recipe.teachers
    floats = [_float(outcomes, teacher) for teacher in teachers]
    rows: list[list[str | Entry]] = [["pretrained", "FL32", "FL32", *floats]]
    for bits in outcomes.bits:
        by_teacher = [_entries(_row(outcomes, teacher, bits)) for teacher in teachers]
        width = Bits.parse(bits)
        for column, *entries in zip(outcomes.columns, *by_teacher, strict=True):
            heading = _heading(outcomes, *column)
            rows.append([heading, f"INT{width.weight}", f"INT{width.activation}", *entries])
    titles = [outcomes.titled(teacher) for teacher in teachers]
    return text_table(["data", "weights", "activations", *titles], rows, text_columns=3)


def _float(outcomes: Outcomes, teacher: TeacherEntry) -> str:
    first = outcomes.first(teacher)
    return _figure(None if first is None else first.float_score)


def _row(outcomes: Outcomes, teacher: TeacherEntry, bits: str) -> list[Group | None]:
    """Return the groups of a network and width, one a column of the table."""
    return [
        outcomes.groups.get((teacher.label, method.label, quantizer.label, bits))
        for method, quantizer in outcomes.columns
    ]


def _heading(outcomes: Outcomes, method: MethodEntry, quantizer: QuantizerEntry) -> str:
    """Name a column as the paper does: DF-PTQ, DD-QAT; without prefix as long as nothing is finished."""
    title = quantizer.title if quantizer.title != quantizer.label else quantizer.label.upper()
    prefix = {True: "DF-", False: "DD-", None: ""}[outcomes.data_free(method, quantizer)]
    return f"{method.title} {prefix}{title}"


def _entries(groups: list[Group | None]) -> list[Entry]:
    """Return one entry a group, the best data-free ones bold; equal in print is equal."""
    shown = [_figure(group.mean) if group and group.data_free else "" for group in groups]
    best = max((text for text in shown if text), key=float, default="none")
    return [Entry(_accuracy(group), bold=text == best) for group, text in zip(groups, shown, strict=True)]


def claims_table(outcomes: Outcomes) -> TextTable | None:
    """Return the claims with their paired differences; None without any."""
    rows: list[list[str | Entry]] = [
        [
            verdict.claim.label or f"{verdict.claim.above} above {verdict.claim.below}",
            verdict.teacher.title,
            _int(verdict.bits),
            _accuracy(verdict.above),
            _accuracy(verdict.below),
            _interval(verdict.difference),
            f"{verdict.claim.margin:g}",
            Entry(verdict.word, bold=verdict.word != "open"),
        ]
        for verdict in outcomes.verdicts()
    ]
    header = ["claim", "network", "bits", "above", "below", "difference (95 %)", "margin", "verdict"]
    return text_table(header, rows, text_columns=3) if rows else None


def differences_table(outcomes: Outcomes) -> TextTable | None:
    """Return how each group differs from the float network and from the other methods; None before a cell is done."""
    methods = outcomes.recipe.methods
    rows = [
        [
            *_titles(outcomes, key),
            _accuracy(group),
            EMPTY if group.minus_float is None else _interval(group.minus_float),
            *(_minus(outcomes, key, other) for other in methods if len(methods) > 1),
        ]
        for key, group in outcomes.groups.items()
    ]
    others = [f"minus {method.title}" for method in methods if len(methods) > 1]
    header = ["network", "bits", "method", "quantizer", f"{outcomes.measure} %", "minus float", *others]
    return text_table(header, rows, text_columns=4) if rows else None


def _titles(outcomes: Outcomes, key: Key) -> list[str]:
    """Return what the columns of text say of a group."""
    teacher, method, quantizer, bits = key
    networks = {entry.label: outcomes.titled(entry) for entry in outcomes.recipe.teachers}
    methods = {entry.label: entry.title for entry in outcomes.recipe.methods}
    return [networks[teacher], _int(bits), methods[method], quantizer]


def _minus(outcomes: Outcomes, key: Key, other: MethodEntry) -> str:
    """Return the difference of a group to that of another method; nothing to itself or without a common seed."""
    teacher, method, quantizer, bits = key
    group = outcomes.groups.get((teacher, other.label, quantizer, bits))
    if group is None or other.label == method or (found := difference(outcomes.groups[key], group)) is None:
        return EMPTY
    return _interval(found)


def gaps_table(outcomes: Outcomes) -> TextTable | None:
    """Return the share of the gap between two methods that each other one closes; None without the two."""
    ends = gap_of(outcomes.recipe)
    if ends is None:
        return None
    others = [method for method in outcomes.recipe.methods if method.label not in ends]
    rows = [
        [
            gap.teacher.title,
            gap.quantizer.label,
            _int(gap.bits),
            _interval(gap.difference),
            *(_share(gap, method) for method in others),
        ]
        for gap in outcomes.gaps()
    ]
    header = ["network", "quantizer", "bits", f"{ends[1]} minus {ends[0]} (95 %)", *(m.title for m in others)]
    return text_table(header, rows, text_columns=3) if rows else None


def _share(gap: Gap, method: MethodEntry) -> str:
    """Return the percentage of the gap that is closed; nothing where there is no gap to speak of."""
    group = gap.others.get(method.label)
    if group is None:
        return EMPTY
    return f"{gap.share(group):.0f} %" if gap.exists else "no gap"


def costs_table(outcomes: Outcomes) -> TextTable:
    """Return seconds and images of each group, means over seeds."""
    header = ["cell", f"{outcomes.measure} %", "fit s", "cell s", "calibration images", "labels %", "KiB"]
    return text_table(header, _costs(outcomes.groups.items()))


def _costs(groups: Iterable[tuple[Key, Group]]) -> Iterable[list[str]]:
    for (teacher, method, quantizer, bits), group in groups:
        at_least = "≥ " if group.resumed else ""
        yield [
            f"{teacher}/{method}/{quantizer}-{bits}",
            _accuracy(group),
            f"{at_least}{group.fit_seconds:.1f}",
            f"{at_least}{group.cell_seconds:.1f}",
            f"{group.num_calibration_images:.0f}",
            _figure(group.label_recognition, 1),
            f"{group.model_bytes / 1024:.0f}",
        ]


def figures_table(outcomes: Outcomes) -> TextTable:
    """Return one row a group with plain numbers, for other programs."""
    header = [
        *("network", "method", "quantizer", "bits", "data_free", "seeds"),
        *(
            "measure",
            "mean",
            "spread",
            "float",
            "num_eval_images",
            "fit_seconds",
            "cell_seconds",
            "calibration_images",
            "label_recognition",
        ),
    ]
    rows = [
        [
            *key,
            str(group.data_free).lower(),
            str(len(group.results)),
            group.measure,
            _figure(group.mean, 4),
            _figure(group.spread, 4),
            _figure(group.float_score, 4),
            str(group.num_eval_images),
            _figure(group.fit_seconds),
            _figure(group.cell_seconds),
            _figure(group.num_calibration_images, 0),
            _figure(group.label_recognition),
        ]
        for key, group in outcomes.groups.items()
    ]
    return text_table(header, rows, text_columns=4)


def _accuracy(group: Group | None) -> str:
    """Return mean and spread over seeds; a dash where no cell is finished."""
    if group is None:
        return EMPTY
    return _figure(group.mean) + ("" if group.spread is None else f" ± {group.spread:.2f}")


def _figure(value: float | None, digits: int = 2) -> str:
    """Return a figure; a dash where it does not apply."""
    return EMPTY if value is None else f"{value:.{digits}f}"


def _interval(found: Difference) -> str:
    """Return a difference with its interval, in points."""
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _int(bits: str) -> str:
    return f"INT{bits}" if bits.isdecimal() else bits

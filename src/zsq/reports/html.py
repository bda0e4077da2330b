"""Pages of one HTML file without network access: what they are made of, and the curves in them."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zsq.runtime.files import replacing

REPORT = "report.html"
"""Name of the file in a run's or a comparison's folder."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Of one series after the other. Source: Okabe and Ito, Color Universal Design, 2008."""

TEXT, RULE = "#010203", "#040506"
"""Colours of a drawing that become those of the page's scheme."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A place of a table: its text, and what it is sorted by."""

    text: str
    value: float | None = None
    """Sorted by this number; by the text without one."""
    share: float | None = None
    """Length of a bar, from 0 to 1; None draws none."""


@dataclass(frozen=True, slots=True)
class Table:
    """A header and rows; a click on a heading sorts."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in the page."""

    source: str
    """As a data URI."""
    text: str
    """What it shows."""
    kind: str = "picture"


@dataclass(frozen=True, slots=True)
class Drawings:
    """Curves beside each other."""

    drawings: tuple[Markup, ...]
    kind: str = "drawings"


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of text, one a point of a list; or verbatim."""

    lines: tuple[str, ...]
    verbatim: bool = False
    kind: str = "lines"


Block = Table | Picture | Drawings | Lines


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page."""

    title: str
    blocks: tuple[Block, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    level: str
    """How the verdict is shown: `good`, `fair`, `poor` or `weak`, where little is known."""
    verdict: str
    """In a few words."""
    reasons: tuple[str, ...]
    """What it rests on, a sentence each."""
    sections: tuple[Section, ...]


def table(header: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> Table:
    """Return a table; plain text is a cell that sorts as text."""
    return Table(tuple(header), tuple(tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows))


def picture(path: Path, text: str) -> Picture:
    """Return a PNG file as a picture in the page."""
    return Picture(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", text)


def write_page(page: Page, path: Path) -> None:
    """Write a page; it appears whole or not at all."""
    environment = Environment(
        loader=PackageLoader("zsq.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("report.html").render(page=page)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def curve(title: str, steps: Sequence[float], values: Sequence[float]) -> Markup:
    """Return one loss over its steps; values that are not finite are gaps."""
    figure, panel = _panel(title, (3.4, 2.0))
    known = [value for value in values if math.isfinite(value)]
    panel.plot(steps, [value if math.isfinite(value) else math.nan for value in values], color=COLOURS[0], lw=1.4)
    if known and min(known) > 0 and max(known) > 20 * min(known):
        panel.set_yscale("log")
    panel.set_xlabel("step", color=TEXT)
    return _svg(figure, title)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a series with its interval."""

    x: float
    y: float
    low: float
    high: float
    label: str


def scatter(
    title: str, x_label: str, series: Mapping[str, Sequence[Point]], level: tuple[str, float] | None = None
) -> Markup:
    """Return points with intervals, one colour and marker a series; `level` is a line across with its name."""
    figure, panel = _panel(title, (5.2, 3.2))
    for index, (name, points) in enumerate(series.items()):
        look = index % len(COLOURS)
        reach = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
        panel.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=reach,
            fmt=MARKERS[look],
            color=COLOURS[look],
            ms=5,
            lw=1,
            capsize=2,
            label=name,
        )
        for p in points:
            panel.annotate(
                p.label, (p.x, p.y), (5, 4), textcoords="offset points", fontsize=7, color=TEXT, parse_math=False
            )
    if level is not None:
        panel.axhline(level[1], color=TEXT, lw=0.8, ls="--", label=level[0])
    panel.set_xlabel(x_label, color=TEXT)
    legend = panel.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _svg(figure, title)


def _panel(title: str, size: tuple[float, float]):  # type: ignore[no-untyped-def]  # of matplotlib's own types
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    panel = figure.subplots()
    panel.patch.set_alpha(0)
    panel.set_title(title, fontsize=9, color=TEXT, loc="left", parse_math=False)
    panel.tick_params(labelsize=8, color=TEXT, labelcolor=TEXT, which="both")
    panel.grid(color=RULE, lw=0.6)
    for name, spine in panel.spines.items():
        spine.set_color(TEXT)
        spine.set_visible(name in ("left", "bottom"))
    return figure, panel


def _svg(figure, title: str) -> Markup:  # type: ignore[no-untyped-def]
    """Return a figure as an element whose text and rules have the colours of the page."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace(TEXT, "currentColor").replace(RULE, "var(--rule)")
    return Markup(text.replace("<svg ", '<svg role="img" ', 1))

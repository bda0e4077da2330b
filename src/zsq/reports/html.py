"""Pages of one HTML file without network access: what they are made of, and the curves in them."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from zsq.runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

REPORT = "report.html"
"""Name of the file in a run's or a comparison's folder."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Of one series after the other; six times seven before a pair repeats. Source: Okabe and Ito, Color Universal Design,
2008."""

BESIDE = 7.0
"""Points of type by which one series stands beside the next."""

FAR_APART = 5.0
"""Quotient of the ends from which an axis is logarithmic."""

FEW_POINTS = 10
"""Points below which a curve shows each."""

LARGE_TILE = 64
"""Longer side in pixels from which small images are stored as JPEG."""

LARGE_PICTURE = 300_000
"""Bytes of a PNG from which a whole picture is."""

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
class Tile:
    """One small image of a gallery."""

    source: str
    """As a data URI."""
    caption: str = ""
    marked: bool = False
    """Whether the caption says that something is wrong."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Rows of small images, each with a title and what there is to say of it."""

    rows: tuple[tuple[str, str, tuple[Tile, ...]], ...]
    kind: str = "gallery"


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


Block = Table | Picture | Gallery | Drawings | Lines


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


def tiles(path: Path, rows: int, columns: int, shown: int) -> list[list[str]]:
    """Return the first images of each row of a grid that `zsq.reports.pictures.write_grid` wrote, as data URIs.

    Large ones lose a little to JPEG, so that a page of them stays small.

    Raises:
        ValueError: the picture is no such grid.
    """
    with Image.open(path) as image:
        width, height = image.width // columns, image.height // rows
        if rows * height != image.height or columns * width != image.width or min(width, height) < 3:
            raise ValueError(f"{image.width}x{image.height} pixels do not make {rows} rows of {columns}")
        return [
            [_inline(image.crop(_inside(x * width, y * height, width, height))) for x in range(min(columns, shown))]
            for y in range(rows)
        ]


def _inside(left: int, top: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box of a tile without its frame of one pixel."""
    return left + 1, top + 1, left + width - 1, top + height - 1


def _inline(image: Image.Image) -> str:
    form, file = "PNG" if max(image.size) < LARGE_TILE else "JPEG", io.BytesIO()
    image.convert("RGB").save(file, format=form, quality=85)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(path: Path, text: str) -> Picture:
    """Return a PNG file as a picture in the page; a large one as JPEG."""
    if path.stat().st_size > LARGE_PICTURE:
        with Image.open(path) as image:
            return Picture(_inline(image), text)
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
    draw_loss(panel, steps, values)
    panel.set_xlabel("step", color=TEXT)
    return _svg(figure, title)


def draw_loss(panel: "Axes", steps: Sequence[float], values: Sequence[float]) -> None:
    """Draw a loss over its steps into a panel: points while there are few, and a line; gaps where it is not finite."""
    from matplotlib.ticker import MaxNLocator

    known = [value for value in values if math.isfinite(value)]
    finite = [value if math.isfinite(value) else math.nan for value in values]
    panel.plot(steps, finite, color=COLOURS[0], lw=1.4, marker="o" if len(values) < FEW_POINTS else "", ms=3)
    if known and min(known) > 0 and max(known) > 20 * min(known):
        panel.set_yscale("log")
    else:
        panel.ticklabel_format(axis="y", useOffset=False)
        if known and min(known) == max(known):
            panel.set_ylim(known[0] - (abs(known[0]) or 1), known[0] + (abs(known[0]) or 1))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


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
    """Return points with intervals; `level` is a line across with its name.

    A series has its own colour and marker by its place, those without points too, so that one name looks the same in
    every drawing. Series stand a little beside each other; a label that would lie on another is left out.
    """
    figure, panel = _panel(title, (5.2, 3.8))
    shown = {name: (place, points) for place, (name, points) in enumerate(series.items()) if points}
    drawn: list[tuple[Point, Transform]] = []
    for order, (name, (place, points)) in enumerate(shown.items()):
        beside = _beside(figure, panel, order - (len(shown) - 1) / 2)
        panel.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=[[p.y - p.low for p in points], [p.high - p.y for p in points]],
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            transform=beside,
            ms=5,
            lw=1,
            capsize=2,
            label=name,
        )
        drawn += [(point, beside) for point in points]
    if level is not None:
        panel.axhline(level[1], color=TEXT, lw=0.8, ls="--", label=level[0])
    _set_reach(panel, [point for point, _ in drawn], None if level is None else level[1])
    panel.set_xlabel(x_label, color=TEXT)
    legend = figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False, labelcolor=TEXT)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.draw_without_rendering()  # places of the points in pixels
    _label(panel, drawn)
    return _svg(figure, title)


def _beside(figure: "Figure", panel: "Axes", steps: float) -> "Transform":
    """Return the panel's transform, so many steps to the right."""
    from matplotlib.transforms import ScaledTranslation

    return panel.transData + ScaledTranslation(steps * BESIDE / 72, 0, figure.dpi_scale_trans)


def _set_reach(panel: "Axes", points: Sequence[Point], level: float | None) -> None:
    """Let the axes hold all points with room beside them; across, they are logarithmic where places lie far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(point.x for point in points), max(point.x for point in points)
    if low > 0 and high > FAR_APART * low:
        panel.set_xscale("log")
        panel.set_xlim(low / 1.6, high * 1.6)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        room = 0.2 * max(high - low, 0.1 * high) or 1.0
        panel.set_xlim(low - room, high + room)
    ends = [end for point in points for end in (point.low, point.high)] + ([] if level is None else [level])
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    panel.set_ylim(min(ends) - room, max(ends) + room)


def _label(panel: "Axes", drawn: "Sequence[tuple[Point, Transform]]") -> None:
    """Write labels beside their points where neither another label nor a point is."""
    from matplotlib.transforms import Bbox

    taken = []
    for point, beside in drawn:
        (x, low), (_, high) = (beside.transform((point.x, end)) for end in (point.low, point.high))
        taken.append(Bbox.from_extents(x - 3, low, x + 3, high))
    for point, beside in drawn:
        for offset, side in (((6, 0), "left"), ((-6, 0), "right")):
            text = panel.annotate(
                point.label,
                (point.x, point.y),
                offset,
                xycoords=beside,
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7,
                color=TEXT,
                parse_math=False,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and panel.bbox.x0 < box.x0 < box.x1 < panel.bbox.x1:
                taken.append(box)
                break
            text.remove()


def _panel(title: str, size: tuple[float, float]) -> "tuple[Figure, Axes]":
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


def _svg(figure: "Figure", title: str) -> Markup:
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

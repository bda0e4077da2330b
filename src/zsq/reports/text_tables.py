"""Tables of text for a terminal, and as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from zsq.runtime.plain_text import printable

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "−": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""What LaTeX reads as something else, or not at all."""

NO_WIDER = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%"
"""Shrinks what follows to the width of the text where it is wider."""

EMPTY = "-"


@dataclass(frozen=True, slots=True)
class Entry:
    """One place of a table."""

    text: str = EMPTY
    bold: bool = False


@dataclass(frozen=True, slots=True)
class TextTable:
    """A header and rows of as many entries; the first columns are text, the others figures."""

    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    text_columns: int = 1

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


def text_table(header: Iterable[str], rows: Iterable[Iterable[str | Entry]], text_columns: int = 1) -> TextTable:
    """Return a table; plain text stands for an entry that is not bold."""
    entries = (tuple(e if isinstance(e, Entry) else Entry(e) for e in row) for row in rows)
    return TextTable(tuple(header), tuple(entries), text_columns)


def to_markdown(table: TextTable) -> str:
    """Return a Markdown table; bold entries stand between two pairs of stars.

    >>> print(to_markdown(text_table(["a", "b"], [["x|y", Entry("1.00", bold=True)]])), end="")
    | a | b |
    | --- | ---: |
    | x\\|y | **1.00** |
    """
    marks = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    rows = [[f"**{escaped(e.text)}**" if e.bold else escaped(e.text) for e in row] for row in table.rows]
    lines = [[escaped(text) for text in table.header], marks, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escaped(text: str) -> str:
    """Return text for one place of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def to_csv(table: TextTable) -> str:
    """Return comma-separated lines; bold is left out, and what is not there is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([("" if e.text == EMPTY else e.text) for e in row] for row in table.rows)
    return file.getvalue()


def to_latex(table: TextTable, caption: str = "") -> str:
    r"""Return a `table` with a `tabular` that needs the packages booktabs and graphicx.

    It is shrunk to the width of the text where it is wider, and the last word of a figure's heading has its own line.

    >>> print(to_latex(text_table(["a_b", "c PTQ"], [["x", Entry("1 ± 2", bold=True)]])), end="")
    % needs \usepackage{booktabs,graphicx}
    \begin{table}
    \centering
    \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
    \begin{tabular}{lr}
    \toprule
    a\_b & \shortstack[r]{c\\PTQ} \\
    \midrule
    x & \textbf{1 $\pm$ 2} \\
    \bottomrule
    \end{tabular}}
    \end{table}
    """
    kinds = "".join("l" if i < table.text_columns else "r" for i in range(len(table.header)))
    rows = [[f"\\textbf{{{latex(e.text)}}}" if e.bold else latex(e.text) for e in row] for row in table.rows]
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        "\\begin{table}",
        "\\centering",
        *([f"\\caption{{{latex(caption)}}}"] if caption else []),
        NO_WIDER,
        f"\\begin{{tabular}}{{{kinds}}}",
        "\\toprule",
        _line([latex(text) if i < table.text_columns else _stacked(text) for i, text in enumerate(table.header)]),
        "\\midrule",
        *map(_line, rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _stacked(heading: str) -> str:
    first, space, last = heading.rpartition(" ")
    return f"\\shortstack[r]{{{latex(first)}\\\\{latex(last)}}}" if space else latex(last)


def _line(texts: list[str]) -> str:
    texts = [f"{{}}{texts[0]}" if texts[0].startswith("[") else texts[0], *texts[1:]]  # \\ [ would be a length
    return " & ".join(texts) + " \\\\"


def latex(text: str) -> str:
    r"""Return text as LaTeX shows it.

    >>> latex("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return "".join(LATEX.get(character, character) for character in text)


def percent(value: float | None, digits: int = 2) -> str:
    """Return a percentage for a table; a dash where it was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table to print; the first column is text, which wraps where it must, the others are figures."""
    result = Table(title=printable(title), title_justify="left")
    for index, column in enumerate(columns):
        if index == 0:
            result.add_column(column, overflow="fold")
        else:
            result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*map(printable, row))
    return result


def fitting(found: TextTable, title: str, width: int) -> Table:
    """Return a table to print that is no wider than a terminal: where it would be, an entry a row."""
    least = _widths(found)
    if sum(least) + 3 * len(least) + 1 > width:
        found = _entry_a_row(found)
        least = _widths(found)
    result = Table(title=title, title_justify="left")
    for index, (heading, needed) in enumerate(zip(found.header, least, strict=True)):
        figures = index >= found.text_columns
        result.add_column(
            heading, justify="right" if figures else "left", min_width=needed if figures else None, overflow="fold"
        )
    for row in found.rows:
        result.add_row(*(Text(entry.text, style="bold" if entry.bold else "") for entry in row))
    return result


def _widths(found: TextTable) -> list[int]:
    """Return the least width of each column: no entry and no word of a heading is broken."""
    rows = [[entry.text for entry in row] for row in found.rows]
    words = [heading.split() for heading in found.header]
    return [max(map(len, [*words[index], *(row[index] for row in rows)])) for index in range(len(words))]


def _entry_a_row(found: TextTable) -> TextTable:
    """Return a table with one row for each figure of another."""
    first = found.text_columns
    rows = [
        (Entry(", ".join(e.text for e in row[:first])), Entry(name), entry)
        for row in found.rows
        for name, entry in zip(found.header[first:], row[first:], strict=True)
        if entry.text != EMPTY
    ]
    return TextTable((", ".join(found.header[:first]), "figure", "top-1 %"), tuple(rows), 2)

"""Tables as text: what is escaped, and that each row has as many places as the header."""

import csv
import io
import re

import pytest
from rich.console import Console

from zsq.reports.text_tables import Entry, fitting, latex, text_table, to_csv, to_latex, to_markdown

TABLE = text_table(
    ["net_work", "a & b", "c|d"],
    [["ResNet-18", "71.92", Entry("71.72 ± 0.05", bold=True)], ["50 % {x}", "-", "[1]"]],
)


def test_markdown_is_bold_between_stars_and_figures_stand_right():
    assert to_markdown(TABLE) == (
        "| net_work | a & b | c\\|d |\n"
        "| --- | ---: | ---: |\n"
        "| ResNet-18 | 71.92 | **71.72 ± 0.05** |\n"
        "| 50 % {x} | - | [1] |\n"
    )


def test_csv_holds_what_can_be_computed_with():
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows[1] == ["ResNet-18", "71.92", "71.72 ± 0.05"]
    assert rows[2][1] == ""


def test_latex_is_a_booktabs_tabular():
    text = to_latex(TABLE, caption="INT8 & more")
    lines = text.splitlines()
    assert "\\usepackage{booktabs,graphicx}" in lines[0]
    assert lines[0].startswith("%")
    assert "\\caption{INT8 \\& more}" in lines
    assert "\\begin{tabular}{lrr}" in lines
    assert "net\\_work & \\shortstack[r]{a \\&\\\\b} & c|d \\\\" in lines
    assert "ResNet-18 & 71.92 & \\textbf{71.72 $\\pm$ 0.05} \\\\" in lines
    assert [line for line in lines if line.startswith("\\begin")] == ["\\begin{table}", "\\begin{tabular}{lrr}"]
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    rows = [line for line in lines if line.endswith(" \\\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}
    assert [lines.index(f"\\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == sorted(
        lines.index(f"\\{rule}") for rule in ("toprule", "midrule", "bottomrule")
    )


def test_a_bracket_behind_a_line_end_is_no_length():
    assert "\n{}[1] \\\\" in to_latex(text_table(["a"], [["b"], ["[1]"]]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a_b", r"a\_b"),
        ("50 %", r"50 \%"),
        ("\\", r"\textbackslash{}"),  # and not \textbackslash\{\}
        ("x^2 ~ {y} #1 $", r"x\textasciicircum{}2 \textasciitilde{} \{y\} \#1 \$"),
        ("1 ± 2 ≥ 0", r"1 $\pm$ 2 $\geq$ 0"),
    ],
)
def test_what_latex_would_read_otherwise_is_escaped(text, wanted):
    assert latex(text) == wanted


def test_rows_have_the_headers_length():
    with pytest.raises(AssertionError):
        text_table(["a", "b"], [["1"]])


@pytest.mark.parametrize("methods", [2, 12])
def test_a_table_of_a_terminal_is_no_wider_than_it(methods):
    header = ["network", "bits", *(f"METHOD{i} DF-PTQ" for i in range(methods))]
    entries = [Entry(f"9{i}.00 ± 0.10", bold=i == 1) for i in range(methods)]
    found = fitting(text_table(header, [["digits", "INT8", *entries]], text_columns=2), "title", 80)
    text = io.StringIO()
    Console(file=text, width=80).print(found)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for i in range(methods):
        assert f"9{i}.00 ± 0.10" in text.getvalue()
    assert ("digits, INT8" in text.getvalue()) == (methods == 12)  # an entry a row

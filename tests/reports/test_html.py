"""Drawings of a page."""

import math

from zsq.reports.html import COLOURS, MARKERS, Point, curve, scatter


def test_series_have_colours_of_their_own_and_names_are_text() -> None:
    series = {name: [Point(x, 90 + x, 80, 99, "ptq $8 <b>")] for x, name in enumerate(("noise", "<script>x</script>"))}
    text = scatter("top-1, %", "KiB", series, ("float", 97.0))
    assert "<script>" not in text
    assert "&lt;script&gt;x" in text
    assert all(colour.lower() in text for colour in COLOURS[:2])
    assert "currentColor" in text
    assert 'id="figure' not in text


def test_a_curve_of_nothing_finite_is_drawn_empty() -> None:
    assert curve("ce", [10, 20], [math.nan, math.inf]).startswith("<svg")


def test_a_method_keeps_its_look_where_others_are_missing() -> None:
    point = Point(1, 90, 80, 99, "ptq 8")
    text = scatter("top-1, %", "KiB", {"zscgan": [], "noise": [point]})
    assert COLOURS[0].lower() not in text
    assert COLOURS[1].lower() in text
    assert len({(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(42)}) == 42


def test_labels_that_would_lie_on_others_are_left_out() -> None:
    text = scatter("top-1, %", "KiB", {f"m{i}": [Point(100, 90, 89, 91, f"label {i}")] for i in range(5)})
    assert [i for i in range(5) if f">label {i}<" in text] == [0, 4]


def test_what_lies_far_apart_has_a_logarithmic_axis() -> None:
    near, far = Point(1, 90, 89, 91, "a"), Point(1000, 92, 91, 93, "b")
    assert ">500<" in scatter("top-1, %", "seconds", {"m": [near, far]})
    assert ">50<" not in scatter("top-1, %", "seconds", {"m": [near, Point(2, 92, 91, 93, "b")]})

"""Drawings of a page."""

import math

from zsq.reports.html import COLOURS, Point, curve, scatter


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

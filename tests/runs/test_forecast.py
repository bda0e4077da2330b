"""When a run should end, on machines as fast as expected, slower ones, and ones that get slower."""

import pytest

from zsq.runs.forecast import OVERDUE, PRIOR_SECONDS, Forecast

EXPECTED = {"fit": 100.0, "calibrate 1/1": 20.0, "distill": 60.0, "write": 10.0}


def followed(slowness: float, **options: object) -> tuple[Forecast, float]:
    """Return the forecast of a run whose fit has been half done at that slowness, and the time."""
    forecast = Forecast(EXPECTED, **options)
    for step in range(6):
        forecast.update("fit", 10 * step, 100, now := 1000 + 10 * step * slowness)
    return forecast, now


@pytest.mark.parametrize("slowness", [0.5, 1.0, 3.0])
def test_phases_ahead_take_as_much_longer_as_those_behind(slowness):
    forecast, now = followed(slowness)
    assert forecast.of_phase(now) == pytest.approx(50 * slowness)
    assert forecast.slowness == pytest.approx((50 * slowness + PRIOR_SECONDS) / (50 + PRIOR_SECONDS))
    assert forecast.left(now) == pytest.approx(50 * slowness + 90 * forecast.slowness)


def test_what_was_guessed_says_nothing_of_the_machine():
    forecast, now = followed(8.0, guessed={"fit", "distill"})
    assert forecast.left(now) == pytest.approx(50 * 8 + 90)


def test_phases_that_are_left_out_or_end_early_are_behind():
    forecast, now = followed(1.0)
    forecast.update("distill", 0, 60, now)
    assert forecast.left(now) == pytest.approx(60 + 10)
    forecast.update("something else", 1, 2, now)
    assert forecast.of_phase(now) is None
    assert forecast.rest() == pytest.approx(10)


def test_a_phase_that_is_continued_goes_by_its_new_steps():
    forecast = Forecast(EXPECTED)
    forecast.update("fit", 80, 100, 0.0)
    forecast.update("fit", 90, 100, 40.0)
    assert forecast.of_phase(40.0) == pytest.approx(40)


def test_a_phase_that_tells_nothing_counts_down_and_never_ends_before_it_does():
    forecast = Forecast({"write": 10.0})
    forecast.update("write", 0, 1, 0.0)
    assert [forecast.left(now) for now in (0.0, 4.0, 40.0)] == [10.0, 6.0, 40 * OVERDUE]
    forecast.update("write", 1, 1, 41.0)
    assert forecast.left(41.0) == 0

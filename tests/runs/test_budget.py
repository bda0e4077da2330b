import re
from collections.abc import Callable
from functools import partial

import pytest

from zsq.errors import InputError
from zsq.models.teacher import load_teacher
from zsq.quantization.qat import Distiller
from zsq.quantization.quantizers import quantizers
from zsq.runs import budget
from zsq.runs.budget import (
    FIT_SHARE,
    MOST_DISTILL_STEPS,
    MOST_FIT_STEPS,
    RESERVE,
    _choose,
    parse_duration,
    plan,
    seconds_each,
)
from zsq.runs.settings import resolve
from zsq.training.loop import Run


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120), (45, 45), (2.5, 2.5), ("0.5s", 0.5)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "-5m", "0", "0s", "5m30s", "five", "1e3", "nan", "5 minutes", "."])
def test_other_durations_are_quoted(text):
    with pytest.raises(InputError, match=f"budget is '{re.escape(text)}'; give a time such as 90s, 5m or 1.5h"):
        parse_duration(text)


def test_calibration_alone_fills_the_time_with_fit_steps():
    chosen = _choose(resolve(), 0.25, 0.0, 100.0, fitted=False)
    assert chosen.method.steps == 400
    assert chosen.distill_steps == 0


def test_fit_and_distillation_share_the_time():
    chosen = _choose(resolve(quantizer="qat"), 0.5, 0.25, 100.0, fitted=False)
    assert chosen.method.steps == 100 * FIT_SHARE / 0.5
    assert chosen.distill_steps == 160  # 40 s of 0.25 s
    assert 0.5 * chosen.method.steps + 0.25 * chosen.distill_steps == 100


def test_a_reused_generator_leaves_all_the_time_to_distillation():
    chosen = _choose(resolve(quantizer="qat"), 0.0, 0.25, 100.0, fitted=True)
    assert chosen.distill_steps == 400
    assert chosen.method == resolve().method


def test_chosen_steps_are_left_alone_and_their_time_is_taken_off():
    wanted = resolve(quantizer="qat", assignments=["method.steps=60"])
    chosen = _choose(wanted, 0.5, 0.25, 100.0, fitted=False)
    assert (chosen.method.steps, chosen.distill_steps) == (60, 280)  # (100 - 60 * 0.5) / 0.25
    wanted = resolve(quantizer="qat", assignments=["quantizer.steps=80"])
    chosen = _choose(wanted, 0.5, 0.25, 100.0, fitted=False)
    assert (chosen.method.steps, chosen.distill_steps) == (160, 80)  # (100 - 80 * 0.25) / 0.5
    wanted = resolve(quantizer="qat", assignments=["method.steps=7", "quantizer.steps=8"])
    assert _choose(wanted, 0.5, 0.25, 0.0, fitted=False) == wanted


def test_nothing_to_train_needs_no_time():
    wanted = resolve(method="noise")
    assert _choose(wanted, 0.0, 0.0, -5.0, fitted=False) == wanted


def test_no_more_steps_than_the_paper_takes():
    chosen = _choose(resolve(quantizer="qat"), 0.001, 0.001, 1e6, fitted=False)
    assert (chosen.method.steps, chosen.distill_steps) == (MOST_FIT_STEPS, MOST_DISTILL_STEPS)


def test_time_that_the_longest_fit_leaves_goes_to_distillation():
    available = 1.5 * MOST_FIT_STEPS * 0.001 / FIT_SHARE  # fit alone would take half as many steps again
    chosen = _choose(resolve(quantizer="qat"), 0.001, 0.01, available, fitted=False)
    assert chosen.method.steps == MOST_FIT_STEPS
    assert chosen.distill_steps == int((available - MOST_FIT_STEPS * 0.001) / 0.01)


@pytest.mark.parametrize(
    ("quantizer", "assignments", "available", "phase", "each"),
    [
        ("ptq", [], 4.0, "fit", "0.50"),
        ("ptq", [], -30.0, "fit", "0.50"),
        ("qat", [], 6.0, "fit", "0.50"),
        ("qat", ["method.steps=4"], 3.0, "distillation", "0.25"),
    ],
)
def test_too_small_a_budget_says_how_much_is_missing(quantizer, assignments, available, phase, each):
    wanted = resolve(quantizer=quantizer, assignments=assignments)
    distill_seconds = 0.25 if quantizer == "qat" else 0.0
    with pytest.raises(InputError, match=rf"\d steps of {phase}, at {each} s a step") as caught:
        _choose(wanted, 0.5, distill_seconds, available, fitted=False)
    more = int(re.search(r"at least (\d+) s more", str(caught.value))[1])
    enough = _choose(wanted, 0.5, distill_seconds, available + RESERVE * more, fitted=False)
    assert enough.method.steps >= 10 or assignments
    assert enough.distill_steps >= 10 or quantizer == "ptq"
    with pytest.raises(InputError):
        _choose(wanted, 0.5, distill_seconds, available + RESERVE * (more - 2), fitted=False)


def test_seconds_each_leaves_the_first_call_out(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])

    def action(index: int) -> None:
        calls.append(index)
        clock[0] += 50.0 if index == 0 else 0.5

    assert seconds_each(action, at_least=3, at_least_seconds=2.0) == 0.5
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_plan_measures_and_touches_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(budget.seconds_each, "__kwdefaults__", {"at_least": 2, "at_least_seconds": 0.05})
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("digits")
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    wanted = resolve(quantizer="qat", assignments=["quantizer.num_samples=100", "quantizer.steps=11"])
    planned = plan(wanted, teacher, Run(tmp_path / "run"), 60.0, num_eval_images=899, fitted=False)
    assert planned.settings.distill_steps == 11
    assert planned.settings.method.steps > 10
    assert planned.fit_step_seconds > 0
    assert planned.distill_step_seconds > 0
    assert planned.fixed_seconds > 0
    assert planned.expected_seconds == pytest.approx(RESERVE * 60, rel=0.05)
    assert list(tmp_path.iterdir()) == []
    assert all(value.equal(before[name]) for name, value in teacher.network.state_dict().items())


@pytest.mark.parametrize(("scales", "trained"), [("learnable", True), ("moving-average", False)])
def test_the_student_that_is_timed_trains_the_scales_that_the_run_trains(
    scales: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Distiller] = []

    def noted(action: Callable[[int], object], **_: float) -> float:
        if isinstance(action, partial) and isinstance(action.args[0], Distiller):
            timed.append(action.args[0])
        return 0.01

    monkeypatch.setattr(budget, "seconds_each", noted)
    wanted = resolve(method="noise", quantizer="qat", assignments=[f"quantizer.scales={scales}"])
    plan(wanted, load_teacher("digits"), Run(), 60.0, num_eval_images=0, fitted=False)
    (distiller,) = timed
    assert {quantizer.learnable for quantizer in quantizers(distiller.student)} == {trained}

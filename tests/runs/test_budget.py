import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

import zsq
from zsq.errors import InputError
from zsq.models.teacher import load_teacher
from zsq.quantization import PTQ
from zsq.quantization.qat import Distiller
from zsq.quantization.quantizers import quantizers
from zsq.runs import budget
from zsq.runs.budget import (
    FIT_SHARE,
    LARGE_RATE,
    LARGE_SAMPLES,
    LEAST_EVALUATED,
    LEAST_SAMPLES,
    LEAST_STEPS,
    MOST_DISTILL_STEPS,
    MOST_FIT_STEPS,
    RESERVE,
    REST_SHARE,
    Costs,
    Plan,
    _choose,
    fill,
    parse_duration,
    plan,
    rest_seconds,
    seconds_each,
    sized,
)
from zsq.runs.settings import resolve
from zsq.training.loop import Run
from zsq.types import ImageSpec


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


@pytest.mark.parametrize(("quantizer", "distill_seconds"), [("ptq", 0.0), ("qat", 0.25)])
@pytest.mark.parametrize("available", [4.0, 0.0, -30.0])
def test_a_budget_always_runs(quantizer, distill_seconds, available):
    chosen = _choose(resolve(quantizer=quantizer), 0.5, distill_seconds, available, fitted=False)
    assert chosen.method.steps == LEAST_STEPS
    assert chosen.distill_steps == (LEAST_STEPS if quantizer == "qat" else 0)


def costs(**changes: float) -> Costs:
    """Return costs whose parts are easy to tell apart."""
    return replace(Costs(fit_step=1.0, distill_step=0.0, image=0.01, fixed=10.0), **changes)


def test_calibration_and_evaluation_shrink_before_the_fit_does():
    wanted = resolve()
    whole = rest_seconds(costs(), wanted, 10_000)
    without = rest_seconds(costs(), replace(wanted, quantizer=PTQ(num_samples=LEAST_SAMPLES)), 10_000)

    def filled(rest: float) -> Plan:
        """Return the plan of a budget of which so many seconds may go to all but training."""
        return fill(wanted, costs(), rest / REST_SHARE / RESERVE, num_eval_images=10_000, fitted=False)

    ample = filled(whole + 1)
    assert (ample.settings.quantizer.num_samples, ample.num_eval_images) == (2000, 10_000)
    less = filled((whole + without) / 2)
    assert LEAST_SAMPLES < less.settings.quantizer.num_samples < 2000
    assert less.num_eval_images == 10_000
    assert less.rest_seconds == pytest.approx((whole + without) / 2, rel=0.02)
    small = filled(without / 2)
    assert small.settings.quantizer.num_samples == LEAST_SAMPLES
    assert LEAST_EVALUATED < small.num_eval_images < 10_000
    assert small.settings.method.steps == pytest.approx(without / 2 * (1 - REST_SHARE) / REST_SHARE, abs=2)
    tiny = filled(5.0)
    assert (tiny.num_eval_images, tiny.settings.method.steps) == (LEAST_EVALUATED, LEAST_STEPS)
    assert tiny.expected_seconds > 5 / REST_SHARE / RESERVE


def test_what_the_user_chose_does_not_shrink():
    wanted = resolve(assignments=["quantizer.num_samples=3000"])
    planned = fill(wanted, costs(), 100.0, num_eval_images=50, fitted=False)
    assert planned.settings.quantizer.num_samples == 3000
    assert planned.num_eval_images == 50


def test_where_nothing_is_trained_the_rest_takes_the_whole_budget():
    planned = fill(resolve(method="noise"), costs(fit_step=0.0), 260.0, num_eval_images=0, fitted=False)
    assert planned.settings.quantizer.num_samples == 2000


def test_large_images_are_calibrated_with_fewer_and_distilled_in_smaller_steps():
    large = ImageSpec(channels=1, height=96, width=120, classes=5, mean=(0.5,), std=(0.5,))
    assert sized(resolve(), large).quantizer.num_samples == LARGE_SAMPLES
    assert sized(resolve(quantizer="qat"), large).quantizer.learning_rate == LARGE_RATE
    assert (
        sized(resolve(quantizer="qat", assignments=["quantizer.learning_rate=0.3"]), large).quantizer.learning_rate
        == 0.3
    )
    assert sized(resolve(), replace(large, height=95)).quantizer.num_samples == 2000
    chosen = resolve(assignments=["quantizer.num_samples=700"])
    assert sized(chosen, large) == chosen


@pytest.mark.slow
def test_a_budget_that_is_too_small_runs_and_says_so(tmp_path, said):
    teacher = load_teacher("digits")
    record = zsq.quantize(teacher, out=tmp_path / "run", budget=0.5, data="digits").record
    assert record.num_eval_images == LEAST_EVALUATED
    assert record.num_calibration_images == LEAST_SAMPLES
    assert any("the least that a run does takes" in line for line in said)
    assert any("10 steps make rough samples" in line for line in said)
    facts = tomllib.loads((tmp_path / "run" / "settings.toml").read_text())["run"]
    assert facts["evaluated_images"] == LEAST_EVALUATED
    again = zsq.quantize(teacher, out=tmp_path / "run", budget=0.5, data="digits", resume=True).record
    assert again.evaluation == record.evaluation


def test_seconds_each_leaves_the_first_call_out(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])

    def action(index: int) -> None:
        calls.append(index)
        clock[0] += 50.0 if index == 0 else 0.5

    assert seconds_each(action, at_least=3, at_least_seconds=2.0) == 0.5
    assert calls == [0, 1, 2, 3, 4]


def test_whole_rounds_of_steps_are_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])

    def action(index: int) -> None:
        clock[0] += 3.0 if index % 4 == 3 else 1.0

    assert seconds_each(action, at_least_seconds=0.0, rounds_of=4) == 1.5
    assert seconds_each(action, at_least_seconds=7.0, rounds_of=4) == 1.5


@pytest.mark.slow
def test_a_plan_measures_and_touches_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        budget.seconds_each, "__kwdefaults__", {"at_least": 2, "at_least_seconds": 0.05, "rounds_of": 1}
    )
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("digits")
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    wanted = resolve(quantizer="qat", assignments=["quantizer.num_samples=100", "quantizer.steps=11"])
    planned = plan(wanted, teacher, Run(tmp_path / "run"), 60.0, num_eval_images=899, fitted=False)
    assert planned.settings.distill_steps == 11
    assert planned.settings.method.steps > 10
    assert min(planned.costs.fit_step, planned.costs.distill_step, planned.costs.image, planned.costs.fixed) > 0
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

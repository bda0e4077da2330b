"""Fit the schedule into a wall-clock time: measure the steps first, then choose how many."""

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zsq.errors import InputError
from zsq.models.teacher import Teacher
from zsq.quantization.ptq import quantize_ptq
from zsq.runs.settings import Settings
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import forgetting
from zsq.training.learner import Learner
from zsq.training.loop import Run

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = "10m"

MOST_FIT_STEPS = 200_000
MOST_DISTILL_STEPS = 50_000
"""The paper's schedule (section 3): a budget never chooses more."""

LEAST_STEPS = 10
"""Steps of a phase below which a budget is refused."""

FIT_SHARE = 0.6
"""Share of the training time that goes to the generator when distillation follows."""

RESERVE = 0.92
"""Share of the budget that is planned; the rest absorbs slower moments of the machine."""

EXPORT_SECONDS_PER_LAYER = 0.22
"""Writing both files, for each quantized layer (measured: 4.8 s for ResNet-20 on one core)."""

MEASURING_SHARE = 0.01
"""Share of the budget for which a step is timed; the first steps of a large network are slower than the rest."""

PROBE_IMAGES = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule and what it was computed from; times in seconds."""

    settings: Settings
    fit_step_seconds: float
    distill_step_seconds: float
    fixed_seconds: float

    @property
    def expected_seconds(self) -> float:
        """What the run should take."""
        fit = self.fit_step_seconds * self.settings.method.steps
        return fit + self.distill_step_seconds * self.settings.distill_steps + self.fixed_seconds


def parse_duration(text: str | float) -> float:
    """Read `90`, `90s`, `5m`, `1.5h` as seconds.

    Raises:
        InputError: it is none of these, or not positive.

    >>> parse_duration("5m")
    300.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise InputError(f"budget is '{text}'; give a time such as 90s, 5m or 1.5h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def seconds_each(action: Callable[[int], object], *, at_least: int = 3, at_least_seconds: float = 2.0) -> float:
    """Return the mean time of one call, after one that does not count; processes make the same calls together."""

    def again() -> bool:
        return count < at_least or time.perf_counter() - start < at_least_seconds

    with distributed.together():
        action(0)
        _wait()
        start, count = time.perf_counter(), 0
        while distributed.on_main(again):
            count += 1
            action(count)
        _wait()
        return (time.perf_counter() - start) / count


def _wait() -> None:
    """Wait for the GPU, if one is used: calls return before it has done their work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def plan(
    settings: Settings, teacher: Teacher, run: Run, budget_seconds: float, *, num_eval_images: int, fitted: bool
) -> Plan:
    """Choose the steps that fill a budget, leaving alone those that the user chose.

    Args:
        settings: what is to be run.
        teacher: the network, on the run's device.
        run: gives seed and device; nothing is written to its folder.
        budget_seconds: for the whole run from here: training, calibration, export, evaluation.
        num_eval_images: images on which the result will be evaluated, in four ways.
        fitted: the method is already fitted (`--from`).

    Raises:
        InputError: not even ten steps of each phase fit.
    """
    with forgetting():
        return _measured_plan(settings, teacher, run, budget_seconds, num_eval_images, fitted)


def _measured_plan(
    settings: Settings, teacher: Teacher, run: Run, budget_seconds: float, num_eval_images: int, fitted: bool
) -> Plan:
    begin = time.perf_counter()
    patience = max(2.0, MEASURING_SHARE * budget_seconds)
    method, quantizer = settings.method, settings.quantizer
    probe = Run(seed=run.seed, device=run.device)
    surrogate = method.with_steps(0).fit(teacher, probe, distill_steps=MOST_DISTILL_STEPS)
    source = surrogate.source
    fit_seconds = 0.0
    if method.steps and not fitted:
        assert isinstance(source, Learner), f"{method.name} has steps and its source learns nothing"
        fit_seconds = seconds_each(partial(probe.take, source), at_least_seconds=patience)
    few = replace(quantizer, num_samples=PROBE_IMAGES)
    start = time.perf_counter()
    student = quantize_ptq(
        surrogate.network,
        lambda: source.sample(PROBE_IMAGES),
        few,
        probe,
        learnable=quantizer.trains_scales,
        statistics=surrogate.statistics,
    )
    calibrate_seconds = (time.perf_counter() - start) / PROBE_IMAGES
    batch = next(iter(source.sample(PROBE_IMAGES)))
    forward_seconds = seconds_each(lambda _: teacher.network(batch.images), at_least_seconds=0.5) / PROBE_IMAGES
    distill_seconds = 0.0
    distiller = quantizer.learner(student, teacher.network, source, run.device)
    if distiller is not None:
        distill_seconds = seconds_each(partial(probe.take, distiller), at_least_seconds=patience)
    layers = sum(1 for name, _ in student.network.named_children() if name.startswith("weight_"))
    images = PROBE_IMAGES if surrogate.statistics else quantizer.num_samples  # statistics ask for none
    # all are evaluated, and so are the samples on which labels (1,000) and agreement (500) are counted
    fixed = calibrate_seconds * images + 4 * forward_seconds * (num_eval_images + 1500)
    fixed += EXPORT_SECONDS_PER_LAYER * layers
    spent = time.perf_counter() - begin
    available = RESERVE * budget_seconds - fixed - spent

    def choose() -> Plan:
        chosen = _choose(settings, fit_seconds, distill_seconds, available, fitted=fitted)
        return Plan(chosen, fit_seconds, distill_seconds, fixed + spent)

    return distributed.on_main(choose)  # clocks differ


def _choose(
    settings: Settings, fit_seconds: float, distill_seconds: float, available: float, *, fitted: bool
) -> Settings:
    """Divide the available seconds between the phases whose steps are free."""
    fit_free = bool(fit_seconds) and "method.steps" not in settings.chosen
    distill_free = bool(distill_seconds) and "quantizer.steps" not in settings.chosen
    if fit_seconds and not fit_free:
        available -= fit_seconds * settings.method.steps
    if distill_seconds and not distill_free:
        available -= distill_seconds * settings.distill_steps
    share = FIT_SHARE if fit_free and distill_free else 1.0
    fit = int(available * share / fit_seconds) if fit_free else None
    distill = int(available * (1 - share if fit_free else 1.0) / distill_seconds) if distill_free else None
    phases = (
        ("fit", "method.steps", fit, fit_seconds, share),
        ("distillation", "quantizer.steps", distill, distill_seconds, 1 - share if fit_free else 1.0),
    )
    needed = max((LEAST_STEPS * each / part for _, _, steps, each, part in phases if steps is not None), default=0.0)
    for name, setting, steps, each, _ in phases:
        if steps is not None and steps < LEAST_STEPS:
            raise InputError(
                f"the budget leaves {max(0, steps)} steps of {name}, at {each:.2f} s a step; give at least "
                f"{math.ceil((needed - available) / RESERVE)} s more, or choose the steps: --set {setting}=N."
            )
    if distill_free and fit is not None and fit > MOST_FIT_STEPS:
        distill = int((available - MOST_FIT_STEPS * fit_seconds) / distill_seconds)
    return settings.with_steps(
        method=min(fit, MOST_FIT_STEPS) if fit is not None and not fitted else None,
        quantizer=min(distill, MOST_DISTILL_STEPS) if distill is not None else None,
    )


def choose_schedule(
    wanted: Settings,
    teacher: Teacher,
    run: Run,
    budget: str | float | None,
    *,
    recipe: Path | None,
    num_eval_images: int,
    fitted: bool,
) -> tuple[Settings, dict[str, Any]]:
    """Fit the schedule to the budget; return settings and what was measured, for the record."""
    if budget is None and recipe is None and not _has_schedule(wanted):
        budget = DEFAULT_BUDGET
    if budget is None:
        return wanted, {}
    seconds = parse_duration(budget)
    if _has_schedule(wanted):
        logger.info("no number of steps is left to choose, so --budget changes nothing")
        return wanted, {}
    logger.info(f"measuring a step, to fit the schedule into {seconds:.0f} s")
    planned = plan(wanted, teacher, run, seconds, num_eval_images=num_eval_images, fitted=fitted)
    logger.info(_describe(planned))
    return planned.settings, {
        "budget_seconds": seconds,
        "fit_step_seconds": round(planned.fit_step_seconds, 4),
        "distill_step_seconds": round(planned.distill_step_seconds, 4),
    }


def _has_schedule(settings: Settings) -> bool:
    """Whether no step is left for a budget to choose."""
    free = []
    if settings.method.steps:
        free.append("method.steps")
    if settings.distill_steps:
        free.append("quantizer.steps")
    return all(name in settings.chosen for name in free)


def _describe(planned: Plan) -> str:
    parts = []
    if planned.fit_step_seconds:
        parts.append(f"{planned.settings.method.steps} generator steps of {planned.fit_step_seconds:.3f} s")
    if planned.distill_step_seconds:
        parts.append(f"{planned.settings.distill_steps} distillation steps of {planned.distill_step_seconds:.3f} s")
    steps = " and ".join(parts) or "nothing to train"
    return f"schedule: {steps}, {planned.fixed_seconds:.0f} s for the rest; {planned.expected_seconds:.0f} s expected"

"""Fit the schedule into a wall-clock time: measure the steps first, then choose how many."""

import logging
import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zsq.errors import InputError
from zsq.models.teacher import Teacher
from zsq.quantization.layer_report import measured_images
from zsq.quantization.ptq import calibration_passes, quantize_ptq
from zsq.runs.forecast import Forecast
from zsq.runs.job import Job
from zsq.runs.settings import Settings
from zsq.runs.stages import AGREEMENT_IMAGES, ENOUGH_DECIDED, LAYER_IMAGES, measured_on
from zsq.runtime import distributed
from zsq.runtime.cuda_graphs import forgetting
from zsq.runtime.memory import kept_memory
from zsq.training.learner import Learner
from zsq.training.loop import Run
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = "10m"

EVALUATED = "evaluated_images"
"""Fact of a run whose budget leaves only so many images of the data."""

EXPECTED = "expected_seconds"
"""Fact of a run with a budget: what it should take from the moment that its steps are chosen."""

MOST_FIT_STEPS = 200_000
MOST_DISTILL_STEPS = 50_000
"""The paper's schedule (section 3): a budget never chooses more."""

LEAST_STEPS = 10
"""Steps of each phase that a budget leaves in any case."""

FEW_STEPS = 100
"""Steps of the fit below which its samples are rough."""

FIT_SHARE = 0.6
"""Share of the training time that goes to the generator when distillation follows."""

REST_SHARE = 0.4
"""Most of a budget that calibration, check and evaluation take while they can be smaller."""

RESERVE = 0.92
"""Share of the budget that is planned; the rest absorbs slower moments of the machine."""

MEASURING_SHARE = 0.01
"""Share of the budget for which a step of either phase is timed; the first steps of a large network are slower than
the rest."""

EXPORT_SECONDS_PER_LAYER = 0.22
"""Writing both files, for each quantized layer (measured: 4.8 s for ResNet-20 on one core)."""

CALIBRATION, CHECK, SAMPLES, EVALUATION = 3.5, 12.0, 2.5, 2.5
"""What an image costs in each part, over what it costs the float network (measured on MobileNetV2): two observing
passes; simulation and file, both in two ways, for each decided image; recognition and agreement; float network,
simulation, file and the reading of the image."""

LAYER_PASS, GRID_IMAGES, FLOAT_FILE_SECONDS = 2.0, 100, 2.0
"""What the report takes: an image's pass through a student with its quantizers off, over the float network's; images of
`samples.png`; writing the float network and timing it."""

STEPS_A_ROUND = 4
"""Generator steps that are timed together: of large images, one of four is whole and costs thrice."""

LARGE_SAMPLES, LEAST_SAMPLES = 256, 64
"""Calibration images where the user chooses no number and images are large, and the fewest that a budget leaves."""

LARGE_RATE = 1e-4
"""Step size of distillation where the user chooses none and images are large: at 1e-3, MobileNetV2 at INT6 falls to 1 %
within 30 steps."""

TRAINED = ("fit", "distill")
"""Phases whose steps a budget chooses."""

FIT_STEP, DISTILL_STEP, STEP_IMAGES = 3.0, 7.0, 32
"""What an image costs in a step of each phase, over what it costs the float network, and images of a step, where none
is timed (measured on digits, ResNet-20 and MobileNetV1: 1.7 to 4.2, and 6.1 to 11.2)."""

LEAST_EVALUATED = 100
"""Fewest images of the data that a budget leaves, where there are as many."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured: seconds of a step of each phase, of one image in the float network, and of all else."""

    fit_step: float
    distill_step: float
    image: float
    fixed: float
    """Prior and measuring: what is over once the steps are chosen."""
    fitted_bytes: int = 0
    """Size of what a fit leaves: a generator, or images."""
    calibrating: float = 0.0
    """What calibration does beside its images."""
    writing: float = 0.0
    """The files."""
    reporting: float = 0.0
    """What the report shows of layers and latency."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule and what it was computed from; times in seconds."""

    settings: Settings
    costs: Costs
    num_eval_images: int
    """Images of the data on which the result is evaluated; 0 without data."""

    @property
    def rest_seconds(self) -> float:
        """What follows the training."""
        return rest_seconds(self.costs, self.settings, self.num_eval_images)

    @property
    def expected_seconds(self) -> float:
        """What the run should take."""
        fit = self.costs.fit_step * self.settings.method.steps
        return fit + self.costs.distill_step * self.settings.distill_steps + self.rest_seconds


def rest_seconds(costs: Costs, settings: Settings, num_eval_images: int) -> float:
    """Return what calibration, check, samples and evaluation take, and what is fixed."""
    phases = phase_seconds(costs, settings, num_eval_images)
    return costs.fixed + sum(seconds for name, seconds in phases.items() if name not in TRAINED)


def phase_seconds(costs: Costs, settings: Settings, num_eval_images: int) -> dict[str, float]:
    """Return what each phase of a run takes, by the names under which they are shown, in order."""
    quantizer = settings.quantizer
    passes = calibration_passes(quantizer)
    calibration = costs.calibrating + costs.image * CALIBRATION * quantizer.num_samples
    samples = costs.image * SAMPLES / 2 * measured_on(AGREEMENT_IMAGES, quantizer)
    return {
        "fit": costs.fit_step * settings.method.steps,
        "recognise": samples,
        **dict.fromkeys(passes, calibration / len(passes)),
        "distill": costs.distill_step * settings.distill_steps,
        "write": costs.writing,
        "check": costs.image * CHECK * ENOUGH_DECIDED,
        "evaluate": costs.image * EVALUATION * num_eval_images,
        "compare samples": samples,
        "report": costs.reporting,
    }


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


def seconds_each(
    action: Callable[[int], object], *, at_least: int = 3, at_least_seconds: float = 2.0, rounds_of: int = 1
) -> float:
    """Return the mean time of one call, after one that does not count; processes make the same calls together.

    Where calls of several kinds take turns, whole rounds of them are timed.
    """

    def again() -> bool:
        return count % rounds_of > 0 or count < at_least or time.perf_counter() - start < at_least_seconds

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
    """Choose the steps that fill a budget, leaving alone what the user chose.

    Args:
        settings: what is to be run.
        teacher: the network, on the run's device.
        run: gives seed and device; nothing is written to its folder.
        budget_seconds: for the whole run from here: training, calibration, export, evaluation.
        num_eval_images: images of the data on which the result is evaluated at most.
        fitted: the method is already fitted (`--from`).
    """
    with forgetting(), kept_memory():
        costs = measured(settings, teacher, run, budget_seconds, fitted)
    return distributed.on_main(  # clocks differ
        lambda: fill(settings, costs, budget_seconds, num_eval_images=num_eval_images, fitted=fitted)
    )


def measured(settings: Settings, teacher: Teacher, run: Run, budget_seconds: float, fitted: bool) -> Costs:
    """Return what a step of each phase, an image and all else cost, steps timed for a small share of a budget."""
    begin = time.perf_counter()
    patience = MEASURING_SHARE * budget_seconds
    method, quantizer = settings.method, settings.quantizer
    probe, count = Run(seed=run.seed, device=run.device), teacher.spec.images_at_once
    surrogate = method.with_steps(0).fit(teacher, probe, distill_steps=MOST_DISTILL_STEPS)
    source = surrogate.source
    fit_seconds = 0.0
    if method.steps and not fitted:
        assert isinstance(source, Learner), f"{method.name} has steps and its source learns nothing"
        fit_seconds = seconds_each(partial(probe.take, source), at_least_seconds=patience, rounds_of=STEPS_A_ROUND)
    start = time.perf_counter()
    student = quantize_ptq(
        surrogate.network,
        lambda: source.sample(count, count),
        replace(quantizer, num_samples=count),
        probe,
        learnable=quantizer.trains_scales,
        statistics=surrogate.statistics,
    )
    calibrating = time.perf_counter() - start
    batch = next(iter(source.sample(count, count)))
    forward = seconds_each(lambda _: teacher.network(batch.images), at_least=1, at_least_seconds=0.2)
    distill_seconds = 0.0
    distiller = quantizer.learner(student, teacher.network, source, run.device)
    if distiller is not None:
        distill_seconds = seconds_each(partial(probe.take, distiller), at_least_seconds=patience)
    layers = sum(1 for name, _ in student.network.named_children() if name.startswith("weight_"))
    size = sum(value.numel() * value.element_size() for value in source.state_dict().values())
    return Costs(
        fit_seconds,
        distill_seconds,
        forward / count,
        time.perf_counter() - begin,
        fitted_bytes=size,
        calibrating=calibrating,
        writing=EXPORT_SECONDS_PER_LAYER * layers,
        reporting=_reporting(forward / count, layers, teacher.spec),
    )


def forecast(job: Job, costs: Costs | None) -> Forecast:
    """Return when a run should end.

    Args:
        job: the run, its steps chosen.
        costs: what was measured; None times one forward, and the phases show their own pace.
    """
    known = _guessed(job) if costs is None else costs
    phases = phase_seconds(known, job.settings, job.data.num_images if job.data else 0)
    if job.fitted:
        del phases["fit"]
    return Forecast(phases, TRAINED if costs is None else ())


@torch.no_grad()
def _guessed(job: Job) -> Costs:
    """Return what the parts of a run should cost, of one timed forward; this process alone times it."""
    network, spec = job.teacher.network, job.teacher.spec
    images = torch.zeros(spec.images_at_once, *spec.shape, device=job.run.device)
    network(images)
    _wait()
    begin = time.perf_counter()
    network(images)
    _wait()
    image = (time.perf_counter() - begin) / len(images)
    step = image * (getattr(job.settings.method, "batch_size", None) or STEP_IMAGES)
    layers = sum(1 for value in network.parameters() if value.dim() > 1)
    return Costs(
        FIT_STEP * step,
        DISTILL_STEP * step,
        image,
        fixed=0.0,
        writing=EXPORT_SECONDS_PER_LAYER * layers,
        reporting=_reporting(image, layers, spec),
    )


def _reporting(image: float, layers: int, spec: ImageSpec) -> float:
    """Return what layers and latency take of an image's seconds in the float network."""
    measured_layers = LAYER_PASS * min(LAYER_IMAGES, measured_images(layers, math.prod(spec.sides))) * (layers + 3)
    return image * (measured_layers + GRID_IMAGES) + FLOAT_FILE_SECONDS


def sized(settings: Settings, spec: ImageSpec) -> Settings:
    """Return the settings with what images of such a size need of the quantizer, unless the user chose it."""
    wanted = {"num_samples": LARGE_SAMPLES, "learning_rate": LARGE_RATE} if spec.is_large else {}
    known = {field.name for field in fields(settings.quantizer)}
    free = {key for key in known if f"quantizer.{key}" not in settings.chosen}
    changed = {key: value for key, value in wanted.items() if key in free}
    return replace(settings, quantizer=replace(settings.quantizer, **changed))  # type: ignore[arg-type]


def fill(settings: Settings, costs: Costs, budget_seconds: float, *, num_eval_images: int, fitted: bool) -> Plan:
    """Fill a budget: calibration and evaluation shrink first, down to their least, and training takes what is left.

    Args:
        settings: what is to be run.
        costs: what was measured.
        budget_seconds: for the whole run.
        num_eval_images: images of the data.
        fitted: the method is already fitted.
    """
    planned = RESERVE * budget_seconds
    most = REST_SHARE * planned if costs.fit_step or costs.distill_step else planned
    count, evaluated = settings.quantizer.num_samples, num_eval_images
    excess = rest_seconds(costs, settings, evaluated) - most
    if excess > 0 and "quantizer.num_samples" not in settings.chosen:

        def calibrated(count: int) -> Settings:
            return replace(settings, quantizer=replace(settings.quantizer, num_samples=count))

        count = _most(LEAST_SAMPLES, count, most, lambda count: rest_seconds(costs, calibrated(count), evaluated))
        settings = calibrated(count)
        excess = rest_seconds(costs, settings, evaluated) - most
    if excess > 0:
        evaluated = _most(LEAST_EVALUATED, evaluated, most, lambda count: rest_seconds(costs, settings, count))
    available = planned - rest_seconds(costs, settings, evaluated)
    chosen = _choose(settings, costs.fit_step, costs.distill_step, available, fitted=fitted)
    return Plan(chosen, costs, evaluated)


def _most(least: int, wanted: int, seconds: float, cost: Callable[[int], float]) -> int:
    """Return the largest number up to `wanted` that costs no more seconds, or `least`, or `wanted` if that is less."""
    numbers = range(min(least, wanted), wanted + 1)
    return numbers[max(0, bisect_right(numbers, seconds, key=cost) - 1)]


def _choose(
    settings: Settings, fit_seconds: float, distill_seconds: float, available: float, *, fitted: bool
) -> Settings:
    """Divide the available seconds between the phases whose steps are free; each gets its least in any case."""
    fit_free = bool(fit_seconds) and "method.steps" not in settings.chosen
    distill_free = bool(distill_seconds) and "quantizer.steps" not in settings.chosen
    if fit_seconds and not fit_free:
        available -= fit_seconds * settings.method.steps
    if distill_seconds and not distill_free:
        available -= distill_seconds * settings.distill_steps
    share = FIT_SHARE if fit_free and distill_free else 1.0
    fit = distill = None
    if fit_free:
        fit = min(MOST_FIT_STEPS, max(LEAST_STEPS, int(available * share / fit_seconds)))
    if distill_free:
        left = available - (fit * fit_seconds if fit is not None else 0.0)
        distill = min(MOST_DISTILL_STEPS, max(LEAST_STEPS, int(left / distill_seconds)))
    return settings.with_steps(method=fit if not fitted else None, quantizer=distill)


def choose_schedule(
    wanted: Settings,
    teacher: Teacher,
    run: Run,
    budget: str | float | None,
    *,
    recipe: Path | None,
    num_eval_images: int,
    fitted: bool,
    spent: float = 0.0,
) -> tuple[Settings, dict[str, Any], Costs | None]:
    """Fit the schedule to the budget, less the seconds spent.

    Returns:
        The settings, what was measured, for the record, and the costs that it comes from; None where no step was timed.
    """
    if budget is None and recipe is None and not _has_schedule(wanted):
        budget = DEFAULT_BUDGET
        wanted = settling(wanted)
    if budget is None:
        return wanted, {}, None
    seconds = parse_duration(budget)
    if _has_schedule(wanted):
        logger.info("no number of steps is left to choose, so --budget changes nothing")
        return wanted, {}, None
    logger.info(f"measuring a step, to fit the schedule into {seconds:.0f} s")
    left = max(0.0, seconds - spent)
    planned = plan(wanted, teacher, run, left, num_eval_images=num_eval_images, fitted=fitted)
    logger.info(_describe(planned, num_eval_images))
    _warn_of(planned, seconds, spent)
    facts: dict[str, Any] = {
        "budget_seconds": seconds,
        "fit_step_seconds": round(planned.costs.fit_step, 4),
        "distill_step_seconds": round(planned.costs.distill_step, 4),
        EXPECTED: round(planned.expected_seconds, 1),
    }
    if planned.num_eval_images < num_eval_images:
        facts[EVALUATED] = planned.num_eval_images
    return planned.settings, facts, planned.costs


def settling(settings: Settings) -> Settings:
    """Return the settings of a fit that ends by itself, where it serves a calibration at 8 bits."""
    eight = settings.quantizer.name == "ptq" and settings.quantizer.bits == "8" and not settings.quantizer.weight_bits
    if not eight or "method.settle" in settings.chosen:
        return settings
    return replace(settings, method=settings.method.until_settled())


def _has_schedule(settings: Settings) -> bool:
    """Whether no step is left for a budget to choose."""
    free = []
    if settings.method.steps:
        free.append("method.steps")
    if settings.distill_steps:
        free.append("quantizer.steps")
    return all(name in settings.chosen for name in free)


def _describe(planned: Plan, num_eval_images: int) -> str:
    """Say what each part of the run gets."""
    costs, settings, parts = planned.costs, planned.settings, []
    if costs.fit_step:
        parts.append(f"{settings.method.steps} generator steps of {costs.fit_step:.3f} s")
    if costs.distill_step:
        parts.append(f"{settings.distill_steps} distillation steps of {costs.distill_step:.3f} s")
    steps = " and ".join(parts) or "nothing to train"
    rest = f"{settings.quantizer.num_samples} calibration images"
    if num_eval_images:
        some = planned.num_eval_images < num_eval_images
        rest += f", {f'{planned.num_eval_images} of ' if some else ''}{num_eval_images} images evaluated"
    return (
        f"schedule: {steps}; {planned.rest_seconds:.0f} s for the rest ({rest}); "
        f"{planned.expected_seconds:.0f} s expected"
    )


def _warn_of(planned: Plan, budget_seconds: float, spent: float) -> None:
    """Say beforehand where the budget is too small for what it is to hold, or for good samples."""
    if spent + planned.expected_seconds > budget_seconds:
        logger.warning(
            f"the least that a run does takes {spent + planned.expected_seconds:.0f} s here, more than the budget of "
            f"{budget_seconds:.0f} s."
        )
    if planned.costs.fit_step and planned.settings.method.steps < FEW_STEPS:
        logger.warning(
            f"{planned.settings.method.steps} steps make rough samples: with batch norm's own ranges they serve at "
            "8 bits; for fewer bits, give more time."
        )

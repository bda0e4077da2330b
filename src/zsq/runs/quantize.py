"""One run from teacher to verified files: what is asked for is checked, the folder taken, the work done."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.graph.fold import fold
from zsq.methods import Method
from zsq.models.teacher import Teacher, teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.prepare import check_weight_names
from zsq.runs.console import shown
from zsq.runs.folder import FittedRun, check_recipe, chosen_seed, claimed, pick_device, resolve_settings
from zsq.runs.pipeline import Job, Result
from zsq.runs.settings import Settings
from zsq.runtime import distributed
from zsq.runtime.observer import Observer
from zsq.training.loop import Run
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)


def quantize(
    teacher: Teacher | nn.Module,
    spec: ImageSpec | None = None,
    *,
    out: str | Path,
    bits: str | int | None = None,
    method: str | Method | None = None,
    quantizer: str | PTQ | None = None,
    recipe: str | Path | None = None,
    settings: tuple[str, ...] | Mapping[str, Any] = (),
    budget: str | float | None = None,
    from_run: str | Path | None = None,
    data: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    observer: Observer | None = None,
    quiet: bool = False,
) -> Result:
    """Quantize a classifier without its training data and write the files to a folder.

    Where `torchrun` has started several processes, all call this alike: they share the training, and the first one does
    the rest. All of them return the result.

    Args:
        teacher: a `Teacher` (see `load_teacher`), or any module in memory, with its `spec`.
        spec: what the module takes and gives; only with a module.
        out: folder of the run.
        bits: `8`, `6`, `4`, `W4A8`, or a TOML file of widths (see `zsq allocate`); None takes the recipe's, else 8.
        method, quantizer: a name, or a settings object such as `ZSCGAN(steps=500)`.
        recipe: TOML file of settings.
        settings: assignments such as `method.steps=500`, or a mapping `{"method.steps": 500}`.
        budget: wall-clock time such as `5m`; None without recipe or chosen steps is ten minutes.
        from_run: folder of a run whose fitted generator is used instead of fitting one.
        data: labelled images on which teacher and result are evaluated; None measures no accuracy.
        seed: of every random draw; None takes that of the recipe or of the run that is resumed, else 0.
        device: cpu, cuda or auto.
        resume: continue the run that `out` holds.
        overwrite: discard the run that `out` holds.
        checkpoint_every: steps between checkpoints; None saves every 30 seconds, or in 2 % of the time.
        observer: is told how far the work is; None shows it on stderr.
        quiet: show and print nothing, warnings included; the logger `zsq` has them all the same.

    Returns:
        The record and the folder.

    Raises:
        InputError: an argument, setting or file does not fit.
        NumericsError: a loss is not finite.
        ExportError: the file does not compute what was simulated; all files are kept.
    """
    begin = time.perf_counter()
    if not isinstance(teacher, Teacher):
        if spec is None:
            raise InputError("quantize(module, spec, ...) needs the ImageSpec of the module.")
        teacher = teacher_from_module(teacher, spec)
    if teacher.spec.classes < 2:
        raise InputError(f"'{teacher.name}' knows {teacher.spec.classes} class; a classifier has at least 2.")
    with started(
        teacher,
        out=out,
        wanted=Wanted(method, quantizer, bits, recipe, settings, budget, from_run),
        data=data,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        observer=observer,
        quiet=quiet,
    ) as (job, chosen):
        return job.carry_out(chosen, begin)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller says of method, quantizer and schedule; see `quantize`."""

    method: str | Method | None
    quantizer: str | PTQ | None
    bits: str | int | None
    recipe: str | Path | None
    settings: tuple[str, ...] | Mapping[str, Any]
    budget: str | float | None
    from_run: str | Path | None
    needs_images: bool = False


@contextmanager
def started(
    teacher: Teacher,
    *,
    out: str | Path,
    wanted: Wanted,
    seed: int | None,
    device: str,
    resume: bool,
    overwrite: bool,
    observer: Observer | None,
    quiet: bool,
    data: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> "Iterator[tuple[Job, Settings]]":
    """Check what is asked for, take the folder, and yield the job with its settings; see `quantize`.

    Raises:
        InputError: an argument, setting or file does not fit; what the folder held is still there then.
    """
    where = distributed.start(pick_device(device).type)
    teacher = teacher.to(where) if where.type != "cpu" else teacher
    folder = Path(out)
    images = None if data is None else open_dataset(os.fspath(data), teacher.spec)
    reused = None if wanted.from_run is None else FittedRun.open(Path(wanted.from_run), teacher)
    asked = resolve_settings(
        wanted.method,
        wanted.quantizer,
        wanted.bits,
        recipe=wanted.recipe,
        assignments=_assignments(wanted.settings),
        source_run=reused,
    )
    if wanted.needs_images and "qat" not in asked.method.quantizers:
        raise InputError(f"method {asked.method.name} makes no images: it takes ranges and means from batch norm.")
    if asked.quantizer.weight_bits:  # before hours are spent on the fit
        check_weight_names(fold(teacher.network)[0], asked.quantizer.weight_bits)
    drawn = distributed.on_main(lambda: chosen_seed(seed, wanted.recipe, folder, resume=resume))
    with shown(observer, quiet=quiet) as watching, claimed(folder):
        run = Run(folder, seed=drawn, device=where, checkpoint_steps=checkpoint_every, observer=watching)
        if images is not None and images.notice:
            logger.info(images.notice)
        job = Job(teacher, folder, run, images, reused)
        chosen = job.stored(asked, resume=resume, overwrite=overwrite)
        if chosen is None:
            check_recipe(wanted.recipe, teacher, reuses=reused is not None)
            chosen = job.scheduled(asked, wanted.budget, wanted.recipe, overwrite=overwrite)
        yield job, chosen


def _assignments(settings: Iterable[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as assignments; a mapping of `method.steps` to 500 is as good.

    Raises:
        InputError: it is one text, whose letters would be taken for assignments.
    """
    if isinstance(settings, str):
        raise InputError(f"settings is the text '{settings}'; give a tuple of them: settings=('{settings}',).")
    if isinstance(settings, Mapping):
        return tuple(f"{name}={value}" for name, value in settings.items())
    return tuple(settings)

"""The start of a run: what is asked for is checked, the folder taken, the schedule chosen and written."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from zsq.data.datasets import DataSet, EvenSubset, class_list, open_dataset
from zsq.errors import InputError
from zsq.evaluation.measures import Decoder
from zsq.export.files import require_runtime
from zsq.graph.fold import fold
from zsq.graph.plain import forgetting_sources
from zsq.models.teacher import Teacher
from zsq.quantization import PTQ
from zsq.quantization.prepare import check_weight_names
from zsq.runs.boxes import tried_decoder
from zsq.runs.budget import EVALUATED, Costs, choose_schedule, forecast, sized
from zsq.runs.console import TerminalProgress, shown
from zsq.runs.details import start_details
from zsq.runs.fitted import FittedRun
from zsq.runs.folder import claimed, clear_folder, open_folder
from zsq.runs.job import Job
from zsq.runs.rehearsal import rehearse
from zsq.runs.request import Request
from zsq.runs.resume import chosen_seed, resumed_settings, warn_of_recipe
from zsq.runs.run_log import Kind, open_log, require_log
from zsq.runs.settings import Settings, resolve
from zsq.runs.settings_file import SETTINGS, of_version, stored_facts, teacher_table, write_settings
from zsq.runtime import distributed
from zsq.runtime.device import pick_device
from zsq.runtime.memory import require_memory
from zsq.runtime.versions import versions
from zsq.targets import target_of
from zsq.training.loop import Run

FLOAT_BYTES = 4

logger = logging.getLogger(__name__)


@contextmanager
def started(
    request: Request,
    *,
    quantizer: str | PTQ | None = None,
    bits: str | int | None = None,
    flags: Mapping[str, str | int | None] | None = None,
    data: str | os.PathLike[str] | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    decode: str | None = None,
    checkpoint_every: int | None = None,
    needs_images: bool = False,
    rehearsed: bool = False,
    check: Callable[[Teacher, Settings], object] | None = None,
) -> Iterator[Job]:
    """Check what is asked for, take the folder, and yield the job that is ready to start.

    Args:
        request: what is asked for.
        quantizer, bits, data, class_names, decode, checkpoint_every: see `QuantizeRequest`.
        flags: settings of the quantizer that have a flag of their own; see `resolve`.
        needs_images: refuse methods that make none.
        rehearsed: take the way to the file before anything is learnt, and warn of what stays float.
        check: raises where the request does not fit the network.

    Raises:
        InputError: an argument, setting or file does not fit; what the folder held is still there then.
        ExportError: the network has no file; see `rehearse`.
    """
    kind = _kind_of_log(request)
    require_log(kind)
    device = distributed.start(pick_device(request.device).type)
    with shown(request.observer, quiet=request.quiet) as observer, forgetting_sources():
        teacher = _loaded(request, device)
        images, decoder = _opened(data, class_names, decode, teacher)
        facts: dict[str, Any] = {"data": data if data is None else os.fspath(data), "decode": decode}
        if class_names is not None:
            facts["class_names"] = class_list(class_names, teacher.spec.classes)
            teacher = replace(teacher, class_names=tuple(facts["class_names"]))
        fitted = None if request.from_run is None else FittedRun.open(Path(request.from_run), teacher)
        wanted = wanted_settings(request, quantizer, bits, fitted, flags)
        if check is not None:
            check(teacher, wanted)
        _check_settings(wanted, teacher, needs_images=needs_images)
        seed = distributed.on_main(
            lambda: chosen_seed(request.seed, request.recipe_path, request.folder, resume=request.resume)
        )
        log = open_log(kind, request.folder, teacher.spec)
        with claimed(request.folder):
            run = Run(
                request.folder,
                seed=seed,
                device=device,
                checkpoint_steps=checkpoint_every,
                observer=observer,
                log=log,
            )
            for notice in images.notices if images else ():
                logger.info(notice)
            job = Job(
                teacher=teacher,
                run=run,
                folder=request.folder,
                settings=wanted,
                data=images,
                decoder=decoder,
                fitted=fitted,
            )
            resumed = _open_or_resume(job, request)
            begin = time.perf_counter()
            if resumed is None and rehearsed:
                observer.update("rehearse", 0, 1, {})
                _rehearse(teacher, wanted, Run(seed=seed, device=device))
                observer.update("rehearse", 1, 1, {})
            spent, costs = time.perf_counter() - begin, None
            if resumed is None:
                job, costs = _plan_and_write(job, request, facts, spent)
            else:
                job = resumed
            if rehearsed and isinstance(observer, TerminalProgress):
                observer.expect(forecast(job, costs))
            for line in start_details(job):
                logger.debug(line)
            yield job


def _kind_of_log(request: Request) -> Kind | None:
    """Return the log that is asked for, else that of the run that is resumed."""
    if request.log is None and request.resume and (request.folder / SETTINGS).is_file():
        return stored_facts(request.folder).get("log")
    return request.log


def _opened(
    data: str | os.PathLike[str] | None,
    class_names: str | Path | Sequence[str] | None,
    decode: str | None,
    teacher: Teacher,
) -> tuple[DataSet | None, Decoder | None]:
    """Return the images on which a run is evaluated, and what reads boxes from its outputs, where they are asked for.

    Raises:
        InputError: there are no such images, the function fails, or has nothing to be compared with.
    """
    if data is None:
        if decode is not None:
            raise InputError(f"--decode is {decode}, and no boxes are there to compare with: --data FILE.npz.")
        return None, None
    images = open_dataset(os.fspath(data), teacher.spec, class_names=class_names, boxes=decode is not None)
    return images, None if decode is None else tried_decoder(decode, teacher, images)


def _rehearse(teacher: Teacher, settings: Settings, run: Run) -> None:
    """Let the first process try the export, and warn of what stays float."""
    warning = distributed.on_main(lambda: rehearse(teacher, settings.quantizer, run).warning())
    if warning and distributed.is_main():
        logger.warning(warning)


def _loaded(request: Request, device: torch.device) -> Teacher:
    """Return the float network on the run's device."""
    teacher = request.teacher()
    return teacher.to(device) if device.type != "cpu" else teacher


def _check_settings(wanted: Settings, teacher: Teacher, *, needs_images: bool) -> None:
    """Check what would only be found after hours of fitting."""
    if needs_images and "qat" not in wanted.method.quantizers:
        raise InputError(f"method {wanted.method.name} makes no images: it takes ranges and means from batch norm.")
    require_runtime(target_of(wanted.quantizer.target))
    if batch_size := getattr(wanted.method, "batch_size", None):
        spec = teacher.spec
        needed = batch_size * math.prod(spec.shape) * FLOAT_BYTES
        require_memory(needed, f"batches of {batch_size:,} images", "a smaller --set method.batch_size=N may fit")
    if wanted.quantizer.weight_bits:
        check_weight_names(fold(teacher.network)[0], wanted.quantizer.weight_bits)


def wanted_settings(
    request: Request,
    quantizer: str | PTQ | None,
    bits: str | int | None,
    fitted: FittedRun | None,
    flags: Mapping[str, str | int | None] | None = None,
) -> Settings:
    """Merge names, objects, recipe and assignments; a reused generator brings its method's settings along.

    Raises:
        InputError: a name or value is wrong, or would change the generator that is reused.
    """
    if request.recipe_path is not None:
        with of_version(request.recipe_path):
            resolve(recipe=request.recipe_path)
    tables: dict[str, dict[str, Any]] = {}
    names: dict[str, str | None] = {}
    for section, given in (("method", request.method), ("quantizer", quantizer)):
        if given is None or isinstance(given, str):
            names[section] = given
        else:
            names[section] = given.name
            tables[section] = asdict(given)  # type: ignore[arg-type]
    merged = resolve(
        method=names["method"] or (fitted.method.name if fitted else None),
        quantizer=names["quantizer"],
        bits=bits,
        flags=flags,
        recipe=request.recipe_path,
        given=tables,
        assignments=request.assignments,
    )
    if fitted is None:
        return merged
    asked = tables.get("method", {})
    clash = [f"method.{key}" for key, value in asked.items() if value != getattr(fitted.method, key, None)]
    clash += [text.partition("=")[0] for text in request.assignments if text.startswith("method.")]
    if names["method"] not in (None, fitted.method.name) or clash:
        raise InputError(
            f"--from reuses a generator fitted by method {fitted.method.name} with the settings of "
            f"{fitted.folder / SETTINGS}; {(clash or ['--method'])[0]} cannot change it any more."
        )
    return Settings(fitted.method, merged.quantizer, merged.chosen | {"method.steps"})


def _open_or_resume(job: Job, request: Request) -> Job | None:
    """Open the folder; return the job of the run that it holds and that is continued, its leftovers cleared, if any."""

    def stored() -> Settings | None:
        if not open_folder(job.folder, resume=request.resume, overwrite=request.overwrite):
            if request.resume:
                logger.info(f"{job.folder} holds no run to continue; this one starts anew")
            return None
        found = resumed_settings(job.folder, job.settings, job.teacher, job.run.seed, job.fitted, job.run.device.type)
        clear_folder(job.folder, everything=False)
        return found

    settings = distributed.on_main(stored)
    if settings is None:
        return None
    return _evaluated_on(replace(job, settings=settings), stored_facts(job.folder).get(EVALUATED))


def _evaluated_on(job: Job, count: int | None) -> Job:
    """Return the job with as many images of its data, or all."""
    return job if count is None or job.data is None else replace(job, data=EvenSubset(job.data, count))


def _plan_and_write(job: Job, request: Request, said: dict[str, Any], spent: float) -> tuple[Job, Costs | None]:
    """Fit the schedule of a new run to the budget, clear the folder, write the settings; return job and costs.

    What is to be overwritten is deleted only when the method has been seen to start. Of the budget, so many seconds are
    spent.
    """
    warn_of_recipe(request.recipe_path, job.teacher, reuses=job.fitted is not None)
    settings, measured, costs = choose_schedule(
        sized(job.settings, job.teacher.spec),
        job.teacher,
        job.run,
        request.budget,
        recipe=request.recipe_path,
        num_eval_images=job.data.num_images if job.data else 0,
        fitted=job.fitted is not None,
        spent=spent,
    )
    if request.overwrite and job.fitted is None and not measured:
        settings.method.with_steps(0).fit(job.teacher, Run(seed=job.run.seed, device=job.run.device))
    facts: dict[str, Any] = {"seed": job.run.seed, "device": job.run.device.type, "processes": distributed.processes()}
    facts |= said | {"threads": torch.get_num_threads(), "directory": os.getcwd()} | measured | versions()
    if request.log:
        facts["log"] = request.log
    if job.fitted:
        facts |= {"generator_sha256": job.fitted.sha256, "from": str(job.fitted.folder)}
    if distributed.is_main():
        clear_folder(job.folder, everything=True)
        write_settings(job.folder / SETTINGS, settings, teacher_table(job.teacher), facts)
    return _evaluated_on(replace(job, settings=settings), measured.get(EVALUATED)), costs

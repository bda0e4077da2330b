"""One cell of a comparison: the fit that it shares, then a quantized and evaluated file or a picture of samples."""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from zsq.comparison.digests import digest, fit_digest
from zsq.comparison.layout import Layout
from zsq.comparison.lines import Drawn, Quantized
from zsq.comparison.recipe import Cell
from zsq.comparison.sample_figure import save_figure
from zsq.comparison.teachers import Teachers
from zsq.errors import InputError
from zsq.methods import Surrogate
from zsq.models.teacher import Teacher
from zsq.runs.fitted import GENERATOR, FittedRun
from zsq.runs.job import Job, Outputs
from zsq.runs.pipeline import Stopwatch, finish
from zsq.runs.record import Record
from zsq.runs.run_log import Kind, open_log
from zsq.runs.settings import Settings
from zsq.runs.settings_file import SETTINGS, other_graph, read_settings, teacher_table, write_settings
from zsq.runs.stages import fit, measure_recognition
from zsq.runtime.checksums import sealed_values, unsealed_values
from zsq.runtime.files import load_tensors, replacing
from zsq.runtime.memory import clear_memory_errors, kept_memory
from zsq.runtime.observer import Observer
from zsq.runtime.versions import versions
from zsq.training.loop import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitFacts:
    """What `fit.json` holds of a finished fit."""

    seconds: float
    """Wall clock."""
    resumed: bool
    """Whether it was stopped and continued, so that `seconds` are not all."""
    label_recognition: float | None
    """How often the teacher recognised the wanted label, in percent."""


@dataclass(slots=True)
class Fit:
    """A fitted method, shared by cells."""

    shared: Surrogate | None
    """Where a source learns nothing, the same one serves all cells."""
    state: dict[str, Tensor]
    """From which each cell starts a source of its own otherwise, since distillation goes on training it."""
    recognition: float | None
    """How often the teacher recognised the wanted label, in percent."""
    seconds: float
    resumed: bool
    """Whether it was stopped and continued, so that `seconds` are not all."""


@dataclass(frozen=True, slots=True)
class CellRunner:
    """Runs one cell after another."""

    layout: Layout
    teachers: Teachers
    observer: Observer
    log: Kind | None = None
    """Form in which fits and cells write their losses for another tool."""

    @clear_memory_errors()
    @kept_memory()
    def run(self, cell: Cell, fit: Fit) -> Quantized | Drawn:
        """Run a cell and return what came of it.

        Raises:
            ZsqError: it cannot be quantized, trained or verified.
        """
        return self._draw(cell, fit) if cell.quantizer is None else self._quantize(cell, fit)

    @clear_memory_errors()
    def fit(self, cell: Cell) -> Fit:
        """Fit a cell's method, or take the fit that the folder holds.

        Raises:
            ZsqError: the teacher lacks what the method learns from, a data set is missing, a loss is not finite.
        """
        teacher, folder = self.teachers.of(cell).teacher, self.layout.fit(cell)
        settings = self.teachers.located(cell.fit_settings)
        run = self._run(cell, folder)
        resumed = _begin(run, settings, teacher, fit_digest(cell, teacher))
        stored = folder / "fit.json"
        known, fitted = _stored_fit(folder, teacher)
        start = time.perf_counter()
        job = Job(teacher=teacher, run=run, folder=folder, settings=settings, fitted=fitted)
        surrogate = fit(job)
        if known is None:
            seconds = round(time.perf_counter() - start, 2)
            known = FitFacts(seconds, resumed, measure_recognition(job, surrogate))
            with replacing(stored) as temporary:
                temporary.write_text(json.dumps(sealed_values(asdict(known))) + "\n", encoding="utf-8")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        state = surrogate.source.state_dict()
        shared = None if state else surrogate
        return Fit(shared, state, known.label_recognition, known.seconds, known.resumed)

    def _quantize(self, cell: Cell, fit: Fit) -> Quantized:
        """Do what follows the fit."""
        loaded, folder = self.teachers.of(cell), self.layout.cell(cell)
        known = loaded.evaluated()
        begin = time.perf_counter()
        settings = self.teachers.located(cell.settings)
        run = self._run(cell, folder)
        resumed = _begin(run, settings, loaded.teacher, digest(cell) + loaded.teacher.weights_sha256)
        outputs = Outputs(pt2=False, predictions=True, simulation=False, layers=False, float_results=known)
        job = Job(
            teacher=loaded.teacher,
            run=run,
            folder=folder,
            settings=settings,
            data=loaded.images,
            decoder=loaded.decoder,
            outputs=outputs,
        )
        watch = Stopwatch(begin)
        watch.phases["fit"] = fit.seconds
        surrogate = _surrogate(fit, settings, loaded.teacher, run)
        record = finish(job, surrogate, fit.recognition, watch).record
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return _quantized(record, loaded.measure, fit, resumed=resumed)

    def _draw(self, cell: Cell, fit: Fit) -> Drawn:
        """Write the picture of a cell that draws samples."""
        teacher, path = self.teachers.of(cell).teacher, self.layout.picture(cell)
        settings = self.teachers.located(cell.fit_settings)
        source = _surrogate(fit, settings, teacher, Run(seed=cell.seed, device=self.teachers.device)).source
        figure, names = self.teachers.figure_of(teacher)
        save_figure(source, teacher.spec, figure, names, path)
        return Drawn(
            weights_sha256=teacher.weights_sha256,
            figure=str(path.relative_to(self.layout.folder)),
            fit_seconds=fit.seconds,
            resumed=fit.resumed,
            label_recognition=fit.recognition,
        )

    def _run(self, cell: Cell, folder: Path) -> Run:
        log = open_log(self.log, folder, self.teachers.of(cell).teacher.spec)
        return Run(folder, seed=cell.seed, device=self.teachers.device, observer=self.observer, log=log)


def _begin(run: Run, settings: Settings, teacher: Teacher, mark: str) -> bool:
    """Make the folder of a fit or a cell, anew if another one with other settings lies there.

    Args:
        run: the fit's or the cell's.
        settings, teacher: of the run.
        mark: hash of all that its result depends on.

    Returns:
        Whether a run that was stopped is continued from its checkpoint.
    """
    folder = run.folder
    assert folder is not None
    path = folder / SETTINGS
    same = path.exists() and _mark_of(folder) == mark
    if same and computes_otherwise(folder, teacher):
        logger.warning(f"{folder} is of '{teacher.name}' as it was before its definition changed; it is made anew.")
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        facts = {"seed": run.seed, "device": run.device.type, "threads": torch.get_num_threads()}
        write_settings(path, settings, teacher_table(teacher), facts | {"mark": mark} | versions())
    for checkpoint in folder.glob("checkpoints/*.safetensors"):
        try:
            load_tensors(checkpoint)
        except InputError as error:
            logger.warning(f"{error} It is left aside: its phase starts anew.")
            checkpoint.unlink()
    return same and any(folder.glob("checkpoints/*.safetensors"))


def computes_otherwise(folder: Path, teacher: Teacher) -> bool:
    """Whether a fit's or a cell's folder is of a network whose definition has changed since."""
    try:
        return other_graph(read_settings(folder / SETTINGS), teacher)
    except InputError:  # which is told where it matters
        return False


def _mark_of(folder: Path) -> str | None:
    """Return by what settings a folder was started; None where its settings.toml is damaged."""
    try:
        mark = read_settings(folder / SETTINGS).get("run", {}).get("mark")
    except InputError as error:
        logger.warning(f"{error} {folder} is made anew.")
        return None
    return mark if isinstance(mark, str) else None


def _stored_fit(folder: Path, teacher: Teacher) -> "tuple[FitFacts | None, FittedRun | None]":
    """Return what a folder says of its fit, and the fit; both None where there is none, or a damaged one."""
    stored = folder / "fit.json"
    if not stored.exists():
        return None, None
    try:
        content = json.loads(stored.read_text(encoding="utf-8"))
        values = unsealed_values(content) if isinstance(content, dict) else None
        if values is None:
            raise InputError(f"{stored} is damaged.")
        return _FIT.validate_python(values), FittedRun.open(folder, teacher) if (folder / GENERATOR).exists() else None
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, InputError) else f"{stored} is damaged."
        logger.warning(f"{what} {folder} is fitted anew.")
        for path in (stored, folder / GENERATOR):
            path.unlink(missing_ok=True)
        return None, None


_FIT = TypeAdapter(FitFacts)


def _surrogate(fit: Fit, settings: Settings, teacher: Teacher, run: Run) -> Surrogate:
    """Return what a cell may use up."""
    if fit.shared is not None:
        return fit.shared
    return settings.method.fit(teacher, run, distill_steps=settings.distill_steps, fitted=fit.state)


def _quantized(record: Record, measure: str, fit: Fit, *, resumed: bool) -> Quantized:
    """Return what a cell's line takes over from the record of its run."""
    floats, found = (record.evaluation[name].score(measure) for name in ("float", "quantized"))
    return Quantized(
        model=record.model,
        weights=record.weights,
        weights_sha256=record.weights_sha256,
        data_free=record.data_free,
        data=record.data,
        activation_scope=record.activation_scope,
        range_rule=record.range_rule,
        measure=measure,
        float_score=100 * floats.value,
        score=100 * found.value,
        teacher_agreement=record.teacher_agreement,
        runtime_agreement=record.runtime_agreement,
        label_recognition=record.label_recognition,
        samples=None if record.samples is None else asdict(record.samples),
        num_eval_images=record.num_eval_images,
        num_calibration_images=record.num_calibration_images,
        seconds=record.seconds,
        settings=record.settings,
        versions=record.versions,
        interval=None if found.low is None or found.high is None else (100 * found.low, 100 * found.high),
        fit_seconds=fit.seconds,
        resumed=resumed or fit.resumed,
        model_bytes=record.artifacts[record.file].bytes,
    )

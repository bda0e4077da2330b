"""One run from its fit to its record."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TypeVar

from PIL import Image

from zsq.errors import StorageError
from zsq.evaluation.accuracy import Evaluation
from zsq.export.classifier import FileClassifier
from zsq.export.content_hash import canonical_sha256
from zsq.export.files import open_file
from zsq.export.verify import Verification, require
from zsq.methods import Surrogate
from zsq.quantization.coverage import Coverage
from zsq.quantization.prepare import Student
from zsq.reports.html import REPORT
from zsq.runs.details import end_details
from zsq.runs.fitted import GENERATOR
from zsq.runs.job import Job
from zsq.runs.losses import Losses
from zsq.runs.record import Artifact, Record, SampleAgreement
from zsq.runs.report import write_report
from zsq.runs.samples import SAMPLES
from zsq.runs.settings import to_tables
from zsq.runs.settings_file import SETTINGS
from zsq.runs.stages import (
    PROGRAM,
    described_bits,
    evaluate_file,
    fit,
    measure_agreement,
    measure_latency,
    measure_layers,
    measure_profile,
    measure_recognition,
    quantize_network,
    warn_of_gap,
    write_and_check,
)
from zsq.runs.summary import summary_rows
from zsq.runtime import distributed
from zsq.runtime.checksums import file_sha256
from zsq.runtime.memory import clear_memory_errors, kept_memory
from zsq.runtime.plain_text import printable
from zsq.runtime.versions import versions
from zsq.targets import TARGETS

HASHED = (GENERATOR, PROGRAM, *(target.file for target in TARGETS.values()))
"""Artifacts that are the same, bit for bit, whenever a run is repeated on the CPU."""

Outcome = TypeVar("Outcome")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave."""

    record: Record
    """The content of `result.json`; percentages from 0 to 100."""
    folder: Path
    """Where the files are."""

    @property
    def model(self) -> FileClassifier:
        """The quantized network as users run it: the file in the runtime of its target."""
        return open_file(self.folder / self.record.file)

    @property
    def samples(self) -> Image.Image | None:
        """The picture of some samples, one row a class, which a notebook shows; None where the method makes none."""
        path = self.folder / SAMPLES
        if not path.exists():
            return None
        with Image.open(path) as picture:
            return picture.copy()

    @property
    def losses(self) -> Losses:
        """The losses of each phase by name, as steps and values; a notebook shows curves."""
        return Losses(self.folder)

    def report(self) -> Path:
        """Return the path of `report.html`, which is made again where it is missing."""
        path = self.folder / REPORT
        return path if path.exists() else write_report(self.folder)

    def _rows(self) -> list[tuple[str, str]]:
        return [*summary_rows(self.record), ("folder", str(self.folder))]

    def __str__(self) -> str:
        return "\n".join(printable(f"{name + ':':24} {text}") for name, text in self._rows())

    def _repr_html_(self) -> str:
        """Return the summary as a table, for a notebook."""
        style = 'style="text-align:left"'
        rows = (
            f"<tr><th {style}>{escape(name)}</th><td {style}>{escape(text)}</td></tr>" for name, text in self._rows()
        )
        return f"<table>{''.join(rows)}</table>"


class Stopwatch:
    """Seconds of a run's phases.

    Args:
        begin: when the run began, by `time.perf_counter`.
    """

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.phases[name] = round(time.perf_counter() - start, 2)

    def timed(self, name: str, work: Callable[[], Outcome]) -> Outcome:
        """Return what `work` gives, timed."""
        with self.phase(name):
            return work()

    @property
    def total(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self.begin, 2)


@clear_memory_errors()
@kept_memory()
def carry_out(job: Job, begin: float) -> Result:
    """Do all the work; the record is written even where the file fails its check.

    Args:
        job: what is to be done.
        begin: when the run began, by `time.perf_counter`.

    Raises:
        NumericsError: a loss is not finite.
        ExportError: the file does not compute what was simulated; all files are kept.
    """
    watch = Stopwatch(begin)
    surrogate = watch.timed("fit", lambda: fit(job))
    return finish(job, surrogate, measure_recognition(job, surrogate), watch)


def finish(job: Job, surrogate: Surrogate, recognition: float | None, watch: Stopwatch) -> Result:
    """Do what follows the fit: all processes quantize, and the first exports and evaluates."""
    student = watch.timed("quantize", lambda: quantize_network(job, surrogate))

    def conclude() -> Result:
        verification, covered = watch.timed("export", lambda: write_and_check(job, student, surrogate))
        evaluation = watch.timed("evaluate", lambda: evaluate_file(job, student))
        samples = watch.timed("samples", lambda: measure_agreement(job, surrogate))
        show = partial(job.run.observer.update, "report", values={}, total=4)
        show(done=0)
        layers = watch.timed("layers", lambda: measure_layers(job, surrogate, student))
        show(done=1)
        latency = watch.timed("latency", lambda: measure_latency(job))
        show(done=2)
        profile = watch.timed("profile", lambda: measure_profile(job))
        show(done=3)
        warn_of_gap(job, layers)
        record = _record(job, surrogate, student, verification, covered, evaluation, samples, recognition, watch)
        record = replace(record, layers=layers, latency=latency, profile=profile)
        for line in end_details(record):
            logger.debug(line)
        _check_whole(job, record)
        record.write(job.folder)
        write_report(job.folder)
        show(done=4)
        require(verification)
        return Result(record, job.folder)

    return distributed.on_main(conclude)


def _check_whole(job: Job, record: Record) -> None:
    """Check that what was written is still there before the record says so.

    Raises:
        StorageError: somebody has deleted a part of the run's folder.
    """
    wanted = [SETTINGS, job.file.name, *([PROGRAM] if job.outputs.pt2 else []), *record.artifacts]
    gone = [name for name in wanted if not (job.folder / name).is_file()]
    if gone:
        raise StorageError(f"{job.folder} lost {gone[0]} while the run went on; it is not finished. Start anew.")


def _record(
    job: Job,
    surrogate: Surrogate,
    student: Student,
    verification: Verification,
    covered: Coverage,
    evaluation: dict[str, Evaluation],
    samples: SampleAgreement | None,
    recognition: float | None,
    watch: Stopwatch,
) -> Record:
    quantizer = job.settings.quantizer
    return Record(
        model=job.teacher.name,
        weights=job.teacher.weights_source,
        weights_sha256=job.teacher.weights_sha256,
        method=job.settings.method.name,
        data_free=surrogate.source.data_free,
        quantizer=quantizer.name,
        bits=described_bits(job, student),
        target=job.settings.quantizer.target,
        activation_scope=quantizer.activation_scope,
        range_rule="batch-norm" if surrogate.statistics else quantizer.resolved_range_rule,
        kd_weight=quantizer.resolved_kd_weight(surrogate.source),
        seed=job.run.seed,
        data=job.data.name if job.data else None,
        verification=verification,
        coverage=covered,
        num_eval_images=job.data.num_images if job.data else 0,
        evaluation=evaluation,
        artifacts={
            name: Artifact(bytes=path.stat().st_size, sha256=canonical_sha256(path), file_sha256=file_sha256(path))
            for name in HASHED
            if (path := job.folder / name).exists()
        },
        settings=to_tables(job.settings),
        versions=versions(),
        samples=samples,
        label_recognition=recognition,
        num_calibration_images=student.num_calibration_images,
        distillation_undone=student.undone,
        seconds=watch.total,
        seconds_by_phase=watch.phases,
    )

"""One run from teacher to verified files: fit, calibrate, distil, export, evaluate, record."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zsq import parallel
from zsq.batchnorm import fold
from zsq.datasets import LabelledImages, open_dataset
from zsq.errors import InputError
from zsq.evaluate import Evaluation, Predict, evaluate_many
from zsq.export import canonical_sha256, output_step, write_onnx, write_pt2
from zsq.methods import Method, Surrogate
from zsq.quantize import PTQ, QAT
from zsq.quantize.convert import convert
from zsq.quantize.prepare import Bits, Student, check_weight_names, mean_weight_bits
from zsq.quantize.ptq import quantize_ptq
from zsq.quantize.qat import distill
from zsq.report import save_grid
from zsq.runs import (
    FittedRun,
    Say,
    choose_schedule,
    clear_folder,
    open_folder,
    pick_device,
    resolve_settings,
    stored_settings,
    teacher_table,
    versions,
)
from zsq.settings import Settings, to_tables, write_settings
from zsq.teachers import Teacher, teacher_from_module
from zsq.training import Progress, Run, clear_memory_errors, replacing, save_tensors
from zsq.types import ImageSpec
from zsq.verification import OnnxClassifier, Verification, require, verify_onnx

HASHED = ("generator.safetensors", "model.onnx", "model.pt2")
"""Artifacts that are the same, bit for bit, whenever a run is repeated on the CPU."""

PREDICTIONS = "predictions.npz"
"""A cell's file of predicted and true classes, int32 [N] each."""

VERIFY_IMAGES = 500
CELL_BATCHES = 10
"""Batches of evaluation images on which a cell of a comparison is verified; other runs take all."""
RECOGNITION_IMAGES = 1000
LOW_RECOGNITION = 50.0
"""Percent of wanted labels recognised, below which samples carry statistics but no classes."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave."""

    record: dict[str, Any]
    """The content of `result.json`; percentages from 0 to 100."""
    folder: Path
    """Where the files are."""

    @property
    def model(self) -> OnnxClassifier:
        """The quantized network as users run it: the ONNX file in ONNX Runtime."""
        return OnnxClassifier(self.folder / "model.onnx")


def quantize(
    teacher: Teacher | nn.Module,
    spec: ImageSpec | None = None,
    *,
    out: str | Path,
    bits: str | int | None = None,
    method: str | Method | None = None,
    quantizer: str | PTQ | None = None,
    recipe: str | Path | None = None,
    settings: tuple[str, ...] = (),
    budget: str | float | None = None,
    from_run: str | Path | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
    say: Say = lambda text: None,
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
        settings: assignments such as `method.steps=500`.
        budget: wall-clock time such as `5m`; None without recipe or chosen steps is ten minutes.
        from_run: folder of a run whose fitted generator is used instead of fitting one.
        data: labelled images on which teacher and result are evaluated; None measures no accuracy.
        seed: of every random draw.
        device: cpu, cuda or auto.
        resume: continue the run that `out` holds.
        overwrite: discard the run that `out` holds.
        checkpoint_every: steps between checkpoints; None saves every 30 seconds.
        progress: where progress is shown.
        say: called with lines that the user should read.

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
    where = parallel.start(pick_device(device).type)
    if not parallel.is_main():
        progress, say = None, _nothing
    teacher = teacher.to(where) if where.type != "cpu" else teacher
    folder = Path(out)
    images = None if data is None else open_dataset(os.fspath(data), teacher.spec)
    reused = None if from_run is None else FittedRun.open(Path(from_run), teacher)
    wanted = resolve_settings(method, quantizer, bits, recipe=recipe, assignments=tuple(settings), source_run=reused)
    if wanted.quantizer.weight_bits:  # before hours are spent on the fit
        check_weight_names(fold(teacher.network)[0], wanted.quantizer.weight_bits)
    run = Run(folder, seed=seed, device=where, checkpoint_steps=checkpoint_every, progress=progress, say=say)
    job = Job(teacher, folder, run, images, say, reused)
    chosen = job.stored(wanted, resume=resume, overwrite=overwrite) or job.scheduled(wanted, budget, recipe)
    return job.carry_out(chosen, begin)


def _nothing(text: str) -> None:
    """Say nothing: the first process speaks for all."""
    del text


@dataclass(slots=True)
class Job:
    """The steps of one run."""

    teacher: Teacher
    folder: Path
    run: Run
    data: LabelledImages | None
    say: Say
    reused: FittedRun | None = None
    known: Evaluation | None = None
    """The teacher's results on `data`: given for a cell of a comparison, which keeps predictions and writes no
    `model.pt2`, and which evaluates the file alone."""

    def stored(self, wanted: Settings, *, resume: bool, overwrite: bool) -> Settings | None:
        """Return the settings of the run that the folder holds and that is continued, or None."""

        def work() -> Settings | None:
            if not open_folder(self.folder, resume=resume, overwrite=overwrite):
                return None
            found = stored_settings(
                self.folder, wanted, self.teacher, self.run.seed, self.reused, self.run.device.type, self.say
            )
            clear_folder(self.folder, everything=False)
            return found

        return parallel.on_main(work)

    def scheduled(self, wanted: Settings, budget: str | float | None, recipe: str | Path | None) -> Settings:
        """Return the settings of a new run, its schedule fitted to the budget, and write them."""
        chosen, measured = choose_schedule(
            wanted,
            self.teacher,
            self.run,
            budget,
            recipe=recipe,
            num_eval_images=self.data.num_images if self.data else 0,
            fitted=self.reused is not None,
            say=self.say,
        )
        facts = {"seed": self.run.seed, "device": self.run.device.type, "processes": parallel.processes()}
        facts |= {"threads": torch.get_num_threads()} | measured | versions()
        if self.reused:
            facts["generator_sha256"] = self.reused.sha256
        if parallel.is_main():
            clear_folder(self.folder, everything=True)
            write_settings(self.folder / "settings.toml", chosen, teacher_table(self.teacher), facts)
        return chosen

    @clear_memory_errors()
    def carry_out(self, settings: Settings, begin: float) -> Result:
        """Do all the work; the record is written even where the file fails its check."""
        start = time.perf_counter()
        surrogate = self.fit(settings)
        fit_seconds = round(time.perf_counter() - start, 2)
        return self.finish(settings, surrogate, self.recognition(surrogate), fit_seconds, begin)

    def finish(
        self, settings: Settings, surrogate: Surrogate, recognition: float | None, fit_seconds: float, begin: float
    ) -> Result:
        """Do what follows the fit: all processes quantize, and the first exports and evaluates."""
        seconds = {"fit": fit_seconds}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            seconds[name] = round(time.perf_counter() - start, 2)
            return result

        student = timed("quantize", lambda: self._quantize(settings, surrogate))

        def conclude() -> Result:
            self.say(f"writing and checking model.onnx{'' if self.known else ' and model.pt2'}")
            verification = timed("export", lambda: self._export(student, surrogate))
            accuracy = timed("evaluate", lambda: self._evaluate(student))
            record = self._record(settings, surrogate, verification, accuracy)
            if settings.quantizer.weight_bits:
                activation = Bits.parse(settings.quantizer.bits).activation
                record["bits"] = f"mixed W{mean_weight_bits(student):.2f}A{activation}"
            record["label_recognition"] = recognition
            record["num_calibration_images"] = student.num_calibration_images
            record["seconds"] = round(time.perf_counter() - begin, 2)
            record["seconds_by_phase"] = seconds
            with replacing(self.folder / "result.json") as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n")
            require(verification)
            return Result(record, self.folder)

        return parallel.on_main(conclude)

    def fit(self, settings: Settings) -> Surrogate:
        """Fit the method, or take over what is fitted; keep generator and picture where the folder has none."""
        fitted = self.reused.state if self.reused else None
        surrogate = settings.method.fit(self.teacher, self.run, distill_steps=settings.distill_steps, fitted=fitted)
        if not parallel.is_main():
            return surrogate
        state = surrogate.source.state_dict()
        path = self.folder / "generator.safetensors"
        if state and not path.exists():
            meta = {"method": settings.method.name, "weights_sha256": self.teacher.weights_sha256}
            save_tensors(path, state, meta)
        if surrogate.statistics is None and not (self.folder / "samples.png").exists():
            save_grid(surrogate.source, self.teacher.spec, self.folder / "samples.png")
        return surrogate

    @torch.no_grad()
    def recognition(self, surrogate: Surrogate) -> float | None:
        """Return how often the teacher's top-1 class is the wanted one, in percent, and warn where it is low.

        None where no label is asked for.
        """
        if not surrogate.source.asks_labels:
            return None
        hits = count = 0
        for batch in surrogate.source.sample(RECOGNITION_IMAGES):
            hits += int((self.teacher.network(batch.images).argmax(1) == batch.labels).sum())
            count += len(batch.labels)
        recognition = 100 * hits / count
        if recognition < LOW_RECOGNITION:
            self.say(
                f"WARNING: the teacher recognises {recognition:.1f} % of the labels that the samples were asked for; "
                "they do not show its classes."
            )
        return recognition

    def _quantize(self, settings: Settings, surrogate: Surrogate) -> Student:
        quantizer = settings.quantizer
        student = quantize_ptq(
            surrogate.network,
            lambda: surrogate.source.sample(quantizer.num_samples),
            quantizer,
            self.run,
            learnable=isinstance(quantizer, QAT) and quantizer.scales == "learnable",
            statistics=surrogate.statistics,
        )
        if isinstance(quantizer, QAT):
            self.say(f"distilling {quantizer.steps} steps at learning rate {quantizer.learning_rate:g}")
            distill(student, self.teacher.network, surrogate.source, quantizer, self.run)
        return student

    def _export(self, student: Student, surrogate: Surrogate) -> Verification:
        """Write both files and run the ONNX file beside the simulation, on synthetic and evaluation images."""
        converted, spec = convert(student), self.teacher.spec
        if self.known is None:
            write_pt2(converted, spec, self.folder / "model.pt2")
        write_onnx(converted, spec, self.folder / "model.onnx")
        student.cpu()

        def images() -> Iterator[Tensor]:
            yield from (batch.images.cpu() for batch in surrogate.source.sample(VERIFY_IMAGES))
            batches = self.data.batches() if self.data else iter(())
            yield from (batch.images for batch in itertools.islice(batches, CELL_BATCHES if self.known else None))

        threads = torch.get_num_threads()
        return verify_onnx(self.folder / "model.onnx", student, images(), output_step(converted), threads=threads)

    def _evaluate(self, student: Student) -> dict[str, Evaluation]:
        """Measure the teacher, the file and the simulation on the evaluation images, where there are any."""
        if self.data is None:
            return {}
        file = OnnxClassifier(self.folder / "model.onnx", threads=torch.get_num_threads())
        if self.known is not None:
            found = evaluate_many({"quantized": file}, self.data, teacher=self.known, progress=self._show)
            self._keep_predictions(found["quantized"])
            return {"float": self.known, **found}
        latest: list[tuple[Tensor, Tensor]] = []

        def ask_teacher(images: Tensor) -> Tensor:
            if not latest or latest[0][0] is not images:  # asked twice of each batch, as network and as teacher
                latest[:] = [(images, self.teacher.network(images.to(self.run.device)).cpu())]
            return latest[0][1]

        networks: dict[str, Predict] = {"float": ask_teacher, "quantized": file, "simulated": student}
        return evaluate_many(networks, self.data, teacher=ask_teacher, progress=self._show)

    def _show(self, done: int, total: int) -> None:
        self.run.progress.update("evaluate", done, total, {})

    def _keep_predictions(self, found: Evaluation) -> None:
        """Write the class of each image, so that results can be compared image by image."""
        assert found.predictions is not None
        assert found.labels is not None
        with replacing(self.folder / PREDICTIONS) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, predictions=found.predictions, labels=found.labels)

    def _record(
        self, settings: Settings, surrogate: Surrogate, verification: Verification, found: dict[str, Evaluation]
    ) -> dict[str, Any]:
        quantizer = settings.quantizer
        return {
            "model": self.teacher.name,
            "weights": self.teacher.weights_source,
            "weights_sha256": self.teacher.weights_sha256,
            "method": settings.method.name,
            "data_free": surrogate.source.data_free,
            "quantizer": quantizer.name,
            "bits": quantizer.bits,
            "activation_scope": quantizer.activation_scope,
            "range_rule": "batch-norm" if surrogate.statistics else quantizer.resolved_range_rule,
            "kd_weight": quantizer.resolved_kd_weight(surrogate.source) if isinstance(quantizer, QAT) else None,
            "seed": self.run.seed,
            "data": self.data.name if self.data else None,
            **{
                f"{name}_top1": found[name].top1 if name in found else None
                for name in ("float", "quantized", "simulated")
            },
            "teacher_agreement": found["quantized"].teacher_agreement if found else None,
            "runtime_agreement": verification.agreement_literal,
            "verification": asdict(verification),
            "num_eval_images": self.data.num_images if self.data else 0,
            "evaluation": {name: value.as_dict() for name, value in found.items()},
            "artifacts": {
                name: {"bytes": path.stat().st_size, "sha256": canonical_sha256(path)}
                for name in HASHED
                if (path := self.folder / name).exists()
            },
            "settings": to_tables(settings),
            "versions": versions(),
        }

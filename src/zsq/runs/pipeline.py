"""The stages of one run: fit, calibrate, distil, export, check, evaluate, record."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.data.datasets import LabelledImages
from zsq.errors import InputError
from zsq.evaluation.accuracy import Evaluation, Predict, evaluate_many
from zsq.export.content_hash import canonical_sha256
from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.pt2 import write_pt2
from zsq.export.verify import OnnxClassifier, Verification, require, verify_onnx
from zsq.methods import Surrogate
from zsq.models.teacher import Teacher
from zsq.quantization.convert import convert
from zsq.quantization.prepare import Bits, Student, mean_weight_bits
from zsq.quantization.ptq import quantize_ptq
from zsq.reports.pictures import save_grid
from zsq.runs.folder import (
    FittedRun,
    choose_schedule,
    clear_folder,
    open_folder,
    stored_settings,
    teacher_table,
    versions,
)
from zsq.runs.settings import Settings, to_tables, write_settings
from zsq.runtime import distributed
from zsq.runtime.files import load_tensors, replacing, save_tensors
from zsq.runtime.memory import clear_memory_errors
from zsq.training.loop import Run
from zsq.types import Batch, SampleSource

logger = logging.getLogger(__name__)

HASHED = ("generator.safetensors", "model.onnx", "model.pt2")
"""Artifacts that are the same, bit for bit, whenever a run is repeated on the CPU."""

PREDICTIONS = "predictions.npz"
"""A cell's file of predicted and true classes, int32 [N] each."""

VERIFY_IMAGES = 500
CELL_BATCHES = 10
"""Batches of evaluation images on which a cell of a comparison is verified; other runs take all."""
RECOGNITION_IMAGES = 1000
AGREEMENT_IMAGES = 500
LOW_AGREEMENT = 80.0
"""Percent of fresh samples on which file and teacher agree, below which the file is not worth much as it is; see
docs/results.md for what goes with it on real images."""
MANY_CLASSES = 20
"""Samples of half as many classes, or of half of the network's where it has fewer, are enough to tell."""
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


@dataclass(frozen=True, slots=True)
class FreshSamples:
    """Samples from random streams of their own, as a set to evaluate on; a pool has no others than it has."""

    source: SampleSource
    num_images: int

    def batches(self, batch_size: int = 100) -> Iterator[Batch]:
        """Yield them; a source that holds fewer gives what it has."""
        yield from self.source.sample(self.num_images, batch_size, "fresh")


@dataclass(slots=True)
class Job:
    """The steps of one run."""

    teacher: Teacher
    folder: Path
    run: Run
    data: LabelledImages | None
    reused: FittedRun | None = None
    known: Evaluation | None = None
    """The teacher's results on `data`: given for a cell of a comparison, which keeps predictions and writes no
    `model.pt2`, and which evaluates the file alone."""

    def stored(self, wanted: Settings, *, resume: bool, overwrite: bool) -> Settings | None:
        """Return the settings of the run that the folder holds and that is continued, or None."""

        def work() -> Settings | None:
            if not open_folder(self.folder, resume=resume, overwrite=overwrite):
                if resume:
                    logger.info(f"{self.folder} holds no run to continue; this one starts anew")
                return None
            found = stored_settings(self.folder, wanted, self.teacher, self.run.seed, self.reused, self.run.device.type)
            clear_folder(self.folder, everything=False)
            return found

        return distributed.on_main(work)

    def scheduled(
        self, wanted: Settings, budget: str | float | None, recipe: str | Path | None, *, overwrite: bool = False
    ) -> Settings:
        """Return the settings of a new run, its schedule fitted to the budget, and write them.

        What is to be overwritten is deleted only when the method has been seen to start.
        """
        if overwrite and self.reused is None:
            wanted.method.with_steps(0).fit(self.teacher, Run(seed=self.run.seed, device=self.run.device))
        chosen, measured = choose_schedule(
            wanted,
            self.teacher,
            self.run,
            budget,
            recipe=recipe,
            num_eval_images=self.data.num_images if self.data else 0,
            fitted=self.reused is not None,
        )
        facts = {"seed": self.run.seed, "device": self.run.device.type, "processes": distributed.processes()}
        facts |= {"threads": torch.get_num_threads()} | measured | versions()
        if self.reused:
            facts["generator_sha256"] = self.reused.sha256
        if distributed.is_main():
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
            logger.info(f"writing and checking model.onnx{'' if self.known else ' and model.pt2'}")
            verification = timed("export", lambda: self._export(student, surrogate))
            accuracy = timed("evaluate", lambda: self._evaluate(student))
            record = self._record(settings, surrogate, verification, accuracy)
            record["samples"] = timed("samples", lambda: self.agreement(surrogate, record["quantizer"]))
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

        return distributed.on_main(conclude)

    def fit(self, settings: Settings) -> Surrogate:
        """Fit the method, or take over what is fitted; keep generator and picture where the folder has none."""
        fitted = self.reused.state if self.reused else None
        surrogate = settings.method.fit(self.teacher, self.run, distill_steps=settings.distill_steps, fitted=fitted)
        if not distributed.is_main():
            return surrogate
        state = surrogate.source.state_dict()
        path = self.folder / "generator.safetensors"
        if state and not self._holds_generator(path):
            meta = {"method": settings.method.name, "weights_sha256": self.teacher.weights_sha256}
            save_tensors(path, state, meta)
        if surrogate.statistics is None and not (self.folder / "samples.png").exists():
            save_grid(surrogate.source, self.teacher.spec, self.folder / "samples.png")
        return surrogate

    def _holds_generator(self, path: Path) -> bool:
        """Tell whether the folder has its generator; a damaged one is written anew."""
        if not path.exists():
            return False
        try:
            load_tensors(path)
        except InputError as error:
            logger.warning(f"{error} It is written anew.")
            return False
        return True

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
            logger.warning(
                f"the teacher recognises {recognition:.1f} % of the labels that the samples were asked for; "
                "they do not show its classes."
            )
        return recognition

    def agreement(self, surrogate: Surrogate, quantizer: str) -> dict[str, Any] | None:
        """Return how often the file and the teacher name the same class for samples that calibrated nothing.

        It says how good a file is where no real image does, and a warning is given where it is low. None where the
        method makes no images; a method that holds few images has no fresh ones.
        """
        if surrogate.statistics is not None:
            return None
        file = OnnxClassifier(self.folder / "model.onnx", threads=torch.get_num_threads())
        teacher = self._teacher_once()
        networks: dict[str, Predict] = {"file": file, "teacher": teacher}
        found = evaluate_many(networks, FreshSamples(surrogate.source, AGREEMENT_IMAGES), teacher=teacher)
        named, agreement = found["teacher"].predictions, found["file"].teacher_agreement
        assert named is not None
        assert agreement is not None
        classes = len(np.unique(named))
        meaningful = classes >= min(self.teacher.spec.classes, MANY_CLASSES) / 2
        if self.data is None and not meaningful:
            logger.warning(
                f"the float network sees {classes} classes in the samples, too few to tell how good "
                "model.onnx is; a longer --budget may help, and labelled images (--data) tell the accuracy."
            )
        elif self.data is None and agreement < LOW_AGREEMENT:
            hint = "" if quantizer == "qat" else "--quantizer qat or "
            logger.warning(
                f"model.onnx and the float network name the same class for only {agreement:.1f} % of the "
                f"samples; {hint}more bits may help, and labelled images (--data) tell the accuracy."
            )
        return {
            "num_images": found["file"].num_images,
            "num_classes": classes,
            "teacher_agreement": agreement if meaningful else None,
        }

    def _quantize(self, settings: Settings, surrogate: Surrogate) -> Student:
        quantizer = settings.quantizer
        student = quantize_ptq(
            surrogate.network,
            lambda: surrogate.source.sample(quantizer.num_samples),
            quantizer,
            self.run,
            learnable=quantizer.trains_scales,
            statistics=surrogate.statistics,
        )
        quantizer.train(student, self.teacher.network, surrogate.source, self.run)
        return student

    def _export(self, student: Student, surrogate: Surrogate) -> Verification:
        """Write both files and run the ONNX file beside the simulation, on synthetic and evaluation images."""
        converted, spec = convert(student), self.teacher.spec
        if self.known is None:
            write_pt2(converted, spec, self.folder / "model.pt2")
        write_onnx(converted, spec, self.folder / "model.onnx")

        def simulate(images: Tensor) -> Tensor:
            return student(images.to(self.run.device))

        def images() -> Iterator[Tensor]:
            yield from (batch.images.cpu() for batch in surrogate.source.sample(VERIFY_IMAGES))
            batches = self.data.batches() if self.data else iter(())
            yield from (batch.images for batch in itertools.islice(batches, CELL_BATCHES if self.known else None))

        threads = torch.get_num_threads()
        return verify_onnx(self.folder / "model.onnx", simulate, images(), output_step(converted), threads=threads)

    def _evaluate(self, student: Student) -> dict[str, Evaluation]:
        """Measure the teacher, the file and the simulation on the evaluation images, where there are any."""
        if self.data is None:
            return {}
        file = OnnxClassifier(self.folder / "model.onnx", threads=torch.get_num_threads())
        if self.known is not None:
            found = evaluate_many({"quantized": file}, self.data, teacher=self.known, progress=self._show)
            self._keep_predictions(found["quantized"])
            return {"float": self.known, **found}
        teacher = self._teacher_once()
        networks: dict[str, Predict] = {"float": teacher, "quantized": file, "simulated": student}
        return evaluate_many(networks, self.data, teacher=teacher, progress=self._show)

    def _teacher_once(self) -> Predict:
        """Return the teacher for an evaluation, which asks it twice of each batch: as network and as teacher."""
        latest: list[tuple[Tensor, Tensor]] = []

        def ask(images: Tensor) -> Tensor:
            if not latest or latest[0][0] is not images:
                latest[:] = [(images, self.teacher.network(images.to(self.run.device)).cpu())]
            return latest[0][1]

        return ask

    def _show(self, done: int, total: int) -> None:
        self.run.observer.update("evaluate", done, total, {})

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
            "kd_weight": quantizer.resolved_kd_weight(surrogate.source),
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

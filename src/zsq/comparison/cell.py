"""The cells of a comparison: one fit for all that share it, one quantized and evaluated file a cell."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.comparison.recipe import Cell, Recipe, TeacherEntry, below
from zsq.comparison.sample_figure import class_names, save_figure, shown_labels
from zsq.data.datasets import LabelledImages, open_dataset
from zsq.evaluation.accuracy import Evaluation, evaluate
from zsq.graph.fold import fold
from zsq.methods import Surrogate
from zsq.models.teacher import Teacher
from zsq.quantization.prepare import check_weight_names
from zsq.runs.folder import FittedRun, teacher_table, versions
from zsq.runs.pipeline import PREDICTIONS, Job
from zsq.runs.settings import Settings, read_toml, to_tables, write_settings
from zsq.runtime.files import replacing
from zsq.runtime.memory import clear_memory_errors
from zsq.runtime.observer import Observer
from zsq.training.loop import Run

KEPT = (
    *("model", "weights", "weights_sha256", "data_free", "data", "activation_scope", "range_rule"),
    *("float_top1", "quantized_top1", "teacher_agreement", "runtime_agreement", "label_recognition", "samples"),
    *("num_eval_images", "num_calibration_images", "seconds", "settings", "versions"),
)
"""What a cell's line takes over from its record."""


PATHS = ("data", "checkpoint")
"""Settings of methods that name files."""

ELSEWHERE = ("label", "title", "real", "bits", "quantizer", "methods")
"""What a recipe says of a teacher that changes no result, or stands in the settings of a cell."""


def digest(cell: Cell) -> str:
    """Return the hash of all that the recipe says of a cell's result; titles, and where data lies, are not part."""
    entry = {key: value for key, value in asdict(cell.teacher).items() if key not in ELSEWHERE}
    content: dict[str, Any] = {"teacher": entry, "seed": cell.seed, **_fit_content(cell)}
    content["quantizer"] = to_tables(cell.settings)["quantizer"] if cell.quantizer else None
    return _sha256(content)


def fit_digest(cell: Cell, teacher: Teacher) -> str:
    """Return the hash of all that a fit depends on."""
    facts = {key: value for key, value in teacher_table(teacher).items() if key not in ("model", "weights")}
    return _sha256({"teacher": facts, "seed": cell.seed, **_fit_content(cell)})


def _fit_content(cell: Cell) -> dict[str, Any]:
    """Return the method's settings, and the distillation that its schedule spans where it has one."""
    learns = bool(cell.settings.method.steps)
    return {
        "method": to_tables(cell.settings)["method"],
        "distill_steps": cell.fit_settings.distill_steps if learns else 0,
    }


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Fit:
    """A fitted method, shared by cells."""

    shared: Surrogate | None
    """Where a source learns nothing, the same one serves all cells."""
    state: dict[str, Tensor]
    """From which each cell starts a source of its own otherwise, since distillation goes on training it."""
    recognition: Any
    """How often the teacher recognised the wanted label, as a record has it."""
    seconds: float
    resumed: bool
    """Whether it was stopped and continued, so that `seconds` are not all."""


@dataclass(slots=True)
class Loaded:
    """A teacher and its images."""

    teacher: Teacher
    data: LabelledImages | None
    float_results: Evaluation | None = None


@dataclass(slots=True)
class Bench:
    """Runs one cell after another in the folder of a comparison."""

    recipe: Recipe
    folder: Path
    root: Path | None
    device: torch.device
    observer: Observer
    teachers: dict[str, Loaded] = field(default_factory=dict)

    def load(self, chosen: Iterable[Cell]) -> None:
        """Load teachers and open their images, so that what does not fit is known before the first cell runs.

        Raises:
            InputError: a teacher, a data set, a name of a weight or a class of the figure does not fit.
        """
        checked = set()
        for cell in chosen:
            teacher = self._load(cell.teacher).teacher
            if cell.quantizer is None:
                assert self.recipe.figure is not None
                shown_labels(self.recipe.figure, self._names(teacher))
            elif cell.settings.quantizer.weight_bits:
                check_weight_names(fold(teacher.network)[0], cell.settings.quantizer.weight_bits)
            data = getattr(cell.settings.method, "data", None)
            if data and (cell.teacher.label, data) not in checked:
                checked.add((cell.teacher.label, data))
                open_dataset(below(self.root, data), teacher.spec)

    def _load(self, entry: TeacherEntry) -> Loaded:
        if entry.label not in self.teachers:
            teacher = entry.load(self.root)
            data = None if entry.data is None else open_dataset(below(self.root, entry.data), teacher.spec)
            teacher = teacher.to(self.device) if self.device.type != "cpu" else teacher
            self.teachers[entry.label] = Loaded(teacher, data)
        return self.teachers[entry.label]

    def _names(self, teacher: Teacher) -> list[str]:
        assert self.recipe.figure is not None
        return class_names(self.recipe.figure, teacher.spec.classes, self.root)

    def place(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return self.folder / "cells" / cell.name

    def result(self, cell: Cell) -> Path:
        """Return the file that a finished cell has left."""
        if cell.quantizer is None:
            return self.folder / "figures" / f"{cell.fit_name.replace('/', '-')}.png"
        return self.place(cell) / PREDICTIONS

    @clear_memory_errors()
    def run(self, cell: Cell, fit: Fit) -> dict[str, Any]:
        """Run a cell and return what its line says of it.

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
        loaded = self.teachers[cell.teacher.label]
        folder = self.folder / "fits" / cell.fit_name
        settings = self._resolved(cell.fit_settings)
        resumed = self._begin(folder, cell, settings, fit_digest(cell, loaded.teacher))
        run = Run(folder, seed=cell.seed, device=self.device, observer=self.observer)
        stored = folder / "fit.json"
        known = json.loads(stored.read_text()) if stored.exists() else None
        fitted = None
        if known and (folder / "generator.safetensors").exists():
            fitted = FittedRun.open(folder, loaded.teacher)
        start = time.perf_counter()
        job = Job(loaded.teacher, folder, run, None, fitted)
        surrogate = job.fit(settings)
        if known is None:
            seconds = round(time.perf_counter() - start, 2)
            known = {"seconds": seconds, "resumed": resumed, "label_recognition": job.recognition(surrogate)}
            with replacing(stored) as temporary:
                temporary.write_text(json.dumps(known) + "\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        state = surrogate.source.state_dict()
        shared = None if state else surrogate
        return Fit(shared, state, known["label_recognition"], known["seconds"], known["resumed"])

    def _begin(self, folder: Path, cell: Cell, settings: Settings, mark: str) -> bool:
        """Make a folder for a fit or a cell; return whether one that was stopped is continued."""
        path = folder / "settings.toml"
        same = path.exists() and read_toml(path).get("run", {}).get("mark") == mark
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
            facts = {"seed": cell.seed, "device": self.device.type, "threads": torch.get_num_threads()}
            teacher = self.teachers[cell.teacher.label].teacher
            write_settings(path, settings, teacher_table(teacher), facts | {"mark": mark} | versions())
        return same and any(folder.glob("checkpoints/*.safetensors"))

    def _resolved(self, settings: Settings) -> Settings:
        """Return the settings with paths as they are on this machine."""
        method: Any = settings.method
        found = {name: below(self.root, path) for name in PATHS if (path := getattr(method, name, None))}
        return replace(settings, method=replace(method, **found)) if found else settings

    def _surrogate(self, cell: Cell, fit: Fit, settings: Settings, run: Run) -> Surrogate:
        """Return what a cell may use up."""
        if fit.shared is not None:
            return fit.shared
        teacher = self.teachers[cell.teacher.label].teacher
        return settings.method.fit(teacher, run, distill_steps=settings.distill_steps, fitted=fit.state)

    def _quantize(self, cell: Cell, fit: Fit) -> dict[str, Any]:
        """Do what follows the fit; the teacher itself is evaluated once for all of its cells."""
        loaded, folder = self.teachers[cell.teacher.label], self.place(cell)
        assert loaded.data is not None
        if loaded.float_results is None:
            loaded.float_results = evaluate(loaded.teacher.network, loaded.data)
        begin = time.perf_counter()
        settings = self._resolved(cell.settings)
        run = Run(folder, seed=cell.seed, device=self.device, observer=self.observer)
        resumed = self._begin(folder, cell, settings, digest(cell) + loaded.teacher.weights_sha256)
        job = Job(loaded.teacher, folder, run, loaded.data, known=loaded.float_results)
        surrogate = self._surrogate(cell, fit, settings, run)
        record = job.finish(settings, surrogate, fit.recognition, fit.seconds, begin).record
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {
            **{name: record[name] for name in KEPT},
            "top1_interval": record["evaluation"]["quantized"]["top1_interval"],
            "fit_seconds": fit.seconds,
            "resumed": resumed or fit.resumed,
            "model_bytes": record["artifacts"]["model.onnx"]["bytes"],
        }

    def _draw(self, cell: Cell, fit: Fit) -> dict[str, Any]:
        """Write the picture of a cell that draws samples."""
        assert self.recipe.figure is not None
        teacher, path = self.teachers[cell.teacher.label].teacher, self.result(cell)
        run = Run(seed=cell.seed, device=self.device)
        source = self._surrogate(cell, fit, self._resolved(cell.fit_settings), run).source
        save_figure(source, teacher.spec, self.recipe.figure, self._names(teacher), path)
        return {
            "weights_sha256": teacher.weights_sha256,
            "figure": str(path.relative_to(self.folder)),
            "fit_seconds": fit.seconds,
            "resumed": fit.resumed,
            "label_recognition": fit.recognition,
        }

"""One run from teacher to verified files: fit, calibrate, distil, export, evaluate, record."""

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.budget import Plan, parse_duration, plan
from zsq.datasets import open_dataset
from zsq.errors import InputError
from zsq.evaluate import evaluate_many
from zsq.export import canonical_sha256, output_step, write_onnx, write_pt2
from zsq.methods import Method, Surrogate
from zsq.quantize import PTQ, QAT
from zsq.quantize.convert import convert
from zsq.quantize.prepare import Student
from zsq.quantize.ptq import quantize_ptq
from zsq.quantize.qat import distill
from zsq.report import save_grid
from zsq.settings import Settings, read_toml, resolve, to_tables, write_settings
from zsq.teachers import Teacher, teacher_from_module
from zsq.training import Progress, Run, load_tensors, replacing, save_tensors
from zsq.types import ImageSpec
from zsq.verification import OnnxClassifier, Verification, require, verify_onnx

ARTIFACTS = (
    "settings.toml",
    "generator.safetensors",
    "model.onnx",
    "model.pt2",
    "metrics.jsonl",
    "samples.png",
    "result.json",
)
"""Files of a run's folder, beside `checkpoints/`."""

HASHED = ("generator.safetensors", "model.onnx", "model.pt2")
"""Artifacts that are the same, bit for bit, whenever a run is repeated on the CPU."""

DEFAULT_BUDGET = "10m"
VERIFY_IMAGES = 500
RECOGNITION_IMAGES = 1000
LOW_RECOGNITION = 50.0
"""Percent of wanted labels recognised, below which samples carry statistics but no classes."""

Say = Callable[[str], None]


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
    data: str | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> Result:
    """Quantize a classifier without its training data and write the files to a folder.

    Args:
        teacher: a `Teacher` (see `load_teacher`), or any module in memory, with its `spec`.
        spec: what the module takes and gives; only with a module.
        out: folder of the run.
        bits: `8`, `6`, `4`, `W4A8`; None takes the recipe's, else 8.
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
    if isinstance(teacher, nn.Module):
        if spec is None:
            raise InputError("quantize(module, spec, ...) needs the ImageSpec of the module.")
        teacher = teacher_from_module(teacher, spec)
    job = _Job(teacher, Path(out), seed, pick_device(device), data, progress, say, checkpoint_every)
    begin = time.perf_counter()
    job.open_folder(resume=resume, overwrite=overwrite)
    source_run = None if from_run is None else FittedRun.open(Path(from_run), teacher)
    wanted = _resolve(method, quantizer, bits, recipe, settings, source_run)
    chosen = job.stored_settings(wanted) if job.resuming else job.choose(wanted, budget, recipe, source_run)
    return job.carry_out(chosen, source_run, begin)


def _resolve(
    method: str | Method | None,
    quantizer: str | PTQ | None,
    bits: str | int | None,
    recipe: str | Path | None,
    assignments: tuple[str, ...],
    source_run: "FittedRun | None",
) -> Settings:
    """Merge names, objects, recipe, assignments and the settings of the run whose generator is reused."""
    extra: list[str] = []
    for section, given in (("method", method), ("quantizer", quantizer)):
        if given is not None and not isinstance(given, str):
            table = to_tables(Settings(given, given))[section]  # type: ignore[arg-type]
            extra += [f"{section}.{key}={value}" for key, value in table.items() if key != "name"]
    names = [given if given is None or isinstance(given, str) else given.name for given in (method, quantizer)]
    merged = resolve(
        method=names[0] or (source_run.method.name if source_run else None),
        quantizer=names[1],
        bits=bits,
        recipe=None if recipe is None else Path(recipe),
        assignments=[*extra, *assignments],
    )
    if source_run is None:
        return merged
    clash = [key for key in merged.chosen if key.startswith("method.")]
    if names[0] not in (None, source_run.method.name) or (clash and recipe is None):
        raise InputError(
            f"--from reuses a generator fitted by method {source_run.method.name} with the settings of "
            f"{source_run.folder / 'settings.toml'}; {(clash or ['--method'])[0]} cannot change it any more."
        )
    return Settings(source_run.method, merged.quantizer, merged.chosen | {"method.steps"})


def pick_device(name: str) -> torch.device:
    """Return the device that `cpu`, `cuda` or `auto` means here.

    Raises:
        InputError: an unknown name, or CUDA where there is none.
    """
    if name not in ("cpu", "cuda", "auto"):
        raise InputError(f"device is '{name}'; cpu, cuda and auto work.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda' and PyTorch sees no CUDA device here; cpu and auto work.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class FittedRun:
    """A finished fit that another run reuses."""

    folder: Path
    method: Method
    state: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path, teacher: Teacher) -> "FittedRun":
        """Read the generator of a run.

        Raises:
            InputError: the folder holds no generator, or one of another teacher.
        """
        path = folder / "generator.safetensors"
        if not path.is_file():
            raise InputError(f"{folder} holds no generator.safetensors; --from takes the folder of a run that fitted one.")
        state, meta = load_tensors(path)
        if meta.get("weights_sha256") != teacher.weights_sha256:
            raise InputError(
                f"{path} was fitted to other weights (sha256 {meta.get('weights_sha256', 'unknown')[:12]}) "
                f"than those of '{teacher.name}' ({teacher.weights_sha256[:12]})."
            )
        return cls(folder, resolve(recipe=folder / "settings.toml").method, state)


class _Job:
    """The steps of one run."""

    def __init__(
        self,
        teacher: Teacher,
        folder: Path,
        seed: int,
        device: torch.device,
        data: str | None,
        progress: Progress | None,
        say: Say,
        checkpoint_every: int | None,
    ) -> None:
        self.teacher = teacher.to(device) if device.type != "cpu" else teacher
        self.folder, self.say, self.resuming = folder, say, False
        self.run = Run(folder, seed=seed, device=device, checkpoint_steps=checkpoint_every, progress=progress)
        self.data = None if data is None else open_dataset(data, teacher.spec)
        self.seconds: dict[str, float] = {}

    def open_folder(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder, or refuse to mix two runs."""
        if resume and overwrite:
            raise InputError("--resume continues a run and --overwrite discards it; give one of them.")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; --out takes a folder.")
        holds_run = any((self.folder / name).exists() for name in (*ARTIFACTS, "checkpoints"))
        if holds_run and not resume and not overwrite:
            raise InputError(f"{self.folder} holds another run; --resume continues it, --overwrite discards it.")
        if overwrite:
            self._discard()
        self.resuming = resume and (self.folder / "settings.toml").exists()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _discard(self) -> None:
        """Remove a run's own files, and nothing else."""
        checkpoints = self.folder / "checkpoints"
        found = [self.folder / name for name in ARTIFACTS]
        found += checkpoints.glob("*.safetensors") if checkpoints.is_dir() else []
        for path in found:
            path.unlink(missing_ok=True)

    def choose(
        self, wanted: Settings, budget: str | float | None, recipe: str | Path | None, source_run: FittedRun | None
    ) -> Settings:
        """Fit the schedule to the budget, write the settings, and return them."""
        if budget is None and recipe is None and not _has_schedule(wanted):
            budget = DEFAULT_BUDGET
        note: dict[str, Any] = {}
        chosen = wanted
        if budget is not None:
            seconds = parse_duration(budget)
            self.say(f"measuring a step to fit the schedule into {seconds:.0f} s")
            images = self.data.num_images if self.data else 0
            planned = plan(
                wanted,
                self.teacher,
                self.run,
                seconds,
                num_eval_images=images,
                fitted=source_run is not None,
            )
            chosen, note = planned.settings, _plan_note(planned, seconds)
            self.say(_describe_plan(planned))
        run = {"seed": self.run.seed, "device": self.run.device.type, "threads": torch.get_num_threads(), **note}
        write_settings(self.folder / "settings.toml", chosen, self._teacher_table(), run | versions())
        return chosen

    def stored_settings(self, wanted: Settings) -> Settings:
        """Return the settings of the run that is resumed, refusing to continue it as something else."""
        path = self.folder / "settings.toml"
        content = read_toml(path)
        stored = resolve(recipe=path)
        tables, asked = to_tables(stored), to_tables(wanted)
        differing = [
            f"{name} is {tables[name.partition('.')[0]].get(name.partition('.')[2])} there"
            for name in sorted(wanted.chosen)
            if tables[name.partition(".")[0]].get(name.partition(".")[2])
            != asked[name.partition(".")[0]].get(name.partition(".")[2])
        ]
        table, run = content.get("teacher", {}), content.get("run", {})
        if table.get("weights_sha256") != self.teacher.weights_sha256:
            differing.append(f"the weights of '{table.get('model')}' were others there")
        if run.get("seed") != self.run.seed:
            differing.append(f"seed is {run.get('seed')} there")
        if differing:
            raise InputError(f"{self.folder} holds a run that differs: {differing[0]}. --overwrite starts anew.")
        return stored

    def _teacher_table(self) -> dict[str, Any]:
        spec = self.teacher.spec
        return {
            "model": self.teacher.name,
            "weights": self.teacher.weights_source,
            "weights_sha256": self.teacher.weights_sha256,
            "input": f"{spec.channels}x{spec.height}x{spec.width}",
            "classes": spec.classes,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "resize": spec.resize,
        }

    def carry_out(self, settings: Settings, source_run: FittedRun | None, begin: float) -> Result:
        """Do all the work of a run whose settings are written."""
        surrogate = self._timed("fit", lambda: self._fit(settings, source_run))
        recognition = self._recognition(surrogate)
        student = self._timed("quantize", lambda: self._quantize(settings, surrogate))
        self.say("writing and checking model.onnx and model.pt2")
        verification = self._timed("export", lambda: self._export(student, surrogate))
        accuracy = self._timed("evaluate", lambda: self._evaluate(student))
        record = self._record(settings, surrogate, recognition, verification, accuracy)
        record["seconds"] = round(time.perf_counter() - begin, 2)
        record["seconds_by_phase"] = {name: round(value, 2) for name, value in self.seconds.items()}
        with replacing(self.folder / "result.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
        require(verification)
        return Result(record, self.folder)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result

    def _fit(self, settings: Settings, source_run: FittedRun | None) -> Surrogate:
        fitted = source_run.state if source_run else None
        surrogate = settings.method.fit(
            self.teacher, self.run, distill_steps=settings.distill_steps, fitted=fitted
        )
        state = surrogate.source.state_dict()
        path = self.folder / "generator.safetensors"
        if state and not path.exists():
            meta = {"method": settings.method.name, "weights_sha256": self.teacher.weights_sha256}
            save_tensors(path, state, meta)
        if not (self.folder / "samples.png").exists():
            save_grid(surrogate.source, self.teacher.spec, self.folder / "samples.png")
        return surrogate

    @torch.no_grad()
    def _recognition(self, surrogate: Surrogate) -> float:
        """Return how often the teacher's top-1 class is the wanted one, in percent, and warn where it is low."""
        hits = count = 0
        for batch in surrogate.source.sample(RECOGNITION_IMAGES):
            hits += int((self.teacher.network(batch.images).argmax(1) == batch.labels).sum())
            count += len(batch.labels)
        recognition = 100 * hits / count
        if recognition < LOW_RECOGNITION:
            self.say(
                f"WARNING: the teacher recognises {recognition:.1f} % of the labels that the samples were asked for; "
                "they carry its statistics, not its classes."
            )
        return recognition

    def _quantize(self, settings: Settings, surrogate: Surrogate) -> Student:
        quantizer = settings.quantizer
        learnable = isinstance(quantizer, QAT) and quantizer.scales == "learnable"
        student = quantize_ptq(
            surrogate.network,
            lambda: surrogate.source.sample(quantizer.num_samples),
            quantizer,
            self.run,
            learnable=learnable,
        )
        if isinstance(quantizer, QAT):
            self.say(f"distilling {quantizer.steps} steps at learning rate {quantizer.learning_rate:g}")
            distill(student, self.teacher.network, surrogate.source, quantizer, self.run)
        return student

    def _images(self, surrogate: Surrogate) -> Iterator[Tensor]:
        for batch in surrogate.source.sample(VERIFY_IMAGES):
            yield batch.images.cpu()
        if self.data is not None:
            for batch in self.data.batches():
                yield batch.images

    def _export(self, student: Student, surrogate: Surrogate) -> Verification:
        converted = convert(student)
        spec = self.teacher.spec
        write_onnx(converted, spec, self.folder / "model.onnx")
        write_pt2(converted, spec, self.folder / "model.pt2")
        student.cpu()
        return verify_onnx(
            self.folder / "model.onnx",
            student,
            self._images(surrogate),
            output_step(converted),
            threads=torch.get_num_threads(),
        )

    def _evaluate(self, student: Student) -> dict[str, Any] | None:
        if self.data is None:
            return None
        teacher = self.teacher.network
        device = self.run.device
        latest: list[tuple[Tensor, Tensor]] = []

        def ask_teacher(images: Tensor) -> Tensor:
            if not latest or latest[0][0] is not images:  # asked twice of each batch, as network and as teacher
                latest[:] = [(images, teacher(images.to(device)).cpu())]
            return latest[0][1]

        def show(done: int, total: int) -> None:
            self.run.progress.update("evaluate", done, total, {})

        file = OnnxClassifier(self.folder / "model.onnx", threads=torch.get_num_threads())
        networks = {"float": ask_teacher, "quantized": file, "simulated": student}
        return evaluate_many(networks, self.data, teacher=ask_teacher, progress=show)

    def _record(
        self,
        settings: Settings,
        surrogate: Surrogate,
        recognition: float,
        verification: Verification,
        accuracy: dict[str, Any] | None,
    ) -> dict[str, Any]:
        quantizer = settings.quantizer
        found = accuracy or {}
        figures = {f"{name}_top1": found[name].top1 if found else None for name in ("float", "quantized", "simulated")}
        agreement = found["quantized"].teacher_agreement if found else None
        return {
            "model": self.teacher.name,
            "weights": self.teacher.weights_source,
            "weights_sha256": self.teacher.weights_sha256,
            "method": settings.method.name,
            "data_free": surrogate.source.data_free,
            "quantizer": quantizer.name,
            "bits": quantizer.bits,
            "activation_scope": quantizer.activation_scope,
            "range_rule": quantizer.range_rule,
            "seed": self.run.seed,
            "data": self.data.name if self.data else None,
            **figures,
            "teacher_agreement": agreement,
            "runtime_agreement": verification.agreement_literal,
            "verification": _as_dict(verification),
            "label_recognition": recognition,
            "num_eval_images": self.data.num_images if self.data else 0,
            "num_calibration_images": quantizer.num_samples,
            "evaluation": {name: value.as_dict() for name, value in found.items()},
            "artifacts": {
                name: {"bytes": (self.folder / name).stat().st_size, "sha256": canonical_sha256(self.folder / name)}
                for name in HASHED
                if (self.folder / name).exists()
            },
            "settings": to_tables(settings),
            "versions": versions(),
        }


def _as_dict(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _has_schedule(settings: Settings) -> bool:
    """Whether no step is left for a budget to choose."""
    free = []
    if getattr(settings.method, "steps", 0):
        free.append("method.steps")
    if settings.distill_steps:
        free.append("quantizer.steps")
    return all(name in settings.chosen for name in free)


def _plan_note(planned: Plan, seconds: float) -> dict[str, Any]:
    return {
        "budget_seconds": seconds,
        "fit_step_seconds": round(planned.fit_step_seconds, 4),
        "distill_step_seconds": round(planned.distill_step_seconds, 4),
    }


def _describe_plan(planned: Plan) -> str:
    parts = []
    if planned.fit_step_seconds:
        parts.append(f"{planned.settings.method.steps} generator steps of {planned.fit_step_seconds:.3f} s")
    if planned.distill_step_seconds:
        parts.append(f"{planned.settings.distill_steps} distillation steps of {planned.distill_step_seconds:.3f} s")
    steps = " and ".join(parts) or "nothing to train"
    return f"schedule: {steps}, {planned.fixed_seconds:.0f} s for the rest; {planned.expected_seconds:.0f} s expected"


def versions() -> dict[str, str]:
    """Return the versions on which a result depends, and the processor's kind."""
    names = ("zsq", "torch", "onnx", "onnxruntime")
    return {name: metadata.version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

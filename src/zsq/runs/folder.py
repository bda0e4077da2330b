"""A run's folder and what was decided before it starts: device, settings, schedule."""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from zsq.errors import InputError
from zsq.methods import Method
from zsq.models.teacher import Teacher
from zsq.quantization import PTQ
from zsq.runs.budget import Plan, parse_duration, plan
from zsq.runs.settings import Settings, read_toml, resolve, to_tables
from zsq.runtime import distributed
from zsq.runtime.files import load_tensors
from zsq.training.loop import Run
from zsq.types import ImageSpec

logger = logging.getLogger(__name__)

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

WRITTEN = (*ARTIFACTS, "images.npz", "bits.toml", "frontier.csv", "frontier.png")
"""Those, and what a synthesis or an allocation writes."""

CHECKPOINTS = ("fit.safetensors", "distill.safetensors")

LOCK = ".lock"
"""File by which a process keeps a folder to itself."""

DEFAULT_BUDGET = "10m"


def versions() -> dict[str, str]:
    """Return the versions on which a result depends, and the processor's kind."""
    names = ("zsq", "onnx", "onnxruntime")
    return {name: metadata.version(name) for name in names} | {
        "torch": torch.__version__,  # names the build, which the package's metadata may not
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


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
    sha256: str
    """Of the file, so that a resumed run can tell whether it is the one that it was started with."""

    @classmethod
    def open(cls, folder: Path, teacher: Teacher) -> "FittedRun":
        """Read the generator of a run.

        Raises:
            InputError: the folder holds no generator, a damaged one, or one of another teacher.
        """
        path = folder / "generator.safetensors"
        if not path.is_file():
            raise InputError(f"{folder} holds no generator.safetensors; --from takes a folder whose run fitted one.")
        state, meta = load_tensors(path)
        if meta.get("weights_sha256") != teacher.weights_sha256:
            raise InputError(
                f"{path} was fitted to other weights (sha256 {meta.get('weights_sha256', 'unknown')[:12]}) "
                f"than those of '{teacher.name}' ({teacher.weights_sha256[:12]})."
            )
        was = stored_spec(folder)
        if _shape(was) != _shape(teacher.spec):
            raise InputError(
                f"{path} was fitted to images of {_shape(was)}; '{teacher.name}' takes {_shape(teacher.spec)}."
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(folder, resolve(recipe=folder / "settings.toml").method, state, sha256)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder to this process: two runs that wrote to one would mix their files.

    Raises:
        InputError: another process has it.
    """
    if not distributed.is_main() or any(path.is_file() for path in (folder, *folder.parents)):
        yield  # the first process has it for all; what is no folder is refused by who opens it
        return
    lock, made = FileLock(folder / LOCK), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is writing to {folder}; wait for it, or give another --out.") from None
    except (OSError, NotImplementedError):  # a file system without locks, or a folder that may not be written
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and not any(folder.iterdir()):
            folder.rmdir()


def open_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Take a folder for a run, or refuse to mix two; return whether a run is continued. Nothing is deleted yet.

    Raises:
        InputError: the folder holds another run and neither flag is given, or it cannot be made.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite discards it; give one of them.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out takes a folder.")
    holds_run = any((folder / name).exists() for name in (*WRITTEN, "checkpoints"))
    if holds_run and not resume and not overwrite:
        raise InputError(f"{folder} holds another run; --resume continues it, --overwrite discards it.")
    if holds_run and resume and not (folder / "settings.toml").exists():
        raise InputError(f"{folder} holds a run without settings.toml, which --resume needs; --overwrite discards it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}; --out takes a folder.") from error
    return resume and holds_run


def chosen_seed(seed: int | None, recipe: str | Path | None, folder: Path, *, resume: bool) -> int:
    """Return the seed that is asked for, else that of the run that is resumed or was written as the recipe, else 0."""
    if seed is not None:
        return seed
    stored = folder / "settings.toml"
    path = stored if resume and stored.is_file() else recipe
    found = None if path is None else read_toml(Path(path)).get("run", {}).get("seed")
    return found if isinstance(found, int) else 0


def check_recipe(recipe: str | Path | None, teacher: Teacher, *, reuses: bool) -> None:
    """Say where a run's settings.toml, taken as a recipe, cannot repeat that run."""
    content = {} if recipe is None else read_toml(Path(recipe))
    was = content.get("teacher", {})
    if was.get("weights_sha256", teacher.weights_sha256) != teacher.weights_sha256:
        logger.warning(f"{recipe} is of a run of '{was.get('model')}' with other weights; its settings are taken.")
    elif "generator_sha256" in content.get("run", {}) and not reuses:
        logger.warning(f"the run of {recipe} took its generator from another run; --from DIR repeats that.")


def clear_folder(folder: Path, *, everything: bool) -> None:
    """Delete what killed runs left half-written, and with `everything` what a run wrote; other files stay."""
    places = [folder / name for name in WRITTEN] + [folder / "checkpoints" / name for name in CHECKPOINTS]
    for path in places:
        for rest in path.parent.glob(f".{path.name}.*"):
            rest.unlink(missing_ok=True)
        if everything:
            path.unlink(missing_ok=True)


def resolve_settings(
    method: str | Method | None,
    quantizer: str | PTQ | None,
    bits: str | int | None,
    *,
    recipe: str | Path | None = None,
    assignments: tuple[str, ...] = (),
    source_run: FittedRun | None = None,
) -> Settings:
    """Merge names, objects, recipe and assignments; a reused generator brings its method's settings along.

    Raises:
        InputError: a name or value is wrong, or would change the generator that is reused.
    """
    tables: dict[str, dict[str, Any]] = {}
    names: list[str | None] = []
    for section, given in (("method", method), ("quantizer", quantizer)):
        if given is None or isinstance(given, str):
            names.append(given)
            continue
        names.append(given.name)
        tables[section] = asdict(given)  # type: ignore[arg-type]
    merged = resolve(
        method=names[0] or (source_run.method.name if source_run else None),
        quantizer=names[1],
        bits=bits,
        recipe=None if recipe is None else Path(recipe),
        given=tables,
        assignments=assignments,
    )
    if source_run is None:
        return merged
    asked = tables.get("method", {})
    clash = [f"method.{key}" for key, value in asked.items() if value != getattr(source_run.method, key, None)]
    clash += [text.partition("=")[0] for text in assignments if text.startswith("method.")]
    if names[0] not in (None, source_run.method.name) or clash:
        raise InputError(
            f"--from reuses a generator fitted by method {source_run.method.name} with the settings of "
            f"{source_run.folder / 'settings.toml'}; {(clash or ['--method'])[0]} cannot change it any more."
        )
    return Settings(source_run.method, merged.quantizer, merged.chosen | {"method.steps"})


def choose_schedule(
    wanted: Settings,
    teacher: Teacher,
    run: Run,
    budget: str | float | None,
    *,
    recipe: str | Path | None,
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


def stored_settings(
    folder: Path,
    wanted: Settings,
    teacher: Teacher,
    seed: int,
    source_run: FittedRun | None = None,
    device: str = "cpu",
) -> Settings:
    """Return the settings of the run that is resumed.

    Raises:
        InputError: what is asked for now differs from what that run was started with.
    """
    path = folder / "settings.toml"
    content = read_toml(path)
    stored = resolve(recipe=path)
    tables, asked = to_tables(stored), to_tables(wanted)
    differing = []
    chosen = sorted(wanted.chosen, key=lambda name: (not name.endswith(".name"), name))
    for section, key in (name.split(".", 1) for name in chosen):
        if tables[section].get(key) != asked[section].get(key):
            differing.append(f"{section}.{key} is {tables[section].get(key)} there, not {asked[section].get(key)}")
    was = content.get("teacher", {})
    if was.get("weights_sha256") != teacher.weights_sha256:
        differing.append(f"its network '{was.get('model')}' had other weights")
    elif _shape(spec := stored_spec(folder)) != _shape(teacher.spec):
        differing.append(f"its images were {_shape(spec)}, not {_shape(teacher.spec)}")
    facts = content.get("run", {})
    if facts.get("seed") != seed:
        differing.append(f"its seed is {facts.get('seed')}, not {seed}")
    if facts.get("generator_sha256") != (source_run.sha256 if source_run else None):
        began = "with --from another folder" if source_run else "with --from; give it again"
        differing.append(f"it was started {began if 'generator_sha256' in facts else 'without --from'}")
    if differing:
        raise InputError(f"{folder} holds a run that differs: {differing[0]}. --overwrite starts anew.")
    machine = {"device": device, "processes": distributed.processes(), "threads": torch.get_num_threads()}
    for name, now in (machine | versions()).items():
        if name in facts and facts[name] != now:
            logger.warning(f"the run was started with {name} {facts[name]}, now {now}; its files may differ in bits.")
    return stored


def teacher_table(teacher: Teacher) -> dict[str, Any]:
    """Return what `settings.toml` says of the teacher."""
    spec = teacher.spec
    return {
        "model": teacher.name,
        "weights": teacher.weights_source,
        "weights_sha256": teacher.weights_sha256,
        "channels": spec.channels,
        "height": spec.height,
        "width": spec.width,
        "classes": spec.classes,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "resize": spec.resize,
    }


def stored_spec(folder: Path) -> ImageSpec:
    """Return the image spec of a run's teacher.

    Raises:
        InputError: the folder holds no settings.toml with a teacher.
    """
    path = folder / "settings.toml"
    content = read_toml(path)
    table = content.get("teacher")
    if not isinstance(table, dict):
        raise InputError(f"{path} names no teacher; it is not a run's.")
    if "run" not in content:
        raise InputError(f"{path} is cut short: its last table, [run], is missing.")
    sizes = {name: table.get(name, 0) for name in ("channels", "height", "width", "classes")}
    mean, std = tuple(table.get("mean", ())), tuple(table.get("std", ()))
    return ImageSpec(**sizes, mean=mean, std=std, resize=table.get("resize"))


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a run's `result.json`.

    Raises:
        InputError: the folder holds no finished run.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no result.json; the run has not finished: --resume continues it.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from error


def _shape(spec: ImageSpec) -> str:
    """Say all of an image spec that a generator depends on; `resize` serves files only."""
    values = f"mean {list(spec.mean)}, std {list(spec.std)}"
    return f"{spec.channels}x{spec.height}x{spec.width} in {spec.classes} classes, {values}"


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

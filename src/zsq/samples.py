"""Write synthetic images for use in other tools."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zsq import parallel
from zsq.errors import InputError
from zsq.methods import Surrogate
from zsq.methods.pool import PoolSource
from zsq.report import save_grid
from zsq.runs import FittedRun, Say, choose_schedule, pick_device, resolve_settings
from zsq.settings import Settings
from zsq.teachers import Teacher
from zsq.training import Progress, Run, clear_memory_errors, replacing
from zsq.types import Batch, ImageSpec


@clear_memory_errors()
def synthesize(
    teacher: Teacher,
    *,
    out: str | Path,
    count: int = 1000,
    method: str | None = None,
    recipe: str | Path | None = None,
    settings: tuple[str, ...] = (),
    budget: str | float | None = None,
    from_run: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> list[Path]:
    """Write `images.npz` (images uint8 [N, H, W, C], labels int64 [N]) and `samples.png`, one row a class.

    The arguments are those of `zsq.quantize`; images stream into the file, so any number fits in memory. A method that
    holds fewer than `count` gives all that it has. Several processes share the training, as there.

    Raises:
        InputError: an argument does not fit, or the folder holds images already.
    """
    folder = Path(out)
    written = [folder / "images.npz", folder / "samples.png"]
    if count < 1:
        raise InputError(f"count is {count}; at least 1 image is made.")
    where = parallel.start(pick_device(device).type)

    def check() -> None:
        if any(path.is_file() for path in (folder, *folder.parents)):
            raise InputError(f"{folder} is a file or lies below one; --out takes a folder.")
        if not overwrite and any(path.exists() for path in written):
            raise InputError(f"{folder} holds images already; --overwrite replaces them.")

    parallel.on_main(check)
    if not parallel.is_main():
        progress, say = None, lambda text: None
    run = Run(seed=seed, device=where, progress=progress, say=say)
    teacher = teacher.to(run.device) if run.device.type != "cpu" else teacher
    chosen, surrogate = fit_surrogate(
        teacher, run, method=method, recipe=recipe, settings=settings, budget=budget, from_run=from_run, say=say
    )
    if surrogate.statistics is not None:
        raise InputError("this method makes no images: it takes ranges and means from batch norm.")
    source = surrogate.source
    held = len(source.labels) if isinstance(source, PoolSource) else count
    if held < count:
        say(f"WARNING: method {chosen.method.name} holds {held} images; these are written instead of {count}.")

    def write() -> list[Path]:
        write_npz(written[0], source.sample(count), teacher.spec, min(count, held))
        save_grid(source, teacher.spec, written[1])
        return written

    return parallel.on_main(write)


def fit_surrogate(
    teacher: Teacher,
    run: Run,
    *,
    method: str | None,
    recipe: str | Path | None,
    settings: tuple[str, ...],
    budget: str | float | None,
    from_run: str | Path | None,
    say: Say,
) -> tuple[Settings, Surrogate]:
    """Fit what stands in for the training data, or take it from a run, for other ends than a quantized network.

    Raises:
        InputError: an argument does not fit.
    """
    reused = None if from_run is None else FittedRun.open(Path(from_run), teacher)
    wanted = resolve_settings(method, "ptq", None, recipe=recipe, assignments=tuple(settings), source_run=reused)
    chosen, _ = choose_schedule(
        wanted, teacher, run, budget, recipe=recipe, num_eval_images=0, fitted=reused is not None, say=say
    )
    return chosen, chosen.method.fit(teacher, run, fitted=reused.state if reused else None)


def write_npz(path: Path, batches: Iterable[Batch], spec: ImageSpec, count: int) -> None:
    """Stream normalised batches of `count` images in all into an .npz as `zsq evaluate` reads it."""
    labels = []
    shape = (count, spec.height, spec.width, spec.channels)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches:
                member.write(spec.to_pixels(batch.images.cpu()).numpy().tobytes())
                labels.append(batch.labels.cpu().numpy())
        found = np.concatenate(labels)
        assert len(found) == count, (len(found), count)
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, found)

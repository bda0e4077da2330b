"""Write synthetic images for use in other tools."""

import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsq.errors import InputError
from zsq.methods import Method
from zsq.methods.pool import PoolSource
from zsq.models.teacher import Teacher
from zsq.runs.quantize import Wanted, started
from zsq.runtime import distributed
from zsq.runtime.files import replacing
from zsq.runtime.memory import clear_memory_errors
from zsq.runtime.observer import Observer
from zsq.types import Batch, ImageSpec

logger = logging.getLogger(__name__)


@clear_memory_errors()
def synthesize(
    teacher: Teacher,
    *,
    out: str | Path,
    count: int = 1000,
    method: str | Method | None = None,
    recipe: str | Path | None = None,
    settings: tuple[str, ...] | Mapping[str, Any] = (),
    budget: str | float | None = None,
    from_run: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Write `images.npz` (images uint8 [N, H, W, C], labels int64 [N]) and `samples.png`, one row a class.

    The arguments are those of `zsq.quantize`; images stream into the file, so any number fits in memory. A method that
    holds fewer than `count` gives all that it has. Several processes share the training, as there. The folder holds
    the generator as well, for `from_run`, and checkpoints, for `resume`.

    Raises:
        InputError: an argument does not fit, or the folder holds a run or images already.
    """
    folder = Path(out)
    if count < 1:
        raise InputError(f"count is {count}; at least 1 image is made.")
    with started(
        teacher,
        out=out,
        wanted=Wanted(method, "ptq", None, recipe, settings, budget, from_run, needs_images=True),
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        observer=observer,
        quiet=quiet,
    ) as (job, chosen):
        source = job.fit(chosen).source
        held = len(source.labels) if isinstance(source, PoolSource) else count
        if held < count:
            logger.warning(f"method {chosen.method.name} holds {held} images; these are written instead of {count}.")

        def write() -> list[Path]:
            write_npz(folder / "images.npz", source.sample(count), teacher.spec, min(count, held))
            return [folder / "images.npz", folder / "samples.png"]

        return distributed.on_main(write)


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

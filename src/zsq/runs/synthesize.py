"""Write synthetic images for use in other tools."""

import logging
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from zsq.data.datasets import class_list, raw_key
from zsq.errors import InputError
from zsq.methods.pool import PoolSource
from zsq.runs.origin import completed
from zsq.runs.request import SynthesizeRequest, takes
from zsq.runs.samples import SAMPLES
from zsq.runs.stages import fit
from zsq.runs.start import started
from zsq.runtime import distributed
from zsq.runtime.files import replacing
from zsq.runtime.memory import clear_memory_errors
from zsq.types import Batch, ImageSpec

logger = logging.getLogger(__name__)


@clear_memory_errors()
def synthesize_request(request: SynthesizeRequest) -> list[Path]:
    """Write `images.npz` and `samples.png`, one row a class, to a folder.

    `images.npz` holds images, uint8 [N, H, W, C], or inputs, float32 [N, C, ...], of signals and volumes; labels, int64
    [N]; mean and std, float32 [C], on the scale of pixels in [0, 1]; and class_names, text [classes], where known.

    Images stream into the file, so any number fits in memory. A method that holds fewer than `count` gives all that it
    has. Several processes share the training, as in `quantize`. The folder holds the generator as well, for `from_run`,
    and checkpoints, for `resume`.

    Raises:
        InputError: an argument does not fit, or the folder holds a run or images already.
    """
    request = completed(request)
    if request.count < 1:
        raise InputError(f"count is {request.count}; at least 1 image is made.")
    with started(request, quantizer="ptq", class_names=request.class_names, needs_images=True) as job:
        source = fit(job).source
        held = len(source.labels) if isinstance(source, PoolSource) else request.count
        if held < request.count:
            logger.warning(
                f"method {job.settings.method.name} holds {held} images; these are written instead of {request.count}."
            )

        def write() -> list[Path]:
            images = job.folder / "images.npz"
            names = class_list(request.class_names, job.teacher.spec.classes) if request.class_names else ()
            spec = job.teacher.spec
            write_npz(images, source.sample(request.count, spec.images_at_once), spec, min(request.count, held), names)
            return [images, job.folder / SAMPLES]

        return distributed.on_main(write)


synthesize = takes(SynthesizeRequest)(synthesize_request)


def write_npz(
    path: Path, batches: Iterable[Batch], spec: ImageSpec, count: int, class_names: Sequence[str] = ()
) -> None:
    """Stream normalised batches of `count` images in all into an .npz as `zsq evaluate` reads it.

    Mean, standard deviation and the names of the classes, if there are any, lie beside the images, for other tools.
    """
    labels = []
    shape = (count, spec.height, spec.width, spec.channels) if spec.is_image else (count, *spec.shape)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{raw_key(spec)}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1" if spec.is_image else "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches:
                member.write(spec.to_raw(batch.images.cpu()).numpy().tobytes())
                labels.append(batch.labels.cpu().numpy())
        found = np.concatenate(labels)
        assert len(found) == count, (len(found), count)
        statistics = {"mean": spec.mean, "std": spec.std}
        others = {"labels": found} | {name: np.array(values, np.float32) for name, values in statistics.items()}
        if class_names:
            others["class_names"] = np.array(class_names)
        for name, values in others.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values)

"""Write a finished run's network as the file of another runtime, where its integers allow that."""

import tempfile
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, Suppress

from zsq.data.datasets import EvenSubset, open_dataset
from zsq.errors import ExportError, InputError
from zsq.export.converted import output_step, packed
from zsq.export.files import require_runtime, write_file
from zsq.export.openvino import IR, write_ir
from zsq.export.pt2 import read_pt2
from zsq.export.verify import Verification, require, verify_file
from zsq.methods import Noise
from zsq.methods.noise_and_real import NoiseSource
from zsq.models.options import option, text
from zsq.quantization import PTQ
from zsq.runs.console import shown
from zsq.runs.job import file_options
from zsq.runs.record import Record, verified
from zsq.runs.request import takes
from zsq.runs.stages import CHECK_IMAGES, ENOUGH_DECIDED, PROGRAM, file_notes
from zsq.runtime.observer import Observer
from zsq.targets import target_of
from zsq.training.loop import Run
from zsq.types import ImageSpec


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What `export_run` is asked."""

    run: Annotated[Positional[str | Path], text("RUN", Path)]
    """Folder of a finished run."""
    _: KW_ONLY
    out: Annotated[str | Path | None, text("FILE", Path), option("FILE")] = None
    """The file to write. Unset, one in the run's folder that is named for the target."""
    target: Annotated[str, text("NAME"), option("NAME")] = "onnxruntime"
    """Runtime that the file is for: onnxruntime, openvino, litert, executorch or tensorrt."""
    pixels: Annotated[Literal["nchw", "nhwc"] | None, option("nchw|nhwc")] = None
    """Let the file take uint8 pixels in this layout instead of normalized floats."""
    batch: Annotated[int | None, option("N")] = None
    """Images that the file takes at once; unset, any number."""
    packed: bool = False
    """Store weights of 4 bits or fewer two to a byte, where the target's file can hold them so: litert."""
    data: Annotated[str | None, text("SET"), option("SET")] = None
    """Images on which the file is checked as well as on noise: digits, FILE.npz or a folder."""
    overwrite: bool = False
    """Replace the file if it is there."""
    observer: Suppress[Observer | None] = None
    """Is told how far the work is; None shows it on stderr."""
    quiet: bool = False
    """Show no progress, notices or warnings."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written from a finished run."""

    path: Path
    """The file."""
    target: str
    """Runtime that it is for."""
    bytes: int
    """Its size."""
    verification: Verification
    """The file against the run's own network."""


def export_run_request(request: ExportRequest) -> Exported:
    """Write the network of a finished run as another target's file, run it there, and compare.

    Nothing is quantized anew: the integers are those of the run. Where a target could not hold or compute them, the
    error says so, and no file is left.

    Raises:
        InputError: an argument does not fit, or the folder holds no finished run.
        ExportError: the run's integers do not suit the target.
        MissingExtraError: the target's package is not installed.
    """
    folder, target = Path(request.run), target_of(request.target)
    record = Record.read(folder)
    form = PTQ(
        bits=str(record.settings.get("quantizer", {}).get("bits", record.bits)),
        target=target.name,
        pixels=request.pixels,
        batch="dynamic" if request.batch is None else request.batch,
        packed=request.packed,
    )
    out = folder / target.exported_file if request.out is None else Path(request.out)
    endings = [target.suffix, *([IR] if target.name == "openvino" else [])]
    if out.suffix not in endings:
        raise InputError(f"--out is {out.name}, and files for {target.title} end in {' or '.join(endings)}.")
    if out.resolve() == (folder / record.file).resolve():
        raise InputError(f"--out is {out}, the run's own file, which its record describes; give another.")
    if out.exists() and not request.overwrite:
        raise InputError(f"{out} exists; --overwrite replaces it, --out names another.")
    require_runtime(target)
    network, spec = read_pt2(verified(folder / PROGRAM))
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as place,
        shown(request.observer, quiet=request.quiet) as observer,
    ):
        part = Path(place) / target.file
        try:
            notes = file_notes(record.bits, target, record.weights_sha256)
            lowered = write_file(network, spec, part, target, file_options(form), notes)
            run = Run(seed=record.seed, observer=observer)
            batches = run.each("check", _images(request.data, spec, run), CHECK_IMAGES, len)
            found = verify_file(
                part,
                packed(network),
                batches,
                output_step(network, spec.outputs),
                outputs=spec.outputs,
                threads=torch.get_num_threads(),
                enough=ENOUGH_DECIDED,
                target=target,
            )
            require(found)
            if out.suffix == IR:
                write_ir(part, out)
            else:
                part.replace(out)
        except ExportError as error:
            source = target_of(record.target).title
            raise ExportError(
                f"{folder} was quantized for {source}, and its integers do not suit {target.title}: {error} "
                f"Quantize again, with --target {target.name}."
            ) from error
    return Exported(out, target.name, out.stat().st_size, replace(found, lowered_percent=lowered))


def _images(data: str | None, spec: ImageSpec, run: Run) -> Iterator[Tensor]:
    """Yield normalised batches: of the data where there are any, then of natural noise."""
    at_once = spec.images_at_once
    real = EvenSubset(open_dataset(data, spec), CHECK_IMAGES // 2).batches(at_once) if data else iter(())
    noise = NoiseSource(Noise(distribution="natural"), spec, run)
    for batch in chain(real, noise.sample(CHECK_IMAGES, at_once)):
        yield batch.images


export_run = takes(ExportRequest)(export_run_request)

"""The verb that checks a machine."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from zsq.cli.output import print_rows
from zsq.models.teacher import known_models, load_teacher
from zsq.runs.quantize import quantize
from zsq.runtime.versions import versions


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, devices, and a small quantization from end to end.

    Examples:
      zsq doctor
    """

    def run(self, console: Console) -> None:
        """Print what was found; an expected fault if something does not work."""
        print_rows(console, report())


def report() -> Iterator[tuple[str, str]]:
    """Yield what is installed, and the outcome of a small quantization from end to end.

    Raises:
        ZsqError: the quantization fails; the text says how.
    """
    yield from versions().items()
    yield "threads", str(torch.get_num_threads())
    cuda = torch.cuda.is_available()
    yield "cuda", torch.cuda.get_device_name() if cuda else "none; zsq runs on the CPU"
    for group in known_models():
        yield group.form, group.reason if group.installed else f"not usable here: {group.reason}"
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(
            load_teacher("digits"),
            out=Path(folder) / "run",
            method="noise",
            data="digits",
            settings=("quantizer.num_samples=200",),
            quiet=True,
        )
    float_top1, top1 = result.record.float_top1, result.record.quantized_top1
    yield "self-test", f"passed: digits float {float_top1:.2f} %, INT8 from noise {top1:.2f} % in ONNX Runtime"

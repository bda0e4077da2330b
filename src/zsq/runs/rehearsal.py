"""The way to the file, taken before anything is learnt: what cannot be exported is told first."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from zsq.errors import ExportError, ZsqError
from zsq.export.converted import output_step
from zsq.export.files import float_operators, write_file
from zsq.export.verify import require, verify_file
from zsq.graph.trace import FOREIGN_FAULTS, described
from zsq.models.teacher import Teacher
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import Coverage, coverage
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.quantizers import answered_shaken
from zsq.runs.job import file_options
from zsq.targets import target_of
from zsq.training.loop import Run
from zsq.types import Batch

REHEARSED = 8
"""Images of noise that calibrate the untrained student, and that its file answers."""

logger = logging.getLogger(__name__)


def rehearse(teacher: Teacher, quantizer: PTQ, run: Run) -> Coverage:
    """Quantize the network on noise, write its file, and check it against the simulation, with a batch of one as well.

    Args:
        teacher: the float network, on the run's device.
        quantizer: what the run quantizes with; its ranges are chosen in the quickest way.
        run: gives seed and device; nothing is written to its folder.

    Returns:
        What of the network is quantized, and what stays float.

    Raises:
        ExportError: the network has no file, or one that computes something else.
        InputError: nothing of it can be quantized, or the runtime cannot load the file.
    """
    try:
        return _rehearse(teacher, quantizer, run)
    except ZsqError:
        raise
    except FOREIGN_FAULTS as error:
        logger.debug("the rehearsal failed", exc_info=True)
        raise ExportError(f"network '{teacher.name}' cannot be quantized and exported: {described(error)}.") from error


def _rehearse(teacher: Teacher, quantizer: PTQ, run: Run) -> Coverage:
    quick = replace(
        quantizer,
        num_samples=REHEARSED,
        range_rule="minmax",
        range_sigmas=0.0,
        weight_range_rule="minmax",
        channel_scaling=False,
        weight_rounding="nearest",
        bias_correction=False,
    )
    spec, target = teacher.spec, target_of(quantizer.target)
    generator = torch.Generator().manual_seed(run.seed)
    noise = torch.randn(REHEARSED, *spec.shape, generator=generator)
    labels = torch.zeros(REHEARSED, dtype=torch.int64)
    probe = Run(seed=run.seed, device=run.device)
    student = quantize_ptq(teacher.network, lambda: iter([Batch(noise, labels)]), quick, probe)
    converted = convert(student)
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        path = Path(folder) / target.file
        write_file(converted, spec, path, target, file_options(quantizer))
        found = verify_file(
            path,
            lambda images: student(images.to(run.device)),
            (noise[:1], noise[1:]),
            output_step(converted, spec.outputs),
            outputs=spec.outputs,
            threads=torch.get_num_threads(),
            target=target,
            shaken=lambda images: answered_shaken(student, images.to(run.device)),
        )
    if found.num_decided or found.by_distance:  # else noise tells nothing, and the trained student's samples will
        require(found)
    return coverage(converted, spec, float_operators(target))

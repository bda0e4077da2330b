"""The float network as ONNX, and ONNX Runtime's own static quantization of it."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from zsq.export.onnx import OPSET
from zsq.models.teacher import Teacher


def write_float(teacher: Teacher, path: Path) -> None:
    """Write the teacher with input ``images`` and output ``logits``, the batch left open."""
    spec = teacher.spec
    images = torch.zeros(2, spec.channels, spec.height, spec.width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            teacher.network,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(program.model_proto, str(path))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands calibration batches, float [n, C, H, W] each, to ONNX Runtime, once."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self.feeds = iter([{"images": batch} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next feed, or None at the end."""
        return next(self.feeds, None)


def quantize_by_onnxruntime(source: Path, batches: Iterable[np.ndarray], path: Path, *, unsigned: bool = False) -> None:
    """Quantize a float file as ONNX Runtime's documentation says: pre-process, then QDQ, one scale a channel.

    All other settings are that tool's defaults: min-max calibration, int8 activations unless `unsigned`.
    """
    prepared = path.with_suffix(".prepared")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        )
    prepared.unlink()

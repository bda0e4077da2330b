"""The float network as ONNX, and ONNX Runtime's own static quantization of it."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from zsq.export.litert.flatbuffer import IDENTIFIER, aligned_builder, schema
from zsq.export.litert.runtime import require_litert
from zsq.export.onnx import OPSET
from zsq.models.teacher import Teacher


def write_float(teacher: Teacher, path: Path) -> None:
    """Write the teacher by torch.onnx alone, as a user would: input ``images``, output ``logits``, any batch."""
    images = torch.zeros(2, *teacher.spec.shape)
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


def float_litert(quantized: Path, path: Path) -> Callable[[Tensor], Any]:
    """Write the float form of a LiteRT file, the same operators on float tensors, and return what runs it on a thread.

    Args:
        quantized: the file for LiteRT.
        path: where its float form goes.

    Returns:
        Takes normalised images [1, C, H, W].
    """
    s = schema()
    model = s.ModelT.InitFromPackedBuf(quantized.read_bytes())
    (graph,) = model.subgraphs
    for tensor in graph.tensors:
        scale = None if tensor.quantization is None else tensor.quantization.scale
        if scale is None or len(scale) == 0:
            continue
        data = model.buffers[tensor.buffer].data
        if tensor.buffer and data is not None and len(data):
            kind = np.int8 if tensor.type == s.TensorType.INT8 else np.int32
            shape = [1] * len(tensor.shape)
            shape[tensor.quantization.quantizedDimension] = len(scale)
            values = np.frombuffer(bytes(data), kind).reshape(tensor.shape) * np.reshape(scale, shape)
            model.buffers[tensor.buffer].data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)
        tensor.type, tensor.quantization = s.TensorType.FLOAT32, None
    builder = aligned_builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    path.write_bytes(bytes(builder.Output()))
    interpreter = require_litert().Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Tensor) -> Any:
        interpreter.set_tensor(given["index"], images.permute(0, 2, 3, 1).contiguous().numpy())
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return run

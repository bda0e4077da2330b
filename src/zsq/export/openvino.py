"""Run an ONNX file in OpenVINO on the processor."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.errors import InputError, MissingExtraError
from zsq.export.image_spec import spec_of
from zsq.export.pixels import fed, layout_of
from zsq.types import ImageSpec

INSTALL = "pip install 'zsq[openvino]'"


def require_openvino() -> Any:
    """Return the module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            f"target openvino runs its file in OpenVINO, which is not installed: {INSTALL}"
        ) from error
    return openvino


class OpenVinoClassifier:
    """An ONNX file in OpenVINO on the processor, called like a network.

    Args:
        path: the ``.onnx`` file.
        threads: threads of inference; None leaves the choice to the runtime.
    Raises:
        MissingExtraError: OpenVINO is not installed.
        InputError: the file does not exist, or OpenVINO cannot read or compile it.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = require_openvino()
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; write one with write_onnx.")
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}") from error
        self._pixels, self._path = layout_of(path), path

    @property
    def spec(self) -> ImageSpec:
        """What the file takes and gives, as zsq has noted in it.

        Raises:
            InputError: it holds no such note.
        """
        return spec_of(self._path)

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Return the logits, float [N, classes], of normalised images, float [N, C, H, W]."""
        images = torch.as_tensor(images).detach().to("cpu", torch.float32).contiguous()
        array = images.numpy() if self._pixels is None else fed(images, *self._pixels)
        return torch.from_numpy(np.array(self._compiled([array])[0]))

"""The float network as an ONNX file."""

from pathlib import Path

import pytest
import torch

from zsq.export.float_onnx import write_float_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.models.teacher import load_teacher


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "shapes_detector"])
def test_the_file_computes_what_the_network_does(tmp_path: Path, model: str) -> None:
    teacher = load_teacher(model)
    write_float_onnx(teacher.network, teacher.spec, tmp_path / "float.onnx")
    images = torch.randn(3, *teacher.spec.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = teacher.network(images)
    file = OnnxClassifier(tmp_path / "float.onnx", threads=1, profiled=True)
    torch.testing.assert_close(file(images), wanted, rtol=1e-4, atol=1e-4)
    kernels = {found.computes for found in file.profile().kernels if "Conv" in found.name}
    assert kernels == {"float"}

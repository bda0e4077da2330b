from pathlib import Path

import pytest
import torch
from converted import SPEC, converted_network
from torch import Tensor

from zsq.export.onnx import write_onnx
from zsq.export.pt2 import write_pt2


@pytest.fixture(scope="session")
def images() -> Tensor:
    return 1.5 * torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 8-bit network as 8.onnx and 8.pt2."""
    folder = tmp_path_factory.mktemp("export")
    write_onnx(converted_network(), SPEC, folder / "8.onnx")
    write_pt2(converted_network(), SPEC, folder / "8.pt2")
    return folder


@pytest.fixture(scope="session")
def narrow(files: Path) -> Path:
    """The folder with the 6- and 4-bit networks as 6.onnx and 4.onnx beside them."""
    for bits in (6, 4):
        write_onnx(converted_network(bits), SPEC, files / f"{bits}.onnx")
    return files

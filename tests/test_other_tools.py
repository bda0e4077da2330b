"""The examples of docs/guides/other-tools.md, each with the tool it is for."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zsq

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "other-tools.md").read_text()
COUNT = 200

pytestmark = pytest.mark.slow


def example(heading: str) -> str:
    (code,) = re.findall(
        rf"^## {re.escape(heading)}\n(?:(?!^## ).)*?^```py\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE
    )
    return code


def run(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        exec(example(heading), names)
    return names


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    out = folder / "runs" / "images"
    zsq.synthesize("digits", out=out, count=COUNT, settings={"method.steps": 300}, quiet=True)
    return folder


@pytest.fixture
def names(images: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(images)
    network: nn.Module = zsq.load_teacher("digits").network
    return run("PyTorch", {"network": network})


def agreement(names: dict[str, Any], quantized: Any) -> float:
    """Return how often a quantized network names the float network's class, of the images themselves."""
    with torch.no_grad():
        same = [
            int(names["network"](image).argmax()) == int(np.asarray(quantized(image)).argmax())
            for image, _ in names["loader"]
        ]
    return float(np.mean(same))


def test_the_data_set_gives_what_the_network_takes(names: dict[str, Any]) -> None:
    data, spec = names["loader"].dataset, zsq.load_teacher("digits").spec
    image, label = data[3]
    assert (len(data), image.dtype, tuple(image.shape)) == (COUNT, torch.float32, spec.shape)
    assert label == data.labels[3]
    back = spec.denormalize(image[None])[0, 0] * 255
    assert torch.allclose(back, torch.from_numpy(data.images[3, ..., 0]).float(), atol=1e-3)


def test_onnxruntime_calibrates_with_them(names: dict[str, Any]) -> None:
    import onnxruntime

    run("ONNX Runtime", names)
    session = onnxruntime.InferenceSession("int8.onnx")
    assert Path("int8.onnx").stat().st_size < Path("float.onnx").stat().st_size + sum(
        path.stat().st_size for path in Path().glob("float.onnx.data")
    )
    assert agreement(names, lambda image: session.run(None, {"input": image.numpy()})[0]) >= 0.9


def test_nncf_calibrates_with_them(names: dict[str, Any]) -> None:
    pytest.importorskip("nncf", reason="NNCF is not installed")
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    run("ONNX Runtime", names)
    run("NNCF (OpenVINO)", names)
    compiled = openvino.compile_model("int8.xml", "CPU")
    assert agreement(names, lambda image: compiled(image.numpy())[0]) >= 0.9


def test_torchao_calibrates_with_them(names: dict[str, Any]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    names["image"] = next(iter(names["loader"]))[0]
    run("torchao", names)
    assert agreement(names, names["quantized"]) >= 0.9


def test_ai_edge_quantizer_calibrates_with_them(names: dict[str, Any]) -> None:
    pytest.importorskip("ai_edge_quantizer", reason="AI Edge Quantizer is not installed")
    pytest.importorskip("litert_torch", reason="LiteRT Torch, which makes float .tflite files, is not installed")
    names["image"] = next(iter(names["loader"]))[0]
    run("AI Edge Quantizer (LiteRT)", names)
    assert Path("int8.tflite").stat().st_size < Path("float.tflite").stat().st_size
    runner = pytest.importorskip("ai_edge_litert.interpreter").Interpreter("int8.tflite").get_signature_runner()
    scale, zero_point = runner.get_input_details()["args_0"]["quantization"]

    def quantized(image: torch.Tensor) -> np.ndarray:
        integers = np.clip(np.round(image.numpy() / scale) + zero_point, -128, 127).astype(np.int8)
        return runner(args_0=integers)["output_0"]

    assert agreement(names, quantized) >= 0.9

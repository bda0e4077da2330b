"""A first convolution on images with channels of zeros computes what it computed without."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from zsq.export.converted import output_step
from zsq.export.first_conv import pad_channels
from zsq.export.onnx import write_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.verify import verify_file
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec


def quantized(size=(3, 3), pads=(1, 1, 1, 1), channels=3, sides=(8, 10), *, zero=0, reader=False, **conv):
    """A file of one convolution between quantizations, as `write_onnx` writes them, with random integers."""
    random = np.random.default_rng(0)
    group = conv.get("group", 1)
    constants = {
        "weight": random.integers(-127, 128, (4 * group, channels // group, *size)).astype(np.int8),
        "weight.scale": random.uniform(0.005, 0.01, 4 * group).astype(np.float32),
        "weight.zero": np.full(4 * group, zero, np.int8),
        "scale": np.float32(0.03),
        "zero": np.uint8(90),
        "out.scale": np.float32(0.05),
        "out.zero": np.uint8(128),
    }
    given = (
        {"strides": [2, 2], "kernel_shape": list(size)} | ({} if "auto_pad" in conv else {"pads": list(pads)}) | conv
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "weight.scale", "weight.zero"], ["filter"], axis=0),
        helper.make_node("Conv", ["values", "filter"], ["sums"], **given),
        helper.make_node("QuantizeLinear", ["sums", "out.scale", "out.zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "out.scale", "out.zero"], ["logits"]),
        helper.make_node("Relu", ["values"], ["again"]) if reader else None,
    ]
    shape = ["batch", channels, *sides]
    graph = helper.make_graph(
        [node for node in nodes if node],
        "test",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None, None, None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model: onnx.ModelProto, images: np.ndarray, optimized: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    ("channels", "size", "given"),
    [
        (1, (3, 3), {}),
        (2, (5, 3), {}),
        (3, (3, 3), {"strides": [1, 1]}),
        (3, (3, 3), {"pads": (0, 0, 1, 1), "sides": (9, 11)}),  # as TensorFlow pads
        (3, (3, 3), {"dilations": [2, 2]}),
        (3, (7, 7), {"pads": (3, 3, 3, 3)}),
        (5, (2, 3), {"auto_pad": "SAME_UPPER"}),
    ],
    ids=str,
)
def test_the_same_integers_come_out(channels, size, given, optimized):
    model = quantized(size, channels=channels, **given)
    _, _, *sides = (dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
    images = np.random.default_rng(1).uniform(-4, 4, (3, channels, *sides)).astype(np.float32)
    before = run(model, images, optimized)
    pad_channels(model)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.node[0].op_type == "Pad"
    after = run(model, images, optimized)
    assert len(np.unique(before)) > 50
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "unfit",
    [
        {"channels": 4},
        {"channels": 12},
        {"group": 3},
        {"size": (9, 9), "pads": (4, 4, 4, 4)},
        {"size": (4, 4), "strides": [4, 4]},
        {"zero": 3},
        {"reader": True},
    ],
    ids=str,
)
def test_other_convolutions_are_left(unfit):
    model = quantized(**unfit)
    before = model.SerializeToString(deterministic=True)
    pad_channels(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_file_with_such_a_stem_computes_what_one_without_it_does(bits, tmp_path: Path, monkeypatch):
    torch.manual_seed(0)
    spec = ImageSpec(channels=3, height=16, width=16, classes=5, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    teacher = teacher_from_module(network.eval(), spec)
    images = torch.randn(400, 3, 16, 16)
    batches = [Batch(images, torch.zeros(400, dtype=torch.int64))]
    student = quantize_ptq(teacher.network, lambda: iter(batches), PTQ(bits=bits), Run())
    converted = convert(student)
    write_onnx(converted, spec, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert model.graph.node[0].op_type == "Pad"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "0.weight")
    assert list(weight.dims) == [8, 4, 3, 3]
    found = verify_file(tmp_path / "model.onnx", student, iter(images.split(100)), output_step(converted), threads=1)
    assert found.decided_agreement >= 99
    padded = OnnxClassifier(tmp_path / "model.onnx", threads=1)(images)
    monkeypatch.setattr("zsq.export.onnx.pad_channels", lambda model: None)
    write_onnx(converted, spec, tmp_path / "plain.onnx")
    assert onnx.load(tmp_path / "plain.onnx").graph.node[0].op_type == "QuantizeLinear"
    assert torch.equal(padded, OnnxClassifier(tmp_path / "plain.onnx", threads=1)(images))

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from converted import ATEN, DEQUANTIZE, QD, SPEC, converted_network, simulate
from torch import Tensor, fx, nn
from toys import fused_operators, quantized
from toys import images as images_of

from zsq.errors import ExportError
from zsq.export.canonical_onnx import own_zero_points
from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.verify import require, verify_file
from zsq.graph.trace import trace
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.types import ImageSpec

every_width = pytest.mark.parametrize("bits", [8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (6, 4))])


@pytest.fixture
def onnx_file(bits: int, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("files" if bits == 8 else "narrow")
    return folder / f"{bits}.onnx"


@every_width
def test_onnx_runtime_computes_what_was_simulated(bits: int, onnx_file: Path, images: Tensor) -> None:
    network = converted_network(bits)
    verification = verify_file(onnx_file, simulate(network), images.split(64), output_step(network), threads=1)
    require(verification)
    assert verification.num_images == 200
    assert 100 < verification.num_decided <= 200
    assert verification.agreement_literal >= 99
    assert verification.max_logit_difference_steps < 20


@every_width
def test_every_convolution_and_the_residual_add_fuse(bits: int, onnx_file: Path) -> None:
    kinds = Counter(fused_operators(onnx_file))
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QGemm"]) == (3, 1, 1)
    assert kinds["Conv"] == kinds["Relu"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("position", [0.0, 0.3, 1.0], ids=["lowest", "inner", "highest"])
def test_the_integer_grid_survives(bits: int, position: float, tmp_path: Path) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = 0.125, round(low + position * (high - low))  # a power of two: ties are ties in both
    steps = torch.cat([torch.arange(-700, 700) / 2, torch.tensor([-1e6, 1e6, 0.499, -0.501])])  # ties, far outside
    graph = fx.Graph()
    grid = (scale, zero_point, low, high, torch.int8)
    flat = graph.call_function(ATEN.flatten.using_ints, (graph.placeholder("images"), 1))
    integers = graph.call_function(QD.quantize_per_tensor.default, (flat, *grid))
    graph.output((graph.call_function(DEQUANTIZE, (integers, *grid)),))
    network = fx.GraphModule(nn.Module(), graph)
    spec = ImageSpec(channels=1, height=1, width=1, classes=1, mean=(0.0,), std=(1.0,))
    write_onnx(network, spec, tmp_path / "grid.onnx")
    values = (steps * scale).view(-1, 1, 1, 1)
    expected = QD.quantize_per_tensor.default(values.flatten(1), *grid).int()
    assert {expected.min().item(), expected.max().item()} == {low, high}
    for optimize in (False, True):
        logits = OnnxClassifier(tmp_path / "grid.onnx", optimize=optimize)(values)
        assert torch.equal((logits / scale).round().int() + zero_point, expected)


def test_weights_stay_int8_and_biases_int32(files: Path) -> None:
    network = converted_network()
    model = onnx.load(files / "8.onnx")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, value in network.state_dict().items():
        if name.endswith(("weight", "bias")):
            assert tensors[name].dtype == (np.int8 if name.endswith("weight") else np.int32)
            expected = value.numpy()
            if name == "first_weight":  # reads images with a fourth channel, of zeros
                expected = np.pad(expected, [(0, 0), (0, 1), (0, 0), (0, 0)])
            assert np.array_equal(tensors[name], expected)
            assert np.array_equal(tensors[f"{name}.scale"], network.state_dict()[f"{name}_scales"].numpy())
    axes = {n.input[0]: n.attribute[0].i for n in model.graph.node if n.op_type == "DequantizeLinear" and n.attribute}
    assert axes["first_weight"] == axes["head_bias"] == 0
    assert all(value.dtype != np.float32 or value.size <= 8 for value in tensors.values())


@pytest.mark.slow
def test_per_tensor_weights(tmp_path: Path, images: Tensor) -> None:
    network = converted_network(per_channel=False)
    write_onnx(network, SPEC, tmp_path / "tensor.onnx")
    found = verify_file(tmp_path / "tensor.onnx", simulate(network), [images], output_step(network), threads=1)
    require(found)
    assert found.decided_agreement == 100


def test_batch_is_dynamic_and_named(files: Path, images: Tensor) -> None:
    model = onnx.load(files / "8.onnx")
    for value, name, sizes in ((model.graph.input[0], "images", [3, 8, 8]), (model.graph.output[0], "logits", [5])):
        dims = value.type.tensor_type.shape.dim
        assert (value.name, dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == (name, "batch", sizes)
    run = OnnxClassifier(files / "8.onnx", threads=1)
    assert torch.equal(torch.cat([run(image[None]) for image in images[:3]]), run(images[:3]))


@pytest.mark.slow
def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(ATEN.erfinv.default, (graph.placeholder("images"),)),))
    with pytest.raises(ExportError, match=r"no ONNX form: .*erf_inv.* The \.pt2 file needs none"):
        write_onnx(fx.GraphModule(nn.Module(), graph), SPEC, tmp_path / "odd.onnx")
    assert not (tmp_path / "odd.onnx").exists()


def test_a_file_declares_the_oldest_versions_that_its_nodes_allow(files: Path) -> None:
    model = onnx.load(files / "8.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 14)]  # of its Reshape
    assert model.ir_version == 7
    older = onnx.ModelProto()
    older.CopyFrom(model)
    older.opset_import[0].version = 5
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(older, full_check=True)


def test_every_stored_tensor_has_a_zero_point_of_its_own(files: Path) -> None:
    model = onnx.load(files / "8.onnx")
    stored = {tensor.name for tensor in model.graph.initializer}
    zeros = [n.input[2] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert len(zeros) == len(set(zeros)) == 8
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # rewrites weights and their zero points
    onnxruntime.InferenceSession(str(files / "8.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_integers_that_the_exporter_rounded_itself_keep_their_zero_point() -> None:
    zero = onnx.numpy_helper.from_array(np.array(3, np.int8), "zero")
    nodes = [
        onnx.helper.make_node("Constant", [], ["zero"], value=zero),
        onnx.helper.make_node("DequantizeLinear", ["values", "scale", "zero"], ["logits"]),
    ]
    stored = [
        onnx.numpy_helper.from_array(np.zeros((1, 5), np.int8), "values"),
        onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializer=stored))
    own_zero_points(model)
    assert model.graph.node[1].input[2] == "zero"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_needs_no_new_operator_set(approximate: str, tmp_path: Path) -> None:
    layers = [nn.Flatten(), nn.Linear(192, 8), nn.GELU(approximate), nn.Linear(8, 5)]
    torch.manual_seed(0)
    student = quantized(trace(nn.Sequential(*layers).eval().requires_grad_(False), SPEC, "toy"), PTQ())
    converted = convert(student)
    write_onnx(converted, SPEC, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version < 19
    x = images_of(100)
    found = verify_file(tmp_path / "model.onnx", student, [x], output_step(converted), threads=1)
    require(found)
    assert found.max_logit_difference_steps < 1.01

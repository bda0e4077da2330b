"""LiteRT files: every operator of theirs on integers, saturation of narrow grids, pixels, batches, packed weights."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import SPEC, Branchy, Mobile, Plain, graph, images, quantized, settle, stream_of

from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.export.converted import output_step
from zsq.export.files import float_operators, open_file
from zsq.export.litert.flatbuffer import read_notes, schema
from zsq.export.litert.runtime import LiteRtClassifier
from zsq.export.litert.write import write_litert
from zsq.export.options import FileOptions
from zsq.export.verify import require, verify_file
from zsq.graph.trace import trace
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import coverage
from zsq.quantization.ptq import quantize_ptq
from zsq.targets import TARGETS
from zsq.training.loop import Run
from zsq.types import ImageSpec

pytest.importorskip("ai_edge_litert", reason="target litert runs its file in it")

TARGET = TARGETS["litert"]


class Body(nn.Module):
    """A convolution, what a test puts behind it, and a head that pools."""

    def __init__(self, middle, width=8):
        super().__init__()
        self.stem, self.norm, self.middle = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), middle
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.middle(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x.flatten(1))


class Does(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def split(x):
    one, two = x.chunk(2, dim=1)
    return torch.cat([two, one * 2 - 1], dim=1)


MIDDLES = {
    "strided convolution": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "dilated convolution": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "same padding": lambda: nn.Conv2d(8, 8, 5, padding="same"),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "max-pool": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average pool": lambda: nn.AvgPool2d(3, 2, 1),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(2),
    "relu6": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU6()),
    "hard tanh": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardtanh(-0.5, 0.7)),
    "hard swish": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardswish()),
    "hard sigmoid": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardsigmoid()),
    "flatten": lambda: Does(lambda x: F.max_pool2d(x, 4).flatten(1)),
    "shuffled channels": lambda: Does(shuffled),
    "parts": lambda: Does(split),
    "slice and pad": lambda: Does(lambda x: F.pad(x[:, :, ::2, 1:7], (1, 0, 2, 1), value=0.3)),
    "product": lambda: Does(lambda x: x * x.mean((2, 3), keepdim=True) - x),
    "silu": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()),
    "sigmoid": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()),
    "softmax": lambda: Does(lambda x: x.flatten(2).softmax(-1).mean(2)),
    "tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), Does(lambda x: x.permute(0, 2, 1).mean(1))),
    "transposed convolution": lambda: nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
    "signal": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 5, stride=2, padding=2), Does(lambda x: x.mean(2))),
}

WIDTH = {"depthwise": 16, "adaptive pool": 8, "flatten": 32}


def written(network, path, bits="8", options=None, **settings):
    """Return student and converted network of a file that is written to `path`."""
    student = quantized(network, PTQ(bits=bits, target="litert", **settings))
    converted = convert(student)
    write_litert(converted, SPEC, path, options or FileOptions())
    return student, converted


def operators(path):
    """The operators of a file, in order."""
    s = schema()
    model = s.Model.GetRootAs(path.read_bytes())
    names = {number: name for name, number in vars(s.BuiltinOperator).items() if isinstance(number, int)}
    graph = model.Subgraphs(0)
    codes = [model.OperatorCodes(graph.Operators(i).OpcodeIndex()) for i in range(graph.OperatorsLength())]
    return [names[code.BuiltinCode()] for code in codes]


@pytest.mark.parametrize("bits", ["8", "5"])
@pytest.mark.parametrize("name", MIDDLES)
def test_every_operator_computes_what_was_simulated(name, bits, tmp_path):
    network = graph_of(Body(MIDDLES[name](), WIDTH.get(name, 8)))
    path = tmp_path / "model.tflite"
    student, converted = written(network, path, bits)
    x = images(64, seed=5)
    found = verify_file(path, student, [x], output_step(converted), threads=1, target=TARGET)
    assert found.distance_literal_steps < 0.5
    assert found.agreement_literal > 95
    floats = {"silu": {"LOGISTIC"}, "sigmoid": {"LOGISTIC"}, "softmax": {"SOFTMAX"}}.get(name, set())
    assert {code for code in operators(path) if code in ("LOGISTIC", "SOFTMAX", "DEQUANTIZE")} - {
        "DEQUANTIZE"
    } == floats
    assert ("DEQUANTIZE" in operators(path)) == bool(floats)


def graph_of(module):
    """Return the graph of a module with settled batch norms."""
    torch.manual_seed(0)
    return trace(settle(module), SPEC, "toy")


def test_a_narrow_grid_saturates_without_an_operator_where_relu_or_the_type_does_it(tmp_path):
    written(graph(Plain), tmp_path / "model.tflite", "4")
    assert operators(tmp_path / "model.tflite") == ["CONV_2D", "PAD", "CONV_2D", "MEAN", "FULLY_CONNECTED"]


def test_the_ends_of_a_narrow_grid_hold_for_values_far_outside(tmp_path):
    """Images a hundred times as large as those of calibration drive every activation to an end of its grid."""
    path = tmp_path / "model.tflite"
    student, converted = written(graph(Branchy), path, "3")
    x = images(64, seed=9) * 100
    with torch.no_grad():
        far = (open_file(path)(x) - student(x)).abs() / output_step(converted)
    assert far.square().mean().sqrt() < 0.5


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pixels_are_normalised_in_the_file(layout, tmp_path):
    path = tmp_path / "model.tflite"
    student, converted = written(graph(Branchy), path, options=FileOptions(pixels=layout))
    file = LiteRtClassifier(path)
    x = images(64, seed=5).clamp(-2, 2)
    found = verify_file(path, student, [x], output_step(converted), target=TARGET)
    require(found)
    assert found.distance_literal_steps < 1
    assert file._input["dtype"] is np.uint8
    assert list(file._input["shape"]) == ([1, 8, 8, 3] if layout == "nhwc" else [1, 3, 8, 8])


def test_a_fixed_batch_takes_any_number_of_images(tmp_path):
    path = tmp_path / "model.tflite"
    student, converted = written(graph(Branchy), path, options=FileOptions(batch=4))
    x = images(10, seed=5)
    file = LiteRtClassifier(path)
    assert list(file._input["shape"]) == [4, 8, 8, 3]
    assert (file(x) - student(x)).abs().max() <= 1.01 * output_step(converted)


def test_weights_of_four_bits_are_packed_two_to_a_byte(tmp_path):
    whole, half = tmp_path / "whole.tflite", tmp_path / "half.tflite"
    network = graph_of(Body(nn.Conv2d(8, 64, 3), 64))
    student, converted = written(network, whole, "W4A8")
    write_litert(converted, SPEC, half, FileOptions(packed=True))
    weights = sum(v.numel() for v in converted.buffers() if v.dtype == torch.int8)
    assert abs(whole.stat().st_size - half.stat().st_size - weights / 2) < 64
    found = verify_file(half, student, [images(64, seed=5)], output_step(converted), target=TARGET)
    require(found)
    assert found.distance_literal_steps < 1


def test_clipping_by_channel_stays_in_integers(tmp_path):
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            self.register_buffer("most", torch.linspace(0.1, 0.6, 6).view(1, 6, 1, 1))

        def forward(self, x):
            return self.head(torch.clamp(torch.relu(self.conv(x)), None, self.most).mean((2, 3)))

    path = tmp_path / "model.tflite"
    student, converted = written(graph_of(Clipped()), path)
    found = verify_file(path, student, [images(64, seed=5)], output_step(converted), target=TARGET)
    assert found.distance_literal_steps < 0.5
    assert "MINIMUM" in operators(path)


def test_the_file_says_what_it_takes_and_is_the_same_bytes(tmp_path):
    converted = convert(quantized(graph(Mobile), PTQ(target="litert")))
    for name in ("one", "two"):
        write_litert(converted, SPEC, tmp_path / f"{name}.tflite", notes={"bits": "8"})
    assert (tmp_path / "one.tflite").read_bytes() == (tmp_path / "two.tflite").read_bytes()
    assert read_notes(tmp_path / "one.tflite")["bits"] == "8"
    assert open_file(tmp_path / "one.tflite").spec == SPEC


def test_stored_tensors_are_aligned(tmp_path):
    written(graph(Branchy), tmp_path / "model.tflite")
    data = (tmp_path / "model.tflite").read_bytes()
    model = schema().Model.GetRootAs(data)
    whole = np.frombuffer(data, np.uint8)
    for index in range(model.BuffersLength()):
        buffer = model.Buffers(index)
        if buffer.DataLength():
            assert (buffer.DataAsNumpy().ctypes.data - whole.ctypes.data) % 16 == 0


def test_what_the_file_cannot_hold_is_named(tmp_path):
    path = tmp_path / "model.tflite"
    with pytest.raises(ExportError, match=r"no LiteRT form: 'erf' computes erf.default"):
        written(graph_of(Body(Does(lambda x: torch.erf(x) + x))), path)
    student = quantized(graph(Branchy), PTQ())
    converted = convert(student)
    name, weight = next((n, v) for n, v in converted.named_buffers() if v.dtype == torch.int8)
    weight.view(-1)[0] = -128
    with pytest.raises(ExportError, match=r"reaches -128.*quantize with target litert"):
        write_litert(converted, SPEC, path)
    assert name
    assert not path.exists()


def test_volumes_are_refused(tmp_path):
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(torch.relu(self.conv(x.unsqueeze(2))).mean((2, 3, 4)))

    with pytest.raises(ExportError, match="no LiteRT form"):
        written(graph_of(Volume()), tmp_path / "model.tflite")


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        LiteRtClassifier(tmp_path / "none.tflite")
    (tmp_path / "other.tflite").write_bytes(b"something else")
    with pytest.raises(InputError, match="it is no LiteRT file"):
        LiteRtClassifier(tmp_path / "other.tflite")
    with pytest.raises(InputError, match=r"known: \.onnx, \.pte, \.tflite"):
        open_file(tmp_path / "model.bin")


def test_litert_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zsq\[litert\]'"):
        LiteRtClassifier(tmp_path / "model.tflite")
    with pytest.raises(MissingExtraError, match=r"pip install 'zsq\[litert\]'"):
        schema()


def test_packing_goes_with_targets_that_pack():
    with pytest.raises(InputError, match=r"packed is true, and files for ONNX Runtime hold one weight a byte; litert"):
        PTQ(packed=True)


def test_an_image_of_one_channel(tmp_path):
    spec = ImageSpec(channels=1, height=8, width=8, classes=5, mean=(0.2,), std=(0.3,))

    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 6, 3, stride=2), nn.Linear(54, 5)

        def forward(self, x):
            return self.head(torch.relu(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    network = trace(settle(Grey()), spec, "toy")
    pixels = images(32, spec=spec)
    student = quantize_ptq(network, stream_of(pixels), PTQ(target="litert"), Run())
    path = tmp_path / "model.tflite"
    write_litert(convert(student), spec, path)
    with torch.no_grad():
        assert (open_file(path)(pixels) - student(pixels)).abs().max() <= 1.01 * output_step(convert(student))


def test_what_litert_computes_in_float_is_not_counted_as_integer(tmp_path):
    network = graph_of(Body(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())))
    _, converted = written(network, tmp_path / "model.tflite")
    assert coverage(converted, SPEC).float_operations == {}
    floats = coverage(converted, SPEC, float_operators(TARGET)).float_operations
    assert [name.partition(" ")[0] for name in floats] == ["sigmoid"]

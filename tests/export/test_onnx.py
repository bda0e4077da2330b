import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from toys import fused_operators

from zsq.errors import ExportError, InputError
from zsq.export.onnx import (
    OnnxClassifier,
    Verification,
    canonical_sha256,
    output_step,
    require,
    verify_onnx,
    write_onnx,
    write_pt2,
)
from zsq.export.verify import exceeds
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.0,) * 3, std=(1.0,) * 3)
QD = torch.ops.quantized_decomposed
ATEN = torch.ops.aten
CONV, DEQUANTIZE = ATEN.conv2d.default, QD.dequantize_per_tensor.default


class Builder:
    """Writes a converted network node by node, as quantize.convert makes them, calibrated on the way by an example."""

    def __init__(self, bits: int, per_channel: bool, images: Tensor) -> None:
        self.graph, self.root, self.values = fx.Graph(), nn.Module(), {}
        self.bits, self.per_channel = bits, per_channel
        self.images = self.graph.placeholder("images")
        self.values[self.images] = images

    def call(self, target: Callable[..., Tensor], *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)
        self.values[node] = target(*fx.node.map_arg(args, self.values.get))
        return node

    def stored(self, name: str, value: Tensor) -> fx.Node:
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        self.values[node] = value
        return node

    def quantize(self, node: fx.Node, bits: int | None = None) -> fx.Node:
        bits = bits or self.bits
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        smallest, largest = min(self.values[node].min().item(), 0.0), max(self.values[node].max().item(), 0.0)
        scale = (largest - smallest) / (high - low)
        grid = (scale, max(low, min(high, round(low - smallest / scale))), low, high, torch.int8)
        return self.call(DEQUANTIZE, self.call(QD.quantize_per_tensor.default, node, *grid), *grid)

    def constant(self, name: str, value: Tensor, scales: Tensor, limits: tuple[int, int, torch.dtype]) -> fx.Node:
        shape = [-1] + [1] * (value.dim() - 1)
        integers = self.stored(name, (value / scales.view(shape)).round().to(limits[2]))
        if not self.per_channel:
            return self.call(DEQUANTIZE, integers, scales.item(), 0, *limits)
        zeros = self.stored(f"{name}_zero_points", torch.zeros(len(scales), dtype=torch.int64))
        return self.call(
            QD.dequantize_per_channel.default, integers, self.stored(f"{name}_scales", scales), zeros, 0, *limits
        )

    def layer(self, name: str, target: Callable[..., Tensor], node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        high = 2 ** (self.bits - 1) - 1
        weight, bias = torch.randn(shape) / np.prod(shape[1:]) ** 0.5, torch.randn(shape[0])
        scales = (weight.flatten(1).abs().amax(1) if self.per_channel else weight.abs().max().reshape(1)) / high
        weights = self.constant(f"{name}_weight", weight, scales, (-high - 1, high, torch.int8))
        biases = self.constant(f"{name}_bias", bias, scales * node.args[1], (-(2**31), 2**31 - 1, torch.int32))
        return self.call(target, node, weights, biases, *([[1, 1], [1, 1]] if len(shape) == 4 else []))


def converted_network(bits: int = 8, per_channel: bool = True) -> fx.GraphModule:
    """Convolutions, a residual add, relu6, pooling and a linear layer: each kind of fusion once."""
    torch.manual_seed(0)
    build = Builder(bits, per_channel, torch.randn(64, 3, 8, 8))
    x = build.quantize(build.images, 8)
    a = build.quantize(build.call(ATEN.relu.default, build.layer("first", CONV, x, (8, 3, 3, 3))))
    b = build.quantize(build.layer("second", CONV, a, (8, 8, 3, 3)))
    c = build.quantize(build.call(ATEN.relu.default, build.call(ATEN.add.Tensor, a, b)))
    d = build.quantize(build.call(ATEN.hardtanh.default, build.layer("third", CONV, c, (8, 8, 3, 3)), 0.0, 6.0))
    e = build.call(ATEN.flatten.using_ints, build.call(ATEN.adaptive_avg_pool2d.default, d, [1, 1]), 1)
    logits = build.quantize(build.layer("head", ATEN.linear.default, build.quantize(e), (5, 8)), 8)
    build.graph.output((logits,))
    return fx.GraphModule(build.root, build.graph)


def simulate(network: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    return lambda images: network(images)[0]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 1.5 * torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 8-bit network as 8.onnx and 8.pt2 and the 6- and 4-bit networks as 6.onnx and 4.onnx."""
    folder = tmp_path_factory.mktemp("export")
    for bits in (8, 6, 4):
        write_onnx(converted_network(bits), SPEC, folder / f"{bits}.onnx")
    write_pt2(converted_network(), SPEC, folder / "8.pt2")
    return folder


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_onnx_runtime_computes_what_was_simulated(bits: int, files: Path, images: Tensor) -> None:
    network = converted_network(bits)
    verification = verify_onnx(
        files / f"{bits}.onnx", simulate(network), images.split(64), output_step(network), threads=1
    )
    require(verification)
    assert verification.num_images == 200
    assert 100 < verification.num_decided <= 200
    assert verification.agreement_literal >= 99
    assert verification.max_logit_difference_steps < 20


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_every_convolution_and_the_residual_add_fuse(bits: int, files: Path) -> None:
    kinds = Counter(fused_operators(files / f"{bits}.onnx"))
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QGemm"]) == (3, 1, 1)
    assert kinds["Conv"] == kinds["Relu"] == 0


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


def test_per_tensor_weights(tmp_path: Path, images: Tensor) -> None:
    network = converted_network(per_channel=False)
    write_onnx(network, SPEC, tmp_path / "tensor.onnx")
    found = verify_onnx(tmp_path / "tensor.onnx", simulate(network), [images], output_step(network), threads=1)
    require(found)
    assert found.decided_agreement == 100


def test_batch_is_dynamic_and_named(files: Path, images: Tensor) -> None:
    model = onnx.load(files / "8.onnx")
    for value, name, sizes in ((model.graph.input[0], "images", [3, 8, 8]), (model.graph.output[0], "logits", [5])):
        dims = value.type.tensor_type.shape.dim
        assert (value.name, dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == (name, "batch", sizes)
    run = OnnxClassifier(files / "8.onnx", threads=1)
    assert torch.equal(torch.cat([run(image[None]) for image in images[:3]]), run(images[:3]))


@pytest.mark.parametrize(("write", "name"), [(write_onnx, "8.onnx"), (write_pt2, "8.pt2")])
def test_the_same_network_gives_the_same_bytes(
    write: Callable[..., None], name: str, files: Path, tmp_path: Path
) -> None:
    network = converted_network()
    code = network.code
    write(network, SPEC, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (files / name).read_bytes()
    assert network.code == code
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["8.onnx", "8.pt2"])
def test_files_hold_no_local_path(name: str, files: Path) -> None:
    content = (files / name).read_bytes()
    for trace in (str(Path(__file__).parents[2]), str(Path.home()), sys.prefix, "stack_trace", ".py"):
        assert trace.encode() not in content


def test_pt2_gives_the_same_logits_in_a_fresh_process(files: Path, images: Tensor, tmp_path: Path) -> None:
    expected = simulate(converted_network())(images)
    torch.save((images, expected), tmp_path / "expected.pt")
    program = (
        "import sys, torch, torch.ao.quantization.fx._decomposed\n"
        "images, expected = torch.load(sys.argv[2])\n"
        "(logits,) = torch.export.load(sys.argv[1]).module()(images)\n"
        "assert torch.equal(logits, expected)\n"
    )
    command = [sys.executable, "-c", program, str(files / "8.pt2"), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_tampered_file_is_refused(files: Path, images: Tensor, tmp_path: Path) -> None:
    network = converted_network()
    model = onnx.load(files / "8.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "second_weight.scale")
    scale.raw_data = (4 * onnx.numpy_helper.to_array(scale)).tobytes()
    onnx.save(model, tmp_path / "tampered.onnx")
    verification = verify_onnx(tmp_path / "tampered.onnx", simulate(network), [images], output_step(network), threads=1)
    with pytest.raises(ExportError, match=r"disagrees .* where 99 % is required"):
        require(verification)
    assert canonical_sha256(tmp_path / "tampered.onnx") != canonical_sha256(files / "8.onnx")


def test_verification_counts_and_figures(files: Path, images: Tensor) -> None:
    network, run = converted_network(), OnnxClassifier(files / "8.onnx", threads=1)
    step = output_step(network)
    shifted = verify_onnx(files / "8.onnx", lambda batch: run(batch) + 3 * step, [images], step, threads=1)
    assert shifted.decided_agreement == shifted.agreement_optimized == 100
    assert shifted.max_logit_difference_steps == pytest.approx(3, abs=2)
    rolled = verify_onnx(files / "8.onnx", lambda batch: run(batch).roll(1, dims=1), [images], step, threads=1)
    assert rolled.decided_agreement == 0
    margins = torch.arange(200)[:, None] * torch.tensor([1.0, 0, 0, 0, 0])  # 0, 1, 2, ... steps: decided from 3 up
    assert verify_onnx(files / "8.onnx", lambda _: step * margins, [images], step, threads=1).num_decided == 197
    wide = verify_onnx(files / "8.onnx", lambda _: step * margins, [images], step, threads=1, margin_steps=99.5)
    assert wide.num_decided == 100
    undecided = verify_onnx(files / "8.onnx", lambda batch: 0 * run(batch), [images], step, threads=1)
    assert (undecided.num_decided, undecided.decided_agreement) == (0, 0)
    with pytest.raises(ExportError, match="on none of 200 images"):
        require(undecided)
    with pytest.raises(InputError, match="at least one image"):
        verify_onnx(files / "8.onnx", run, [], step)


def test_require_accepts_the_minimum_itself() -> None:
    at_minimum = Verification(100, 100, 99.0, 90.0, 90.0, 3.0)
    require(at_minimum)
    with pytest.raises(ExportError, match=r"99.00 % of 100 decided images, where 99.5 %"):
        require(at_minimum, minimum=99.5)


def test_a_file_that_disagrees_with_itself_need_not_agree_more_with_the_simulation() -> None:
    found = Verification(1000, 1000, 98.4, 95.0, 95.0, 9.0, decided_self_agreement=98.0)
    shared = replace(found, only_from_simulation=6, only_from_itself=10)
    require(shared)
    require(replace(shared, decided_self_agreement=98.6, only_from_itself=4))  # two images more are chance
    with pytest.raises(ExportError, match=r"98.40 % of 1000 .* where 99 % is required; .* itself on 99.00"):
        require(replace(found, decided_self_agreement=99.0, only_from_simulation=6, only_from_itself=0))
    with pytest.raises(ExportError, match=r"94.90 % of 1000 decided images, where 99 % is required"):
        require(replace(shared, decided_agreement=94.9))  # chaos is no excuse
    with pytest.raises(ExportError, match=r"98.90 % of 1000 .* itself on 100.00"):
        require(replace(found, decided_agreement=98.9, decided_self_agreement=100.0))  # it has none
    with pytest.raises(ExportError, match=r"literally and optimised, .* on 94.00 % of 1000 decided images, where 95 %"):
        require(replace(found, decided_agreement=100.0, decided_self_agreement=94.0))  # users run it optimised


@pytest.mark.parametrize(
    ("count", "other", "expected"),
    [(4, 0, False), (5, 0, True), (6, 1, False), (7, 1, True), (3, 3, False), (5000, 5000, False), (5200, 5000, True)],
)
def test_exceeds_is_the_sign_test(count: int, other: int, expected: bool) -> None:
    assert exceeds(count, other) == expected  # 1/16, 1/32, 8/128, 9/256; 2 deviations of 50 from 5,100


def test_verification_counts_differences_that_are_not_shared(
    files: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 100 * torch.eye(5)[torch.zeros(200, dtype=torch.int64)]
    other = logits.roll(1, dims=1)
    literal, optimized = logits.clone(), logits.clone()
    literal[:7], optimized[:3] = other[:7], other[:3]  # 4 times alone, 3 times together
    literal[7:10] = other[7:10]
    optimized[10:15] = other[10:15]

    class Runner:
        def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
            self.logits = optimized if optimize else literal

        def __call__(self, batch: Tensor) -> Tensor:
            return self.logits

    monkeypatch.setattr("zsq.export.verify.OnnxClassifier", Runner)
    found = verify_onnx(files / "8.onnx", lambda batch: logits, [images], 1.0)
    assert (found.decided_agreement, found.decided_self_agreement) == (95.0, 94.0)
    assert (found.only_from_simulation, found.only_from_itself) == (3, 5)


def test_canonical_hash_sees_content_only(files: Path, tmp_path: Path) -> None:
    model = onnx.load(files / "8.onnx")
    model.producer_version, model.graph.node[0].doc_string = "elsewhere", "/somewhere"
    onnx.save(model, tmp_path / "noted.onnx")
    assert canonical_sha256(tmp_path / "noted.onnx") == canonical_sha256(files / "8.onnx")
    weights = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.tensor(1.0)}
    save_file(weights, tmp_path / "one.safetensors", metadata={"date": "today"})
    save_file(dict(reversed(weights.items())), tmp_path / "two.safetensors")
    save_file(weights | {"a": torch.tensor(2.0)}, tmp_path / "other.safetensors")
    one, two, other = (canonical_sha256(tmp_path / f"{name}.safetensors") for name in ("one", "two", "other"))
    assert one == two != other
    with pytest.raises(InputError, match=r"cannot hash '\.txt' files"):
        canonical_sha256(tmp_path / "notes.txt")


def test_faults_are_named(files: Path, tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(InputError, match="no such file"):
        OnnxClassifier(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        OnnxClassifier(tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"images are \[200, 3, 8\]"):
        OnnxClassifier(files / "8.onnx")(images[..., 0])
    graph = fx.Graph()
    graph.output((graph.call_function(ATEN.erfinv.default, (graph.placeholder("images"),)),))
    network = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(ExportError, match=r"no ONNX form: .*erf_inv.* The \.pt2 file needs none"):
        write_onnx(network, SPEC, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"ends in 'aten\.erfinv\.default'"):
        output_step(network)
    assert not (tmp_path / "odd.onnx").exists()

"""The contract of networks: whatever they are written with, the file computes what was simulated, and what is not
computed in integers is named."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from computed import COMPUTED
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, fused_operators, graph, images, quantized

from zsq.errors import ExportError
from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import require, verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import coverage


class Net(nn.Module):
    """A convolution with a batch norm, what `inside` does with its maps [N, 8, 6, 6], and a linear layer."""

    features = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(self.features, 5)
        self.build()

    def build(self) -> None:
        """Make the layers of `inside`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(torch.relu(self.norm(self.conv(x))))
        return self.head(x.flatten(2).mean(2) if x.dim() > 2 else x)

    def inside(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Transposed(Net):
    def build(self) -> None:
        self.up, self.up_norm = nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.last = nn.ConvTranspose2d(12, 8, 3, 2, 1, 1)

    def inside(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(torch.relu(self.up_norm(self.up(x)))))


class Transposed1d(Net):
    def build(self) -> None:
        self.up = nn.ConvTranspose1d(8, 8, 3, 2)

    def inside(self, x: Tensor) -> Tensor:
        return self.up(x.flatten(2))


class TimesMatrix(Net):
    def build(self) -> None:
        self.w, self.v = nn.Parameter(torch.randn(16, 8) / 3), nn.Parameter(torch.randn(1, 36, 20) / 6)

    def inside(self, x: Tensor) -> Tensor:
        x = torch.relu(self.w @ x.flatten(2)) @ self.v
        return x[:, :8]


class AddMM(Net):
    def build(self) -> None:
        self.w, self.b = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8))

    def inside(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.mean((2, 3)), self.w).relu() @ self.w


class Einsum(Net):
    def build(self) -> None:
        self.w, self.v = nn.Parameter(torch.randn(8, 16) / 3), nn.Parameter(torch.randn(16, 6, 4, 2) / 6)

    def inside(self, x: Tensor) -> Tensor:
        x = torch.einsum("nchw,cd->ndhw", x, self.w).relu()
        x = torch.einsum("dwab,ndhw->nabh", self.v, x)
        return torch.tensordot(x.relu(), self.w[:, :6], dims=([3], [1])).flatten(1, 2).transpose(1, 2)


class EinsumOfValues(Net):
    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        scores = torch.einsum("ncl,ncm->nlm", x, x).mul(0.2).softmax(-1)
        return torch.einsum("nlm,ncm->ncl", scores, x)


class GroupedEinsum(Net):
    def build(self) -> None:
        self.w = nn.Parameter(torch.randn(8, 6, 4) / 3)

    def inside(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cwd->nchd", x, self.w)


class Attention(Net):
    def build(self) -> None:
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return (x + self.attention(x, x, x, need_weights=False)[0]).transpose(1, 2)


class AttentionWithWeights(Attention):
    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return (x + self.attention(x, x, x)[0]).transpose(1, 2)


class CausalAttention(Net):
    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0].transpose(1, 2)


class LearntQuery(Net):
    def build(self) -> None:
        self.query, self.q = nn.Parameter(torch.randn(1, 2, 8)), nn.Linear(8, 8)

    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return ((self.q(self.query) @ x / 3).softmax(-1) @ x.transpose(1, 2)).transpose(1, 2)


class Gru(Net):
    def build(self) -> None:
        self.gru = nn.GRU(8, 8, batch_first=True)

    def inside(self, x: Tensor) -> Tensor:
        return self.gru(x.flatten(2).transpose(1, 2))[0][:, -1]


class Lstm(Net):
    def build(self) -> None:
        self.lstm = nn.LSTM(8, 4, batch_first=True, bidirectional=True)

    def inside(self, x: Tensor) -> Tensor:
        return self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)


class ParameterReadByLayers(Net):
    def build(self) -> None:
        self.gate = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.mix = nn.Conv2d(8, 8, 1)

    def inside(self, x: Tensor) -> Tensor:
        return x * self.mix(self.gate)


class Writes(Net):
    def build(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def inside(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y[:, 0] = 0
        y[:, 1:4] *= 0.5
        y[:, 4:6] = x[:, 2:4]
        y[:, 6:].clamp_(max=0.2)
        return torch.relu(y)


class Contexts(Net):
    def build(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def inside(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.mix(x)
        with torch.no_grad():
            return y.double().add(x).float()


class Squeezed(Net):
    def inside(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).squeeze()


class PaddedOffTheGrid(Net):
    def build(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3)

    def inside(self, x: Tensor) -> Tensor:
        return self.mix(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-5.0), 3, 2))


class PaddedBeforeLayer(PaddedOffTheGrid):
    def inside(self, x: Tensor) -> Tensor:
        return self.mix(F.pad(x, (1, 1, 1, 1), value=2.0))


class PaddedForPooling(Net):
    def inside(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)


class Volume(Net):
    def build(self) -> None:
        self.mix = nn.Conv3d(1, 4, 3, padding=(0, 1, 1))

    def inside(self, x: Tensor) -> Tensor:
        return self.mix(x.unsqueeze(1)).flatten(1, 2)[:, :8]


class DynamicFilter(Net):
    """Weights that depend on the image, one set of filters an image."""

    def build(self) -> None:
        self.make = nn.Linear(8, 8 * 9)

    def inside(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((2, 3))).view(-1, 1, 3, 3)
        return F.conv2d(x.reshape(1, -1, 6, 6), weight, groups=weight.shape[0]).view(-1, 8, 4, 4)


class LinearAttention(Net):
    """Values divided by sums that are small, which a grid would round to 0."""

    def inside(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        keys = F.pad(x, (0, 0, 0, 1), value=1.0) @ x.transpose(1, 2)
        y = keys @ (x * 1e-3)
        return y[:, :-1] / (y[:, -1:] + 1e-6)


class Rooted(Net):
    """Square roots of what is 0 at times, where their slope is infinite."""

    def inside(self, x: Tensor) -> Tensor:
        return (x.square().mean((2, 3), keepdim=True) * 1e-3 + 1e-6).sqrt() * x


class Extremes(Net):
    """The largest values of a map, adaptive max pooling of one to three dimensions, extremes of the channels, means."""

    features = 43

    def inside(self, x: Tensor) -> Tensor:
        values, _ = x.flatten(2).topk(2, dim=2)
        ends = x.max(1, keepdim=True)[0] + x.min(1, keepdim=True).values
        lines, volumes = F.adaptive_max_pool1d(values, 1), F.adaptive_max_pool3d(x[:, :, None], (1, 2, 1))
        pooled = [F.adaptive_max_pool2d(ends, (1, 3)), F.adaptive_max_pool2d(x, 1), lines, volumes]
        return torch.cat([part.flatten(1) for part in [*pooled, x.permute(0, 2, 3, 1).mean((1, 2))]], 1)


class MaxPooled(Net):
    def inside(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, 4)


class Embedded(Net):
    def build(self) -> None:
        self.position, self.norm2 = nn.Parameter(torch.randn(1, 36, 8)), nn.LayerNorm(8)

    def inside(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm2(x.flatten(2).transpose(1, 2) + self.position)).transpose(1, 2)


class Octave(Net):
    """Two resolutions, whose filters are parts of one weight."""

    def build(self) -> None:
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 6)

    def inside(self, x: Tensor) -> Tensor:
        high, low = x[:, :4], F.avg_pool2d(x[:, 4:], 2)
        one = F.conv2d(high, self.weight[:4, :4], padding=1)
        two = F.conv2d(low, self.weight[:4, 4:], padding=1)
        low = F.conv2d(low, self.weight[4:, 4:], padding=1)
        up = F.interpolate(two, scale_factor=2)
        return torch.cat([F.max_pool2d(one + up, 2), low], 1)


@dataclass(frozen=True)
class Expected:
    """What stays float of a network: tensors by name, and operators."""

    weights: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()


INTEGERS = Expected()

OLD = "old weight norm"
"""Warns of itself."""

NETWORKS: dict[Callable[[], nn.Module], Expected] = {
    Transposed: INTEGERS,
    Transposed1d: INTEGERS,
    TimesMatrix: INTEGERS,
    AddMM: INTEGERS,
    Einsum: INTEGERS,
    EinsumOfValues: Expected((), ("matmul", "mul", "softmax")),
    GroupedEinsum: Expected(("w",), ("einsum",)),
    Attention: Expected((), ("matmul", "matmul: matmul_default_1", "mul", "softmax")),
    AttentionWithWeights: Expected(
        (), ("bmm in attention", "bmm in attention: bmm_1", "mul in attention", "softmax in attention")
    ),
    CausalAttention: Expected((), ("scaled_dot_product_attention",)),
    LearntQuery: Expected((), ("matmul", "softmax")),
    Gru: Expected(tuple(f"gru.{name}" for name, _ in nn.GRU(1, 1).named_parameters()), ("gru in gru",)),
    Lstm: Expected(
        tuple(f"lstm.{name}" for name, _ in nn.LSTM(1, 1, bidirectional=True).named_parameters()), ("lstm in lstm",)
    ),
    ParameterReadByLayers: Expected(),
    Writes: INTEGERS,
    Contexts: INTEGERS,
    Squeezed: INTEGERS,
    PaddedOffTheGrid: INTEGERS,
    PaddedBeforeLayer: INTEGERS,
    PaddedForPooling: INTEGERS,
    Volume: INTEGERS,
    Embedded: Expected(("position", "norm2.weight", "norm2.bias"), ("add", "layer_norm in norm2")),
    Extremes: INTEGERS,
    LinearAttention: Expected((), ("add", "div", "matmul")),
    Rooted: Expected((), ("square", "mul", "add", "sqrt")),
    Octave: INTEGERS,
    **{COMPUTED[name]: INTEGERS for name in COMPUTED if name not in ("cosine", OLD)},
    COMPUTED["cosine"]: Expected((), ("linalg_vector_norm in head", "div in head")),
}


NAMES = [*(make.__name__ for make in NETWORKS if isinstance(make, type)), *(name for name in COMPUTED if name != OLD)]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "expected"), NETWORKS.items(), ids=NAMES)
def test_the_file_computes_what_was_simulated_and_what_stays_float_is_named(make, expected, tmp_path) -> None:
    student = quantized(graph(make), PTQ())
    converted, path = convert(student), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    x = images(200, seed=5)
    require(verify_file(path, student, [x[:1], x[1:]], output_step(converted), threads=1))
    found = coverage(converted, SPEC)
    assert sorted(found.float_weights) == sorted(expected.weights)
    assert sorted(found.float_operations) == sorted(expected.operators)
    if expected == INTEGERS:
        executed = {*fused_operators(path)}
        assert not {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "FusedConv"} & executed
        assert make is not Extremes or not executed & {"ReduceMean", "GlobalAveragePool"}


@pytest.mark.parametrize(("make", "kept"), [(LinearAttention, {"matmul_1", "add"}), (Rooted, {"mean", "mul", "add"})])
def test_what_divides_or_is_rooted_is_not_rounded_to_0(make, kept) -> None:
    student = quantized(graph(make), PTQ(), learnable=True)
    logits = student(images(16, seed=5))
    logits.square().mean().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(value.isfinite().all()) for value in [logits, *gradients])
    rounded = {n.args[0].name for n in student.network.graph.nodes if n.op == "call_module"}
    assert kept <= {n.name for n in student.network.graph.nodes} - rounded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "operator"), [(DynamicFilter, "aten.conv2d.default"), (MaxPooled, "adaptive_max_pool2d")]
)
def test_what_has_no_onnx_form_is_named(make, operator, tmp_path) -> None:
    with pytest.raises(
        ExportError, match=rf"the network has no ONNX form: the exporter cannot write '\w+', .*{operator}"
    ):
        write_onnx(convert(quantized(graph(make), PTQ())), SPEC, tmp_path / "model.onnx")

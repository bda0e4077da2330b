import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from toys import SPEC, Branchy, ConvHead, Grouped, Mobile, Plain, SharedLayer, Tokens, graph, images, quantized

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import aten
from zsq.quantization import PTQ
from zsq.quantization.bias_centring import centre_biases
from zsq.quantization.prepare import Student
from zsq.quantization.quantizers import ActivationQuantizer, quantizers, set_mode, straight_through
from zsq.quantization.training_view import merged


class Limited(nn.Module):
    """Layers without bias, and all functions that quantizers take over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 1)
        self.third, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, SPEC.classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.second(F.relu(self.first(x))))
        x = F.hardtanh(self.third(x), -0.1, 0.2)
        return self.head((x + torch.sigmoid(x)).mean((2, 3)))


TOYS = [Plain, Branchy, ConvHead, SharedLayer, Tokens, Mobile, Grouped, Limited]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")),
]


def student_of(make: Callable[[], nn.Module], device: str = "cpu", **changes: object) -> Student:
    """Return a student that is ready to be trained."""
    learnable = bool(changes.pop("learnable", False))
    student = quantized(graph(make), PTQ(**({"bits": "4"} | changes)), learnable=learnable).to(device)
    centre_biases(student, images(32).to(device))
    return student.train()


def learnt(student: Student, network: GraphModule, device: str) -> dict[str, Tensor]:
    """Return logits, gradients and ranges of two steps, the second with other weights."""
    found = {}
    for step in range(2):
        logits = network(images(16, seed=step).to(device))
        torch.sin(torch.arange(logits.numel(), device=device)).mul(logits.flatten()).sum().backward()
        found[f"{step} logits"] = logits.detach()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                found[f"{step} {name}"] = parameter.grad.clone()
                parameter.data -= 1e-3 * parameter.grad.sign()
                parameter.grad = None
        found |= {f"{step} {name} after": value.clone() for name, value in student.state_dict().items()}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learnable", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("make", TOYS)
def test_it_answers_and_learns_as_the_plain_graph(make: Callable[[], nn.Module], learnable: bool, device: str) -> None:
    bits = "4" if device == "cpu" else "8"  # where sums in another order move values to the other side of a tie
    for changes in ({"weight_granularity": "tensor", "bits": bits}, {"first_last_bits": 6, "bits": bits}):
        plain = student_of(make, device, learnable=learnable, **changes)
        student = copy.deepcopy(plain)
        expected, found = learnt(plain, plain.network, device), learnt(student, merged(student.network), device)
        assert expected.keys() == found.keys()
        most = 1e-4 if device == "cpu" else 0.1
        for name, value in expected.items():
            assert (found[name] - value).norm() <= most * value.norm() + 1e-6, name


def targets(network: GraphModule) -> list[object]:
    return [node.target for node in network.graph.nodes]


def test_functions_that_clip_are_left_to_the_quantizers() -> None:
    student = student_of(Limited)
    assert sum(clamp_limits(node) is not None for node in student.network.graph.nodes) == 3
    view = merged(student.network)
    assert [node for node in view.graph.nodes if clamp_limits(node)] == []
    clips = [
        node.args[1]
        for node in view.graph.nodes
        if node.op == "call_module"
        and isinstance(view.get_submodule(node.target), ActivationQuantizer)
        and node.args[1:]
    ]
    assert clips == [(0, torch.inf), (0, 6), (-0.1, 0.2)]
    assert targets(student.network).count(aten.relu.default) == 1  # the student keeps its own


@pytest.mark.parametrize("function", [lambda x: x.clamp(0, 6), lambda x: torch.clamp_min(x, 0)])
def test_a_function_that_may_have_a_gradient_at_its_limits_stays(function: Callable[[Tensor], Tensor]) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.first(x)).mean((2, 3)))

    view = merged(student_of(Clamped).network)
    assert sum(clamp_limits(node) is not None for node in view.graph.nodes) == 1


def test_a_function_that_others_read_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.head((x + x.sigmoid()).mean((2, 3)))

    student = student_of(Read, activation_scope="layers")
    assert aten.relu.default in targets(merged(student.network))


@pytest.mark.parametrize("mode", ["off", "observe", "histogram"])
def test_modes_that_do_not_round_clip(mode: str) -> None:
    student = student_of(Limited)
    view, x = merged(student.network), images(8)
    set_mode(student, mode)
    with torch.no_grad():
        seen = []
        for network in (student.network, view):
            for quantizer in quantizers(student):
                if isinstance(quantizer, ActivationQuantizer):
                    quantizer.histogram.zero_()
            seen.append((network(x), [value.clone() for value in student.buffers()]))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    for one, other in zip(*(buffers for _, buffers in seen), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_images_straight_through(device: str) -> None:
    student = student_of(Plain, device, bits="8", learnable=True)
    found = []
    for network in (student.network, merged(student.network)):
        leaf = images(8).to(device).requires_grad_()
        with straight_through(network):
            logits = network(leaf)
        logits.sin().sum().backward()
        found.append((logits.detach(), leaf.grad))
    assert all(parameter.grad is None for parameter in student.parameters())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from toys import Branchy, ConvHead, Plain, SharedLayer, Tokens, graph, images, stream_of

from zsq.graph import edit
from zsq.graph.fold import fold
from zsq.quantization import PTQ
from zsq.quantization.bias_correction import correct_biases
from zsq.quantization.prepare import Student, prepared_layers
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run


class Means(Interpreter):
    """Keeps the mean of each channel of each layer's output, by the layer's name."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n.target in edit.LAYERS:
            last = value if n.target is torch.ops.aten.linear.default else value.movedim(1, -1)
            self.found[n.name] = last.reshape(-1, last.shape[-1]).mean(0)
        return value


def means(network: GraphModule, x: Tensor) -> dict[str, Tensor]:
    recorder = Means(network)
    with torch.no_grad():
        recorder.run(x)
    return recorder.found


def student_and_float(make: Callable[[], nn.Module], *, correct: bool, bits: str = "4") -> tuple[Student, GraphModule]:
    network = graph(make)
    settings, folded = PTQ(bits=bits, bias_correction=False), fold(network)[0]
    student = quantize_ptq(network, stream_of(images(64)), settings, Run())
    if correct:
        correct_biases(student, folded, images(64))
    return student, folded


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens])
def test_the_mean_of_every_biased_layer_is_the_float_networks(make: Callable[[], nn.Module]) -> None:
    student, folded = student_and_float(make, correct=True)
    x = images(64)
    wanted, got = means(folded, x), means(student.network, x)
    assert list(got) == list(wanted)
    for layer in prepared_layers(student.network):
        bias = edit.argument(layer, 2)
        if bias is not None:
            scales = [edit.get_attribute(student.network, node.target).detach() for node in bias.args[1:]]
            half_a_step = scales[0] * scales[1] / 2  # the file's biases are integers
            assert ((got[layer.name] - wanted[layer.name]).abs() <= half_a_step * 1.01 + 1e-5).all(), layer.name


def test_without_correction_means_are_off() -> None:
    x = images(64)
    off = []
    for correct in (False, True):
        student, folded = student_and_float(Branchy, correct=correct)
        wanted, got = means(folded, x), means(student.network, x)
        off.append(max((got[name] - wanted[name]).abs().max().item() for name in wanted))
    assert off[0] > 0.05
    assert off[1] < off[0] / 5


def test_layers_without_a_bias_are_left_alone() -> None:
    student, folded = student_and_float(ConvHead, correct=False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    correct_biases(student, folded, images(64))
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["network.conv.bias"]


def test_correction_brings_four_bit_logits_closer() -> None:
    x = images(200, seed=9)
    network = graph(Branchy)
    errors = []
    for correct in (False, True):
        student, _ = student_and_float(Branchy, correct=correct)
        with torch.no_grad():
            errors.append((student(x) - network(x)).mean(0).abs().max().item())
    assert errors[1] < 0.5 * errors[0]

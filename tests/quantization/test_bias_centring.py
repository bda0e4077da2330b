from collections.abc import Callable

import pytest
import torch
from torch import nn
from toys import Branchy, ConvHead, Grouped, Plain, SharedLayer, Tokens, graph, images, quantized

from zsq.graph.edit import weight_times_mean
from zsq.quantization import PTQ
from zsq.quantization.bias_centring import centre_biases, plain_biases
from zsq.quantization.convert import convert


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(6, 4, 1), (6, 4, 2), (6, 6, 6), (6, 12, 6)])
def test_weight_times_mean_is_the_layers_answer_to_a_constant(inputs: int, outputs: int, groups: int) -> None:
    layer = nn.Conv2d(inputs, outputs, 3, groups=groups, bias=False)
    mean = torch.randn(inputs)
    with torch.no_grad():
        wanted = layer(mean.view(1, -1, 1, 1).expand(1, -1, 3, 3)).flatten()
        torch.testing.assert_close(weight_times_mean(layer.weight, mean), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens, Grouped])
def test_the_student_computes_the_same_before_between_and_after(make: Callable[[], nn.Module]) -> None:
    student = quantized(graph(make), PTQ(bits="6"), learnable=True)
    names, code, x = set(student.state_dict()), student.network.code, images(50, seed=4)
    with torch.no_grad():
        before = student(x)
        step = float(student.network.get_submodule(next(iter(student.ends))).scale)
        centre_biases(student, images(32))
        between = student(x)
        assert set(student.state_dict()) > names
        plain_biases(student)
        after = student(x)
    for logits in (between, after):  # a sum of floats in another order can fall on the other side of a tie
        assert ((logits - before).abs() > step / 2).float().mean() < 0.02
    assert set(student.state_dict()) == names
    assert student.network.code.count("quantize_bias") == code.count("quantize_bias")
    assert ((convert(student)(x) - after).abs() > step / 2).float().mean() < 0.02


def test_a_change_of_weights_leaves_the_mean_output_in_place() -> None:
    student = quantized(graph(Plain), PTQ(bits="8", bias_correction=False), learnable=True)
    x = images(32)
    centre_biases(student, x)
    plain = quantized(graph(Plain), PTQ(bits="8", bias_correction=False), learnable=True)
    shifts = []
    for network in (student, plain):
        with torch.no_grad():
            before = network(x)
            network.network.head.weight.mul_(0.9)
            shifts.append((network(x) - before).mean(0).abs().max().item())
    assert shifts[0] < 0.2 * shifts[1]

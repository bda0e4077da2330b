import itertools

import pytest
import torch
from torch.nn import functional as F
from toys import Branchy, ConvHead, Plain, SharedLayer, Tokens, graph, images, stream_of

from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.fold import fold
from zsq.quantization import PTQ, QAT
from zsq.quantization.prepare import prepared_layers, quantized_weight
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.weight_rounding import patches, rounded, with_stds
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run


def test_independent_inputs_are_rounded_to_the_nearest():
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.full((2, 3), 0.25)
    found = rounded(weight, torch.eye(5).expand(2, 5, 5), scale, -4, 3)
    torch.testing.assert_close(found, (weight / 0.25).round().clamp(-4, 3) * 0.25)


def test_inputs_that_are_equal_share_what_is_lost():
    # 0.4 + 0.4 is 0 + 1 on integers; the nearest are 0 and 0
    found = rounded(torch.full((1, 1, 2), 0.4), torch.full((1, 2, 2), 100.0), torch.ones(1, 1), -8, 7)
    assert sorted(found.flatten().tolist()) == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_output_changes_less_than_by_rounding_to_the_nearest(seed):
    random = torch.Generator().manual_seed(seed)
    mixing, weight = (torch.randn(*shape, generator=random) for shape in ((80, 80), (1, 6, 80)))
    covariance = (mixing @ mixing.T)[None]
    scale = torch.full((1, 6), 0.3)

    def error(found: torch.Tensor) -> float:
        change = found - weight
        return float((change @ covariance * change).sum())

    found = rounded(weight, covariance, scale, -8, 7)
    steps = found / 0.3
    assert torch.equal(steps.round(), steps.round().clamp(-8, 7))
    torch.testing.assert_close(steps, steps.round())
    nearest = (weight / 0.3).round().clamp(-8, 7) * 0.3
    assert error(found) < 0.7 * error(nearest)
    everywhere = torch.zeros(1, 80, 80)
    torch.testing.assert_close(rounded(weight, everywhere, scale, -8, 7), nearest)  # nothing is known


def test_few_weights_come_close_to_the_best_of_all_roundings():
    covariance = torch.tensor([[[4.0, 3.0, 1.0], [3.0, 5.0, 2.0], [1.0, 2.0, 3.0]]])
    weight = torch.tensor([[[0.45, 0.4, -0.3]]])

    def error(found: torch.Tensor) -> float:
        change = (found - weight).flatten()
        return float(change @ covariance[0] @ change)

    best = min(error(torch.tensor(whole).float()) for whole in itertools.product((-1, 0, 1), repeat=3))
    assert error(rounded(weight, covariance, torch.ones(1, 1), -2, 1)) <= 1.5 * best


def test_deviations_are_the_given_ones_and_correlations_the_seen_ones():
    seen = torch.tensor([[[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[1.0, 1.5, 0.0], [1.5, 9.0, 0.0], [0.0, 0.0, 4.0]]])
    torch.testing.assert_close(with_stds(seen, torch.tensor([1.0, 3.0, 2.0])), expected)
    grouped = with_stds(torch.eye(2).expand(2, 2, 2), torch.tensor([2.0, 3.0]))  # two positions of a channel a group
    torch.testing.assert_close(grouped, torch.stack([4 * torch.eye(2), 9 * torch.eye(2)]))


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens])
def test_patches_times_weights_are_the_layers_outputs(make):
    student = quantize_ptq(graph(make), stream_of(images()), PTQ(), Run())
    x = images(8)
    seen = {}

    class Inputs(torch.fx.Interpreter):
        def run_node(self, n):
            if n in layers:
                seen[n] = self.env[n.args[0]]
            value = super().run_node(n)
            if n in layers:
                seen[n] = (seen[n], value)
            return value

    layers = prepared_layers(student.network)
    Inputs(student.network).run(x)
    for layer in layers:
        given, value = seen[layer]
        quantizer, weight = quantized_weight(student.network, layer)
        rows = patches(given, layer, weight, stream(0, "test", 0))
        if layer.target is edit.aten.linear.default:
            outputs = value.reshape(-1, value.shape[-1])
        else:
            outputs = value.movedim(1, -1).reshape(-1, value.shape[1])
        flat = quantizer(weight).reshape(rows.shape[1], -1, rows.shape[2])
        found = torch.einsum("rgi,goi->rgo", rows, flat).flatten(1)
        bias = edit.argument(layer, 2)
        if bias is not None:
            stored, *scales = (edit.get_attribute(student.network, str(n.target)) for n in bias.all_input_nodes)
            found = found + bias.target(stored, *scales)
        assert found.shape == outputs.shape
        torch.testing.assert_close(found.sum(0), outputs.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens])
def test_weights_lie_on_their_grids_and_mean_outputs_stay(make):
    settings = {name: PTQ(bits="4", weight_rounding=name) for name in ("nearest", "gptq")}
    students = {name: quantize_ptq(graph(make), stream_of(images()), kind, Run()) for name, kind in settings.items()}
    again = quantize_ptq(graph(make), stream_of(images()), settings["gptq"], Run())
    for a, b in zip(students["gptq"].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for layer in prepared_layers(students["gptq"].network):
        quantizer, weight = quantized_weight(students["gptq"].network, layer)
        torch.testing.assert_close(quantizer(weight), weight)
        assert not torch.equal(weight, quantized_weight(students["nearest"].network, layer)[1])


def test_the_first_layer_changes_its_outputs_less():
    smooth = F.interpolate(images(64)[:, :, :2, :2], size=8, mode="bilinear")
    network = graph(Plain)
    wanted = fold(network)[0].conv.weight.detach()
    errors = {}
    for name in ("nearest", "gptq"):
        student = quantize_ptq(network, stream_of(smooth), PTQ(bits="4", weight_rounding=name), Run())
        layer = prepared_layers(student.network)[0]
        quantizer, weight = quantized_weight(student.network, layer)
        change = F.conv2d(smooth, quantizer(weight).detach() - wanted, padding=1)
        errors[name] = float(change.var((0, 2, 3)).mean())
    assert errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize(
    ("settings", "refined"),
    [
        (PTQ(bits="6"), (True, "gptq")),
        (PTQ(bits="W6A8"), (False, "gptq")),
        (PTQ(bits="W8A6"), (True, "nearest")),
        (PTQ(), (False, "nearest")),
        (PTQ(bits="4"), (False, "nearest")),
        (QAT(bits="6"), (False, "nearest")),
        (QAT(bits="6", steps=0), (True, "gptq")),
        (PTQ(channel_scaling=True, weight_rounding="gptq"), (True, "gptq")),
        (PTQ(bits="6", channel_scaling=False, weight_rounding="nearest"), (False, "nearest")),
    ],
)
def test_six_bits_are_refined(settings, refined):
    assert (settings.resolved_channel_scaling, settings.resolved_weight_rounding) == refined


def test_eight_bit_weights_of_limited_pairs_keep_their_values():
    settings = [PTQ(weight_rounding=name) for name in ("nearest", "gptq")]
    students = [quantize_ptq(graph(Plain), stream_of(images()), kind, Run()) for kind in settings]
    for a, b in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(a, b)


def test_another_rounding_is_refused():
    with pytest.raises(InputError, match="weight_rounding"):
        PTQ(weight_rounding="up")

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zsq.quantization import fake_quantize as module
from zsq.quantization.fake_quantize import (
    SMALLEST_SCALE,
    affine_grid,
    bias_integers,
    fake_quantize,
    integer_range,
    quantize_bias,
)
from zsq.quantization.quantizers import (
    HISTOGRAM_BINS,
    ActivationQuantizer,
    WeightQuantizer,
    constrain,
    quantizers,
    set_mode,
    straight_through,
)

BITS = st.integers(2, 8)
FINITE = st.floats(-1e4, 1e4, width=32)
properties = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def quantizer_of(low: float, high: float, bits: int, *, learnable: bool = False) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, learnable=learnable).eval()
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    quantizer.mode = "quantize"
    return quantizer


def integers_of(quantizer: ActivationQuantizer, values: Tensor) -> Tensor:
    return (values.double() / quantizer.scale.detach().double()).round() + quantizer.zero_point.detach()


def test_integer_range() -> None:
    assert [integer_range(bits) for bits in (8, 6, 4, 2)] == [(-128, 127), (-32, 31), (-8, 7), (-2, 1)]


@properties
@given(FINITE, FINITE, BITS)
def test_the_grid_covers_the_range_and_holds_zero(one: float, other: float, bits: int) -> None:
    low, high = (torch.tensor([v]) for v in sorted((one, other)))
    scale, zero_point = affine_grid(low, high, bits)
    quant_min, quant_max = integer_range(bits)
    assume(low.item() < 0 or high.item() > 0)  # else see below
    assert zero_point == zero_point.round()
    assert quant_min <= zero_point <= quant_max  # so 0 is the integer `zero_point`
    step, first, last = scale.item(), scale * (quant_min - zero_point), scale * (quant_max - zero_point)
    slack = 1e-6 * max(abs(low.item()), abs(high.item())) + 1e-30
    levels = quant_max - quant_min
    even = max((high.clamp(min=0) - low.clamp(max=0)).item() / levels, SMALLEST_SCALE)
    for end, edge in ((-low, -first), (high, last)):  # an end that close to 0 rounds to 0
        assert edge >= end - slack or end <= even / 2 * (1 + 1e-5)
    assert even * (1 - 0.5 / levels) * (1 - 1e-6) <= step <= 1.5 * even * (1 + 1e-6)


@properties
@given(FINITE, FINITE, BITS, st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_rounding(one: float, other: float, bits: int, shares: list[float]) -> None:
    low, high = sorted((one, other, 0.0))[::2]
    quantizer = quantizer_of(low, high, bits)
    x = low + (high - low) * torch.tensor(shares)
    rounded = quantizer(x)
    assert torch.equal(quantizer(rounded), rounded)
    integers = integers_of(quantizer, rounded)
    assert integers.min() >= quantizer.quant_min
    assert integers.max() <= quantizer.quant_max
    step = max(quantizer.scale.item(), (high - low) / (quantizer.quant_max - quantizer.quant_min))
    assert (rounded - x).abs().max() <= step / 2 * (1 + 1e-5) + 2e-6 * x.abs().max() + 1e-30
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


@properties
@given(FINITE, FINITE, BITS)
def test_every_integer_of_the_grid_survives(one: float, other: float, bits: int) -> None:
    quantizer = quantizer_of(*sorted((one, other)), bits)
    integers = torch.arange(quantizer.quant_min, quantizer.quant_max + 1)
    values = (integers - quantizer.zero_point.detach()) * quantizer.scale.detach()
    for training in (False, True):
        assert torch.equal(quantizer.eval()(values), values)
        learnable = quantizer_of(*sorted((one, other)), bits, learnable=True).train(training)
        torch.testing.assert_close(learnable(values).detach(), values, rtol=1e-6, atol=0)
    assert torch.equal(integers_of(quantizer, values), integers.double())


def test_values_outside_saturate() -> None:
    quantizer = quantizer_of(-1.0, 3.0, 4)
    ends = quantizer(torch.tensor([-1e6, -1.0, 3.0, 1e6]))
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]
    assert integers_of(quantizer, ends).tolist() == [-8, -8, 7, 7]


def test_pixels_between_minus_one_and_one_are_not_halfway_between_grid_points() -> None:
    scale, zero_point = affine_grid(torch.tensor([-1.0]), torch.tensor([1.0]), 8)
    assert zero_point.item() in (-1, 0)
    assert scale.item() == pytest.approx(1 / 127)  # 2 / 255 would put all 256 pixels on a tie
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    fraction = (pixels / scale.double()).remainder(1)
    assert (fraction - 0.5).abs().min() > 1e-3


def test_a_range_of_no_width_stays_finite() -> None:
    quantizer = quantizer_of(0.0, 0.0, 8)
    assert quantizer.scale.item() == 1.0  # in whose steps the next layer's bias is held
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-2.0, 3.0), (-3.0, 0.0)])
def test_training_and_evaluation_agree(bits: int, learnable: bool, low: float, high: float) -> None:
    quantizer = quantizer_of(low, high, bits, learnable=learnable)
    quantizer.low.fill_(low)
    quantizer.high.fill_(high)
    x = torch.linspace(low, high, 997)
    quantizer.averaging = 0.0
    trained = quantizer.train()(x).detach()
    evaluated = quantizer.eval()(x).detach()
    if learnable:
        assert torch.equal(trained, evaluated)  # ties too
    torch.testing.assert_close(trained, evaluated, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero_point", [-8.0, -5.0, -4.4, 0.0, 3.0, 7.0])
def test_learnable_gradients_in_closed_form(zero_point: float) -> None:
    """LSQ+ (Bhalgat et al. 2020): straight through inside; the file's own rounding of the zero point decides inside."""
    quantizer = ActivationQuantizer(4, learnable=True).train()
    quantizer.mode = "quantize"
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
        quantizer.zero_point.fill_(zero_point)
    zero = round(zero_point)
    integers = torch.arange(-12.0, 12.0).view(2, 12)
    x = ((integers - zero + 0.2) * 0.5).requires_grad_()
    weights = torch.linspace(1, 2, 24).view(2, 12)
    (weights * quantizer(x)).sum().backward()
    inside = (integers >= -8) & (integers <= 7)
    assert torch.equal(x.grad, weights * inside)
    factor = 1 / math.sqrt(12 * 7)
    slope = torch.where(inside, torch.full_like(x, -0.2), integers.clamp(-8, 7) - zero)
    torch.testing.assert_close(quantizer.scale.grad, factor * (weights * slope).sum().detach().view(1))
    torch.testing.assert_close(quantizer.zero_point.grad, factor * (weights * ~inside * -0.5).sum().view(1))


LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "slice": lambda x: x[:, 1:],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "piece"), [(8, module.PIECE), (8, 16), (4, 16)])  # of 420 values
def test_activations_and_gradients_are_those_of_torchs_kernels(
    layout: str, bits: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    random = torch.Generator().manual_seed(0)
    quant_min, quant_max = integer_range(bits)
    levels = quant_max - quant_min
    x, upstream = (LAYOUTS[layout](torch.randn(4, 3, 5, 7, generator=random)) for _ in range(2))
    found = []
    for ours in (True, False):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        scale = torch.tensor([3.0 / levels]).requires_grad_()  # a tenth of the values lies outside
        zero_point = torch.tensor([quant_min + 0.4 * levels]).requires_grad_()
        if ours:
            y = fake_quantize(leaf, scale, zero_point, quant_min, quant_max, 0.1)
        else:
            args = (leaf, scale, zero_point - quant_min, 0, levels, 0.1)
            y = torch._fake_quantize_learnable_per_tensor_affine(*args)
        y.backward(upstream)
        found.append((y.detach(), leaf.grad, scale.grad, zero_point.grad))
    assert 0.02 < (found[0][1] == 0).float().mean() < 0.5
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_and_gradients_are_those_of_torchs_kernel(bits: int) -> None:
    random = torch.Generator().manual_seed(0)
    quant_min, quant_max = integer_range(bits)
    weight, upstream = (torch.randn(6, 3, 3, 3, generator=random) for _ in range(2))
    scales = weight.abs().flatten(1).amax(1) / quant_max * torch.linspace(0.5, 1.2, 6)
    found = []
    for ours in (True, False):
        leaf, scale = weight.clone().requires_grad_(), scales.clone().requires_grad_()
        if ours:
            y = fake_quantize(leaf, scale.view(-1, 1, 1, 1), torch.zeros(1), quant_min, quant_max, 0.1)
        else:
            args = (leaf, scale, torch.zeros(6), 0, quant_min, quant_max, 0.1)
            y = torch._fake_quantize_learnable_per_channel_affine(*args)
        y.backward(upstream)
        found.append((y.detach(), leaf.grad, scale.grad))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_a_value_that_is_not_finite_stays_so() -> None:
    quantizer = quantizer_of(-1.0, 1.0, 8)
    assert quantizer(torch.tensor([[math.nan, 0.5]])).isnan().tolist() == [[True, False]]


def test_learnt_scales_lower_the_rounding_error() -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).relu()
    quantizer = quantizer_of(0.0, 12.0, 4, learnable=True).train()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    errors = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        constrain(quantizer)
        errors.append(loss.item())
    assert errors[-1] < 0.3 * errors[0]


def test_modes() -> None:
    quantizer = quantizer_of(0.0, 1.0, 2)
    x = torch.tensor([[0.1, 0.4, 5.0, -2.0]])
    for mode in ("off", "observe", "histogram"):
        quantizer.mode = mode
        assert torch.equal(quantizer(x), x)
    assert (quantizer.low.item(), quantizer.high.item()) == (-2.0, 5.0)
    assert quantizer.histogram.sum() == 4
    assert quantizer.histogram[[0, -1]].tolist() == [1, 1]
    assert len(quantizer.histogram) == HISTOGRAM_BINS


def test_observed_ranges_grow_or_average() -> None:
    growing, averaging = (ActivationQuantizer(8, learnable=False, averaging=0.25) for _ in range(2))
    averaging.average_ranges = True
    for quantizer in (growing, averaging):
        quantizer.mode = "observe"
        for x in ([-1.0, 1.0], [-3.0, 0.5], [0.0, 5.0]):
            quantizer(torch.tensor(x))
    assert (growing.low.item(), growing.high.item()) == (-3.0, 5.0)
    assert averaging.low.item() == pytest.approx(((-1 * 0.75 + -3 * 0.25) * 0.75) + 0)
    assert averaging.high.item() == pytest.approx((1 * 0.75 + 0.5 * 0.25) * 0.75 + 5 * 0.25)


def test_moving_average_follows_the_range_in_training_only() -> None:
    quantizer = quantizer_of(0.0, 1.0, 8)
    quantizer.low.fill_(0.0)
    quantizer.high.fill_(1.0)
    x = torch.tensor([[0.0, 2.0]])
    quantizer.eval()(x)
    assert quantizer.high.item() == 1.0
    quantizer.train()(x)
    assert quantizer.high.item() == pytest.approx(1.01)
    assert quantizer.scale.item() == pytest.approx(1.01 / 255)
    assert not quantizer.scale.requires_grad


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (3, 7)])
def test_weight_scales_span_the_largest_magnitudes(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.1]).view(
        -1, *[1] * (len(shape) - 1)
    )
    largest = weight.abs().flatten(1).amax(1)
    channel = WeightQuantizer(weight, bits, per_channel=True, learnable=False)
    tensor = WeightQuantizer(weight, bits, per_channel=False, learnable=False)
    torch.testing.assert_close(channel.scale.detach(), largest / (2 ** (bits - 1) - 0.5))
    torch.testing.assert_close(tensor.scale.detach(), largest.max().view(1) / (2 ** (bits - 1) - 0.5))
    for quantizer in (channel.eval(), tensor.eval()):
        assert torch.equal(quantizer(weight), weight)
        quantizer.mode = "quantize"
        step = quantizer.scale.detach().view(-1, *[1] * (len(shape) - 1))
        rounded = quantizer(weight)
        assert ((rounded - weight).abs() <= step / 2 * (1 + 1e-4)).all()
        integers = rounded / step
        torch.testing.assert_close(integers, integers.round(), atol=1e-4, rtol=0)
        assert torch.equal(quantizer(rounded), rounded)


@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_gradients(per_channel: bool) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    learnable = WeightQuantizer(weight, 4, per_channel=per_channel, learnable=True).train()
    following = WeightQuantizer(weight, 4, per_channel=per_channel, learnable=False).train()
    learnable.set_scale(0.8 * learnable.scale)  # cuts some weights off
    for quantizer in (learnable, following):
        quantizer.mode = "quantize"
        weight.grad = None
        quantizer(weight).square().sum().backward()
        ratio = weight.detach() / quantizer.scale.detach().view(-1, 1)
        rounded = quantizer(weight).detach()
        inside = (ratio > -8.5) & (ratio < 7.499)  # the largest magnitude lies on the tie at 7.5
        clear = (ratio.abs() - 7.5).abs() > 1e-3
        torch.testing.assert_close(weight.grad[clear], (2 * rounded * inside)[clear])
        assert clear.sum() >= 20
    assert following.scale.grad is None
    ratio = weight.detach() / learnable.scale.detach().view(-1, 1)
    inside = (ratio > -8.5) & (ratio < 7.5)
    assert not inside.all()
    slope = ratio.round().clamp(-8, 7) - torch.where(inside, ratio, 0)
    channels = 3 if per_channel else 1
    wanted = (2 * learnable(weight).detach() * slope).reshape(channels, -1).sum(1) / math.sqrt(24 / channels * 7)
    torch.testing.assert_close(learnable.scale.grad, wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_grow_take_their_scale_along_unless_it_is_learnt() -> None:
    weight = torch.ones(2, 4)
    for learnable in (False, True):
        quantizer = WeightQuantizer(weight, 8, per_channel=True, learnable=learnable).train()
        quantizer.mode = "quantize"
        before = quantizer.scale.detach().clone()
        quantizer(3 * weight)
        torch.testing.assert_close(quantizer.scale.detach(), before if learnable else 3 * before)


def test_biases_are_rounded_to_multiples_of_the_product_of_scales() -> None:
    bias = torch.tensor([0.26, -0.26, 10.0]).requires_grad_()
    activation, weight = torch.tensor([0.5]).requires_grad_(), torch.tensor([0.2, 1.0, 4.0]).requires_grad_()
    rounded = quantize_bias(bias, activation, weight)
    torch.testing.assert_close(rounded.detach(), torch.tensor([0.3, -0.5, 10.0]))
    assert bias_integers(bias.detach(), (activation * weight).detach()).tolist() == [3, -1, 5]
    assert torch.equal(quantize_bias(bias, torch.zeros(1), weight), bias)  # before calibration
    (rounded * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert bias.grad.tolist() == [1, 2, 3]
    assert activation.grad is None
    assert weight.grad is None


def test_bias_integers_saturate_in_int32() -> None:
    integers = bias_integers(torch.tensor([1e9, -1e9]), torch.tensor([1e-3, 1e-3]))
    stored = integers.to(torch.int32)
    assert stored.double().tolist() == integers.double().tolist()
    assert stored[0] > 2**31 - 256
    assert stored[1] < -(2**31) + 256


def test_constrain_and_modes_reach_every_quantizer() -> None:
    activation = ActivationQuantizer(8, learnable=True)
    weight = WeightQuantizer(torch.ones(2, 3), 8, per_channel=True, learnable=True)
    network = nn.Sequential(activation, nn.Identity(), weight)
    assert quantizers(network) == [activation, weight]
    set_mode(network, "quantize")
    assert {quantizer.mode for quantizer in quantizers(network)} == {"quantize"}
    with torch.no_grad():
        activation.scale.fill_(-1.0)
        activation.zero_point.fill_(-1000.0)
        weight.scale.fill_(0.0)
    constrain(network)
    assert (activation.scale > 0).all()
    assert (weight.scale > 0).all()
    assert activation.zero_point.item() == -128


def test_moving_average_keeps_what_calibration_made_of_the_range() -> None:
    quantizer = quantizer_of(0.0, 1.0, 8)
    quantizer.low.fill_(0.0)
    quantizer.high.fill_(2.0)
    quantizer.choose_range(torch.tensor([0.0]), torch.tensor([1.0]))
    assert (quantizer.low_factor.item(), quantizer.high_factor.item()) == (1.0, 0.5)
    quantizer.train()(torch.tensor([[0.0, 4.0]]))
    assert quantizer.high.item() == pytest.approx(2.02)
    assert quantizer.scale.item() == pytest.approx(1.01 / 255)


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_passes_gradients_and_changes_nothing(learnable: bool, training: bool) -> None:
    quantizer = quantizer_of(-1.0, 2.0, 4, learnable=learnable)
    student = nn.Sequential(quantizer, nn.Linear(3, 2)).train(training)
    x = torch.tensor([[-0.93, 1.0, 5.0]], requires_grad=True)  # the last is cut off
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with straight_through(student):
        answer = student(x)
    answer.sum().backward()
    torch.testing.assert_close(x.grad[0], student[1].weight.detach().sum(0) * torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(answer, student.eval()(x))
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in student.parameters())
    student.train(training)(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())  # they learn again
    assert student[1].weight.requires_grad
    assert quantizer.scale.requires_grad == learnable


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_ends_with_an_error_too(training: bool) -> None:
    quantizer = quantizer_of(-1.0, 2.0, 4, learnable=True)
    student = nn.Sequential(quantizer, nn.Linear(3, 2)).train(training)
    student[1].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), straight_through(student):
        student(torch.ones(1, 5))
    assert [m.training for m in student.modules()] == [training] * 3
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["1.bias"]

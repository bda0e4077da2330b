import pytest
import torch
from torch import Tensor

from zsq.quantization.fake_quantize import affine_grid
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.quantization.range_rules import NEEDS_HISTOGRAM, PERCENTILE, RULES, minmax, mse, percentile, weight_mse


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TENSORS = {
    "gaussian": lambda: torch.randn(4000, generator=random()),
    "after relu": lambda: torch.randn(4000, generator=random()).relu(),
    "outliers": lambda: torch.cat([torch.randn(4000, generator=random()), torch.tensor([60.0, -9.0])]),
    "negative": lambda: -torch.rand(4000, generator=random()) - 1,
    "two values": lambda: torch.tensor([0.0, 1.0]).repeat(100),
    "one-sided tail": lambda: torch.randn(4000, generator=random()).exp(),
}


def seen(x: Tensor, bits: int) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, learnable=False).eval()
    for mode in ("observe", "histogram"):
        quantizer.mode = mode
        for part in x.split(1000):
            quantizer(part)
    quantizer.mode = "quantize"
    return quantizer


def histogram_error(quantizer: ActivationQuantizer, low: Tensor, high: Tensor) -> float:
    """Squared error on the centres of the bins, computed here in double precision."""
    edges = torch.linspace(quantizer.low.item(), quantizer.high.item(), len(quantizer.histogram) + 1).double()
    centres = (edges[1:] + edges[:-1]) / 2
    scale, zero_point = (t.double() for t in affine_grid(low, high, quantizer.bits))
    integers = ((centres / scale).round() + zero_point).clamp(quantizer.quant_min, quantizer.quant_max)
    return (((integers - zero_point) * scale - centres).square() * quantizer.histogram.double()).sum().item()


def error(quantizer: ActivationQuantizer, x: Tensor, low: Tensor, high: Tensor) -> float:
    quantizer.set_range(low, high)
    return (quantizer(x) - x).square().sum().item()


@pytest.mark.parametrize("name", TENSORS)
def test_minmax_is_the_range_seen(name: str) -> None:
    x = TENSORS[name]()
    low, high = minmax(seen(x, 8))
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("name", TENSORS)
def test_mse_is_never_worse_than_minmax(name: str, bits: int) -> None:
    x = TENSORS[name]()
    quantizer = seen(x, bits)
    low, high = mse(quantizer)
    ends = minmax(quantizer)
    assert quantizer.low.clamp(max=0) <= low.clamp(max=0)  # the grid holds 0 in any case
    assert high.clamp(min=0) <= quantizer.high.clamp(min=0)
    assert low.shape == high.shape == (1,)
    assert histogram_error(quantizer, low, high) <= histogram_error(quantizer, *ends) * (1 + 1e-4)


def test_mse_clips_where_that_pays() -> None:
    for name in ("outliers", "gaussian", "one-sided tail"):
        x = TENSORS[name]()
        quantizer = seen(x, 4)
        low, high = mse(quantizer)
        assert error(quantizer, x, low, high) < 0.8 * error(quantizer, x, *minmax(quantizer)), name
        assert high < 0.9 * quantizer.high


def test_mse_keeps_what_rounds_without_error() -> None:
    x = TENSORS["two values"]()
    quantizer = seen(x, 2)
    low, high = mse(quantizer)
    assert error(quantizer, x, low, high) < 1e-3


def test_percentile_leaves_out_an_equal_share_at_each_end() -> None:
    x = torch.linspace(-1, 3, 200_001)
    low, high = percentile(seen(x, 8))
    outside = (100 - PERCENTILE) / 200 * 4
    width = 4 / 2048
    assert low.item() == pytest.approx(-1 + outside, abs=width)
    assert high.item() == pytest.approx(3 - outside, abs=width)


def test_percentile_drops_outliers_and_keeps_the_rest() -> None:
    x = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([1000.0])])
    low, high = percentile(seen(x, 8))
    assert 0.99 < high.item() < 2  # one bin is half a unit wide
    assert low.item() < 0.5


def test_constant_activations() -> None:
    for value in (0.0, 2.0, -3.0):
        quantizer = seen(torch.full((50,), value), 8)
        for rule in RULES.values():
            quantizer.set_range(*rule(quantizer))
            assert quantizer(torch.tensor([value])).item() == pytest.approx(value, rel=1e-6)


def test_rules_that_read_histograms() -> None:
    assert set(NEEDS_HISTOGRAM) < set(RULES)
    assert RULES["moving-average"] is minmax


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_mse_is_never_worse_than_minmax(bits: int, per_channel: bool) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=random()) * torch.logspace(-2, 1, 6).view(-1, 1, 1, 1)
    weight[0] = 0.0
    weight[1] = weight[1].sign()
    weight[2, 0, 0, 0] = 5.0
    quantizer = WeightQuantizer(weight, bits, per_channel=per_channel, learnable=False).eval()
    quantizer.mode = "quantize"

    def errors() -> Tensor:
        squares = (quantizer(weight) - weight).double().square().flatten(1).sum(1)
        return squares if per_channel else squares.sum().view(1)

    before = errors()
    scale = weight_mse(quantizer, weight)
    assert scale.shape == quantizer.scale.shape
    quantizer.set_scale(scale)
    after = errors()
    assert (after <= before * (1 + 1e-5) + 1e-12).all()
    assert bits > 6 or after.sum() < before.sum()

"""Weights whose products no processor saturates: sums of neighbours, scales, and through training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zsq.quantization.fake_quantize import grid_integers
from zsq.quantization.pair_sums import neighbour_sums, pair_limit
from zsq.quantization.quantizers import WeightQuantizer

LIMIT = 128


def stored(quantizer, weight):
    """Return the integers that a file would hold."""
    scale = quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
    return grid_integers(weight, scale, torch.zeros(1), quantizer.quant_min, quantizer.quant_max)


def test_neighbours_are_channels_of_one_position_where_their_number_is_even():
    weight = torch.tensor([[3.0, 4.0, 5.0, -9.0], [1.0, -1.0, -2.0, -6.0]])
    assert neighbour_sums(weight).tolist() == [7.0, 8.0]  # 3 + 4; -2 - 6; not 4 + 5
    maps = weight.view(2, 2, 2, 1)  # channels 0 and 1 at two positions: pairs (3, 5), (4, -9), (1, -2), (-1, -6)
    assert neighbour_sums(maps).tolist() == [8.0, 7.0]


def test_an_odd_number_of_channels_pairs_all_neighbours():
    weight = torch.tensor([[1.0, 2.0, 10.0], [10.0, 0.0, 0.0]]).view(1, 2, 3).movedim(1, 2)  # two positions
    assert neighbour_sums(weight).tolist() == [20.0]  # the last channel of one and the first of the next
    assert neighbour_sums(torch.ones(4, 1)).tolist() == [0.0] * 4


@pytest.mark.parametrize(("bits", "expected"), [((8, 8), 128), ((8, 7), None), ((7, 8), None), ((8, 4), None)])
def test_only_8_bit_weights_of_8_bit_inputs_can_saturate(bits, expected):
    assert pair_limit(*bits) == expected


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 9),
    kernel=st.sampled_from([(), (1,), (3,), (1, 1), (3, 2)]),
    per_channel=st.booleans(),
    tail=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_no_pair_of_stored_weights_exceeds_the_limit(seed, channels, kernel, per_channel, tail):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, channels, *kernel, generator=generator).abs().pow(tail)
    weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    quantizer = WeightQuantizer(weight, 8, per_channel=per_channel, learnable=False, pair_limit=LIMIT)
    assert neighbour_sums(stored(quantizer, weight)).max() <= LIMIT


def test_halves_are_not_both_rounded_up():
    weight = torch.tensor([[63.5, 64.5], [100.5, 27.5], [127.0, 1.0]]) * 0.013
    quantizer = WeightQuantizer(weight, 8, per_channel=True, learnable=False, pair_limit=LIMIT)
    assert stored(quantizer, weight).sum(1).max() <= LIMIT


def test_a_channel_without_large_pairs_keeps_its_scale():
    weight = torch.tensor([[1.0, -1.0, 0.2, 0.3], [1.0, 1.0, 0.0, 0.0]])
    free = WeightQuantizer(weight, 8, per_channel=True, learnable=False)
    kept = WeightQuantizer(weight, 8, per_channel=True, learnable=False, pair_limit=LIMIT)
    assert kept.scale[0] == free.scale[0]
    assert kept.scale[1].item() == pytest.approx(2 / LIMIT, rel=1e-5)


@pytest.mark.parametrize("learnable", [True, False])
def test_training_keeps_the_pairs(learnable):
    weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    quantizer = WeightQuantizer(weight, 8, per_channel=True, learnable=learnable, pair_limit=LIMIT).train()
    quantizer.mode = "quantize"
    with torch.no_grad():
        weight.copy_(weight.abs() * 3)
        if learnable:
            quantizer.keep_pairs(weight)
    quantizer(weight)
    assert neighbour_sums(stored(quantizer, weight.detach())).max() <= LIMIT

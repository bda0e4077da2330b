"""Which 8-bit weights a processor without VNNI multiplies wrongly, and the scale from which on none is.

AVX2, and AVX-512 without VNNI, multiply unsigned activations by signed weights with `vpmaddubsw`: the products of two
neighbours are added in int16, which saturates. 255 times two weights of one sign stays within it while they sum to at
most 128 steps. Neighbours are those of the order in which runtimes gather a filter's inputs: all channels of a
position, then those of the next. Runtimes compute depthwise filters without such pairs.
"""

import torch
from torch import Tensor

INT16_MAX = 2**15 - 1

ROUNDING = 1 + 1e-6
"""Keeps the quotients of a pair whose sum is just at the limit from being rounded up beyond it, both of them."""


def pair_limit(weight_bits: int, activation_bits: int) -> int | None:
    """Return the largest sum of two weights of one sign, in steps, that cannot saturate; None where no sum can.

    >>> pair_limit(8, 8), pair_limit(7, 8), pair_limit(8, 7)
    (128, None, None)
    """
    limit = INT16_MAX // (2**activation_bits - 1)
    return limit if 2**weight_bits > limit else None


def neighbour_sums(weight: Tensor) -> Tensor:
    """Return the largest magnitude of a sum of two neighbours, for each output channel, [O].

    Channels are paired from the first on where their number is even. An odd number lets pairs reach over to the next
    position in some runtimes and not in others: all neighbours count then.

    Args:
        weight: [O, I, ...], of a linear layer or a convolution of any rank; I are the inputs of a group.
    """
    rows = weight.movedim(1, -1).flatten(1)
    if rows.shape[1] < 2:
        return rows.new_zeros(len(rows))
    step = 1 if weight.shape[1] % 2 else 2
    sums = rows[:, :-1:step] + rows[:, 1::step]
    largest: Tensor = torch.linalg.vector_norm(sums, torch.inf, 1)
    return largest

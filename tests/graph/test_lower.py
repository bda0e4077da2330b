"""Transposed convolutions and attention are written by layers and products, and compute the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, images, settle

from zsq.graph.edit import aten
from zsq.graph.fold import fold
from zsq.graph.lower import TRANSPOSED, phases
from zsq.graph.trace import trace


def test_phases_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3)
    assert phases(weight, [2], [1], 1).tolist() == [[[3, 1]], [[0, 2]]]  # even outputs see taps 0 and 2, odd ones tap 1
    assert phases(weight, [1], [2], 1).tolist() == [[[3, 0, 2, 0, 1]]]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 8},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2},
        {"kernel_size": 1, "stride": 2, "output_padding": 1},
        {"kernel_size": 2, "stride": 4, "output_padding": 3},
        {"kernel_size": 5, "padding": 4},
        {"kernel_size": 3, "stride": 2, "padding": 2, "output_padding": 1, "bias": False},
    ],
)
@pytest.mark.parametrize("normalised", [True, False])
def test_a_transposed_convolution_is_a_convolution(options: dict[str, object], normalised: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if normalised else nn.Identity()
    up = nn.ConvTranspose2d(8, 8, **options)  # type: ignore[arg-type]
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), up, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    network = trace(settle(net), SPEC, "toy")
    folded, record = fold(network)
    torch.testing.assert_close(folded(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
    targets = [node.target for node in folded.graph.nodes]
    assert not {*TRANSPOSED, aten.batch_norm.default} & {*targets}
    assert list(record) == (["1.weight"] if normalised else [])
    lowered = targets.index(aten.conv2d.default, targets.index(aten.conv2d.default) + 1)
    assert targets[lowered + 1] is aten.relu.default  # in front of the interleaving, where kernels fuse it


@pytest.mark.parametrize(("make", "shape"), [(nn.ConvTranspose1d, (3, 64)), (nn.ConvTranspose3d, (3, 4, 4, 4))])
def test_one_and_three_dimensions_and_a_shared_weight(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = make(3, 3, 3, 2, 1), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(self.up(x.view(-1, *shape))).flatten(2).mean(2))

    torch.manual_seed(0)
    network = trace(Up().eval(), SPEC, "toy")
    folded, _ = fold(network)
    torch.testing.assert_close(folded(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
    assert not {*TRANSPOSED} & {node.target for node in folded.graph.nodes}


class Attending(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options, self.bias, self.head = options, nn.Parameter(torch.randn(1, 1, 8, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.bias if self.options.get("masked") else None
        options = {name: value for name, value in self.options.items() if name != "masked"}
        return self.head(F.scaled_dot_product_attention(x, x + 1, x, attn_mask=mask, **options).mean((1, 2)))


@pytest.mark.parametrize("options", [{}, {"masked": True}, {"scale": 0.7}])
def test_attention_is_two_products(options: dict[str, object]) -> None:
    network = trace(Attending(**options).eval(), SPEC, "toy")
    folded, _ = fold(network)
    torch.testing.assert_close(folded(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
    targets = [node.target for node in folded.graph.nodes]
    assert targets.count(aten.matmul.default) == 2
    assert aten.scaled_dot_product_attention.default not in targets


def test_causal_attention_stays() -> None:
    folded, _ = fold(trace(Attending(is_causal=True).eval(), SPEC, "toy"))
    assert aten.scaled_dot_product_attention.default in [node.target for node in folded.graph.nodes]

"""Products with a stored matrix are linear layers whatever they are written with, and compute the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import SPEC, images

from zsq.graph import edit
from zsq.graph.edit import aten
from zsq.graph.products import Labels
from zsq.graph.trace import trace


class Product(nn.Module):
    """Maps [N, 3, 8, 8] through a product with a tensor of some shape, and to logits."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight).flatten(1)[:, :5]


LINEAR: dict[str, Product] = {
    "x @ w": Product(lambda x, w: x @ w, 8, 7),
    "x @ w.T": Product(lambda x, w: x @ w.T, 7, 8),
    "x @ [1, I, O]": Product(lambda x, w: x @ w, 1, 8, 7),
    "w @ x": Product(lambda x, w: w @ x, 7, 8),
    "w @ x of rank 3": Product(lambda x, w: w @ x.flatten(2), 7, 3),
    "mm": Product(lambda x, w: torch.mm(x.flatten(1), w), 192, 7),
    "addmm": Product(lambda x, w: torch.addmm(w[0, :], x.flatten(1), w[1:]), 193, 7),
    "bmm": Product(lambda x, w: torch.bmm(x.flatten(1)[None], w)[0], 1, 192, 7),
    "einsum, one label": Product(lambda x, w: torch.einsum("nchw,wd->nchd", x, w), 8, 7),
    "einsum, middle label, weight first": Product(lambda x, w: torch.einsum("dc,nchw->ndhw", w, x), 7, 3),
    "einsum, two summed, two made": Product(lambda x, w: torch.einsum("nchw,wahb->nbca", x, w), 8, 2, 8, 3),
    "einsum, none made": Product(lambda x, w: torch.einsum("nchw,w->nch", x, w), 8),
    "einsum, implicit": Product(lambda x, w: torch.einsum("bhic,ij", x.permute(0, 1, 3, 2), w), 8, 7),
    "tensordot": Product(lambda x, w: torch.tensordot(x, w, dims=([1, 3], [2, 0])), 8, 7, 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_product_with_a_stored_matrix_is_a_linear_layer(name: str) -> None:
    net = LINEAR[name].eval()
    network = trace(net, SPEC, "toy")
    torch.testing.assert_close(network(images(3)), net(images(3)), rtol=1e-5, atol=1e-5)
    (layer,) = edit.layers(network)
    assert layer.target is aten.linear.default
    left = {node.target for node in network.graph.nodes if node.op == "call_function"} - {aten.linear.default}
    assert not left & {aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.addmm.default}
    value = layer.meta["val"]
    assert value.shape[-1] == edit.tensor_of(network, layer.args[1]).shape[0]


def test_a_contraction_of_two_values_is_a_product_of_matrices() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("nchw,nchv->nwv", x, x)
            return torch.einsum("nab,nca->ncb", y, y).flatten(1)[:, :5]

    network = trace(Values().eval(), SPEC, "toy")
    torch.testing.assert_close(network(images(3)), Values()(images(3)), rtol=1e-5, atol=1e-5)
    targets = [node.target for node in network.graph.nodes]
    assert targets.count(aten.matmul.default) == 2
    assert aten.einsum.default not in targets


@pytest.mark.parametrize("equation", ["ii,ij->ij", "ab,bc,cd->ad", "...a,ab->...b", "ab,cd->abcd", "abx,bc->ac"])
def test_other_sums_are_left_alone(equation: str) -> None:
    assert Labels.read(equation) is None


def test_labels_by_hand() -> None:
    assert Labels.read("bhid, bhjd -> bhij") == Labels(batch="bh", left="i", right="j", summed="d", kept="bhij")
    assert Labels.read("ib,bc") == Labels(batch="", left="i", right="c", summed="b", kept="ci")

import torch
from torch import nn
from toys import Branchy, ConvHead, Plain, SharedLayer, graph, images

from zsq.graph import edit


def test_layers_come_in_order_and_only_with_stored_weights() -> None:
    network = graph(Branchy)
    weights = [str(node.args[1].target) for node in edit.layers(network)]
    assert weights == [f"{name}.weight" for name in ("stem", "down", "left", "right", "head")]
    assert len(list(edit.layers(graph(SharedLayer)))) == 3


def test_copy_is_independent() -> None:
    network = graph(Plain)
    wanted = network(images())
    copied = edit.copy_network(network)
    copied.head.weight.data.zero_()
    assert torch.equal(network(images()), wanted)
    assert not torch.equal(copied(images()), wanted)


def test_set_tensor_makes_parameters_and_buffers() -> None:
    network = graph(Plain)
    edit.set_tensor(network, "head.weight", torch.zeros(5, 8), trainable=True)
    edit.set_tensor(network, "new.place.value", torch.ones(2))
    assert network.head.weight.requires_grad
    assert "new.place.value" in dict(network.named_buffers())
    assert torch.equal(network(images(2)), network.head.bias.expand(2, 5))


def test_finish_forgets_what_is_not_read() -> None:
    network = graph(Plain)
    edit.set_tensor(network, "unused", torch.ones(2))
    assert "unused" not in edit.finish(network).state_dict()
    assert "head.weight" in network.state_dict()


def test_classifier_weight() -> None:
    linear = graph(Plain)
    assert torch.equal(edit.classifier_weight(linear, 5), linear.head.weight)
    convolution = graph(ConvHead)
    assert torch.equal(edit.classifier_weight(convolution, 5), convolution.head.weight.flatten(1))
    assert edit.classifier_weight(graph(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5))), 7) is None

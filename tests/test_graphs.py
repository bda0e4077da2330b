import torch
from torch import nn
from toys import Branchy, ConvHead, Plain, SharedLayer, graph, images

from zsq import graphs


def test_layers_come_in_order_and_only_with_stored_weights() -> None:
    network = graph(Branchy)
    weights = [str(node.args[1].target) for node in graphs.layers(network)]
    assert weights == [f"{name}.weight" for name in ("stem", "down", "left", "right", "head")]
    assert len(list(graphs.layers(graph(SharedLayer)))) == 3


def test_copy_is_independent() -> None:
    network = graph(Plain)
    wanted = network(images())
    copied = graphs.copy_network(network)
    copied.head.weight.data.zero_()
    assert torch.equal(network(images()), wanted)
    assert not torch.equal(copied(images()), wanted)


def test_set_tensor_makes_parameters_and_buffers() -> None:
    network = graph(Plain)
    graphs.set_tensor(network, "head.weight", torch.zeros(5, 8), trainable=True)
    graphs.set_tensor(network, "new.place.value", torch.ones(2))
    assert network.head.weight.requires_grad
    assert "new.place.value" in dict(network.named_buffers())
    assert torch.equal(network(images(2)), network.head.bias.expand(2, 5))


def test_finish_forgets_what_is_not_read() -> None:
    network = graph(Plain)
    graphs.set_tensor(network, "unused", torch.ones(2))
    assert "unused" not in graphs.finish(network).state_dict()
    assert "head.weight" in network.state_dict()


def test_classifier_weight() -> None:
    linear = graph(Plain)
    assert torch.equal(graphs.classifier_weight(linear, 5), linear.head.weight)
    convolution = graph(ConvHead)
    assert torch.equal(graphs.classifier_weight(convolution, 5), convolution.head.weight.flatten(1))
    assert graphs.classifier_weight(graph(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5))), 7) is None

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Branchy, Plain, SharedLayer, graph, images

from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.models.teacher import load_teacher
from zsq.quantization.sensitivity import pareto_frontier, sensitivities, weight_sizes
from zsq.targets import TARGETS
from zsq.training.losses import kl_divergence

CASES = st.lists(
    st.tuples(
        st.integers(1, 9),  # values of the weight
        st.dictionaries(st.sampled_from([2, 3, 4, 8]), st.integers(0, 12).map(lambda n: n / 8), min_size=1),
    ),
    min_size=1,
    max_size=4,
)


def tables(case):
    names = [f"w{i}" for i in range(len(case))]
    return {n: table for n, (_, table) in zip(names, case, strict=True)}, dict(
        zip(names, (size for size, _ in case), strict=True)
    )


def everything(found, sizes):
    """Bits and summed sensitivity of every allocation there is."""
    for widths in itertools.product(*(table for table in found.values())):
        pairs = list(zip(found, widths, strict=True))
        yield sum(sizes[n] * w for n, w in pairs), sum(found[n][w] for n, w in pairs)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(CASES)
def test_the_frontier_is_what_brute_force_finds(case):
    found, sizes = tables(case)
    points = set(everything(found, sizes))
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    frontier = pareto_frontier(found, sizes)
    assert list(zip(frontier.bits.tolist(), frontier.sensitivity.tolist(), strict=True)) == sorted(best)
    assert frontier.exact
    for index in range(len(frontier)):
        point = frontier.allocation(index)
        assert list(point.widths) == list(found)
        assert sum(sizes[n] * w for n, w in point.widths.items()) == point.bits == frontier.bits[index]
        assert sum(found[n][w] for n, w in point.widths.items()) == point.sensitivity


@settings(max_examples=50, deadline=None, derandomize=True)
@given(CASES, st.integers(0, 250))
def test_within_is_the_least_sensitive_that_fits(case, most):
    found, sizes = tables(case)
    fitting = [cost for bits, cost in everything(found, sizes) if bits <= most]
    frontier = pareto_frontier(found, sizes)
    if not fitting:
        with pytest.raises(InputError, match=f"at least {frontier.bits[0]} bits; {most} are allowed"):
            frontier.within(most)
        return
    assert frontier.sensitivity[frontier.within(most)] == min(fitting)


def test_a_frontier_cut_into_steps_stays_near_the_exact_one():
    random = np.random.default_rng(0)
    sizes = {f"w{i}": int(random.integers(100, 10_000)) for i in range(12)}
    found = {name: {bits: float(random.uniform(0.5, 2) * 4.0**-bits) for bits in (2, 4, 6, 8)} for name in sizes}
    exact, cut = pareto_frontier(found, sizes), pareto_frontier(found, sizes, most_points=200)
    assert exact.exact
    assert not cut.exact
    assert len(cut) <= 201 < len(exact)
    assert (np.diff(cut.bits) > 0).all()
    assert (np.diff(cut.sensitivity) < 0).all()
    assert cut.bits[0] == exact.bits[0]
    for average in (3, 4, 5):
        most = average * cut.num_weights
        point = cut.allocation(cut.within(most))
        assert sum(sizes[n] * w for n, w in point.widths.items()) == point.bits <= most
        step = (exact.bits[-1] - exact.bits[0]) / 199  # each of the weights may have moved the point by one
        assert point.sensitivity <= exact.sensitivity[exact.within(most - len(sizes) * step)]


def test_an_index_from_the_end_and_one_outside():
    frontier = pareto_frontier({"w": {2: 1.0, 4: 0.5, 8: 0.5}}, {"w": 10})
    assert frontier.bits.tolist() == [20, 40]  # 8 bits are larger and no better
    assert frontier.allocation(-1).widths == {"w": 4}
    with pytest.raises(IndexError):
        frontier.allocation(2)


def test_pairs_that_could_saturate_count_where_the_target_keeps_them():
    """Weights of one sign lose up to half of their resolution, at 8 bits of both alone."""
    network, x = graph(Plain), images(100)
    with torch.no_grad():
        network.get_parameter("second.weight").abs_().clamp_(min=0.07)
    free = sensitivities(network, x, (4, 8), target=TARGETS["tensorrt"])
    kept = sensitivities(network, x, (4, 8))
    narrow = sensitivities(network, x, (4, 8), activation_bits=7)
    assert kept["second.weight"][8] > free["second.weight"][8]
    assert kept["second.weight"][4] == free["second.weight"][4]
    assert narrow == free


def test_a_weight_of_zeros_has_no_sensitivity():
    network = graph(Branchy)
    with torch.no_grad():
        network.get_parameter("left.weight").zero_()
    found = sensitivities(network, images(20), (2, 8))
    assert found["left.weight"] == {2: 0.0, 8: 0.0}
    assert found["right.weight"][2] > found["right.weight"][8] > 0


def test_sensitivity_is_the_divergence_with_one_weight_rounded():
    network, x = graph(Plain), images(100)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = sensitivities(network, x, (4,), per_channel=False)
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert found == sensitivities(network, x, (4,), per_channel=False)
    changed = graph(Plain)
    with torch.no_grad():
        weight = changed.get_parameter("head.weight")
        scale = weight.abs().max() * 2 / 15
        weight.copy_((weight / scale).round().clamp(-8, 7) * scale)
        expected = kl_divergence(network(x), changed(x)).item()
    assert found["head.weight"][4] == pytest.approx(expected, rel=1e-4)


def test_digits_need_fewer_bits_the_wider_a_weight_is():
    teacher = load_teacher("digits")
    x = next(iter(open_dataset("digits:train", teacher.spec).batches())).images[:64]
    found = sensitivities(teacher.network, x, (2, 4, 8))
    stored = dict(teacher.network.named_parameters())
    assert (
        {name for name, value in stored.items() if value.dim() > 1} == set(found) == set(weight_sizes(teacher.network))
    )
    assert all(costs[2] > costs[4] > costs[8] >= 0 for costs in found.values())
    with pytest.raises(InputError, match="no image"):
        sensitivities(teacher.network, x[:0], (4,))


def test_a_shared_weight_counts_for_each_layer_that_stores_it():
    sizes = weight_sizes(graph(SharedLayer))
    assert sizes == {"conv.weight": 2 * 81, "head.weight": 15}
    assert set(sensitivities(graph(SharedLayer), images(4), (4,))) == set(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cifar10.py:cifar10_resnet20", "mobilenet_v1.py:mobilenet_v1_025"])
def test_names_are_those_of_the_weights_file(model):
    path = Path(__file__).parents[2] / "examples" / model
    teacher = load_teacher(str(path), weights="random")
    stored = {name: value.numel() for name, value in teacher.network.named_parameters() if value.dim() > 1}
    assert weight_sizes(teacher.network) == stored
    assert "layer1.0.conv1.weight" in stored or "blocks.0.depthwise.conv.weight" in stored

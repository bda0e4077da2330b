"""The check of a file against saturating products, judged by arithmetic that saturates."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from zsq.errors import ExportError
from zsq.export.saturation import filters, may_saturate, saturating_layers
from zsq.export.verify import Verification, require


def saturating_dot(activations, weights):
    """Multiply uint8 [K] by int8 [K] as `vpmaddubsw` does: products of neighbours are summed in int16."""
    products = (activations.astype(np.int64) * weights.astype(np.int64)).reshape(-1, 2).sum(1)
    return int(products.clip(-(2**15), 2**15 - 1).sum())


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), most=st.integers(20, 127), largest=st.sampled_from([255, 127, 15]))
def test_what_passes_is_exact_and_what_does_not_has_an_input_on_which_it_is_not(seed, most, largest):
    random = np.random.default_rng(seed)
    weights = random.integers(-most, most, 8, endpoint=True)
    worst = [np.where(weights > 0, largest, 0), np.where(weights < 0, largest, 0)]
    tried = [*worst, *random.integers(0, largest, (20, 8), endpoint=True)]
    exact = all(saturating_dot(x, weights) == int(x @ weights) for x in tried)
    assert exact is not may_saturate([weights[None]], largest)


def named(path, kind, weight, *, clip=None, **attributes):
    """Return what is said of a file of one layer whose input is uint8 and whose weight is int8."""
    x = "clipped" if clip else "integers"
    nodes = [helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["integers"])]
    if clip:
        nodes.append(helper.make_node("Clip", ["integers", "low", "high"], ["clipped"]))
    nodes += [
        helper.make_node("DequantizeLinear", [x, "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"]),
        helper.make_node(kind, ["x", "w"], ["logits"], name="layer", **attributes),
    ]
    tensors = {
        "scale": np.float32(1),
        "zero": np.uint8(0),
        "low": np.uint8(0),
        "high": np.uint8(clip or 0),
        "weight": np.asarray(weight, np.int8),
    }
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("images", "logits")]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "test", ends[:1], ends[1:], stored)), path)
    return saturating_layers(path)


@pytest.mark.parametrize(
    ("kind", "weight", "attributes", "saturates"),
    [
        ("Gemm", [[100, 29]], {"transB": 1}, True),
        ("Gemm", [[100, 28]], {"transB": 1}, False),
        ("Gemm", [[100], [29]], {}, True),
        ("Gemm", [[100, 29]], {}, False),
        ("MatMul", [[100], [29]], {}, True),
        ("MatMul", [[-100], [-29]], {}, True),
        ("MatMul", [[-100], [29]], {}, False),
        ("Conv", [[[[100]], [[29]]]], {}, True),
        ("Conv", [[[[100, 0]], [[0, 29]]]], {}, False),
        ("Conv", [[[[100, 29]]]], {}, True),  # one channel: positions are neighbours
        ("Conv", [[[[100, 29]]], [[[100, 29]]]], {"group": 2}, False),  # depthwise
        ("Conv", [[[[0, 29]], [[0, 0]], [[100, 0]]]], {}, True),  # three channels: on to the next position
    ],
)
def test_layers_that_saturate_are_named(kind, weight, attributes, saturates, tmp_path):
    assert named(tmp_path / "model.onnx", kind, weight, **attributes) == (("layer",) if saturates else ())


def test_a_weight_that_is_transposed_in_the_file_is_judged(tmp_path):
    for weight, expected in (([[100, 29]], ("layer",)), ([[100, 28]], ())):
        named(tmp_path / "model.onnx", "MatMul", weight)
        model = onnx.load(tmp_path / "model.onnx")
        place = next(i for i, node in enumerate(model.graph.node) if node.name == "layer")
        model.graph.node[place].input[1] = "turned"
        model.graph.node.insert(place, helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]))
        onnx.save(model, tmp_path / "model.onnx")
        assert saturating_layers(tmp_path / "model.onnx") == expected


def test_narrow_activations_cannot_saturate(tmp_path):
    assert named(tmp_path / "model.onnx", "Gemm", [[127, 127]], transB=1) == ("layer",)
    assert named(tmp_path / "model.onnx", "Gemm", [[127, 127]], clip=127, transB=1) == ()


def test_padded_and_unpadded_orders_are_judged():
    weight = np.arange(6).reshape(1, 3, 2)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    flat, padded = filters(node, weight)
    assert flat.tolist() == [[0, 2, 4, 1, 3, 5]]
    assert padded.tolist() == [[0, 2, 4, 0, 1, 3, 5, 0]]


def test_a_file_that_saturates_elsewhere_is_refused():
    fine = {
        "num_images": 9,
        "num_decided": 9,
        "decided_agreement": 100.0,
        "agreement_literal": 100.0,
        "agreement_optimized": 100.0,
        "max_logit_difference_steps": 0.0,
        "decided_agreement_optimized": 100.0,
    }
    require(Verification(**fine))
    with pytest.raises(ExportError, match="without VNNI"):
        require(Verification(**fine, saturating_layers=("Conv_1",)))

"""The contract of targets: any network, every width that the file can hold, agreement with the simulation."""

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from toys import SPEC, Branchy, ConvHead, Grouped, Mobile, Plain, PreActivated, Tokens, graph, images, quantized

from zsq import Noise, load_teacher
from zsq.data.datasets import open_dataset
from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.evaluation.accuracy import evaluate
from zsq.export.converted import output_step
from zsq.export.files import open_file, profile_file, write_file
from zsq.export.onnx import write_onnx
from zsq.export.openvino import OpenVinoClassifier
from zsq.export.profile import Profile
from zsq.export.tensorrt_rules import RULES, broken_rules
from zsq.export.verify import Verification, require, verify_file
from zsq.quantization import PTQ, QAT
from zsq.quantization.convert import convert
from zsq.quantization.prepare import prepared_layers
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, quantizers
from zsq.targets import TARGETS, target_of
from zsq.training.loop import Run
from zsq.types import Batch

EXAMPLES = Path(__file__).parents[1] / "examples"

WIDTHS = ("8", "6", "W4A8", "4")
NETWORKS = (Plain, Branchy, ConvHead, PreActivated, Mobile, Grouped, Tokens)

held = [(name, bits) for name in TARGETS for bits in WIDTHS if int(bits[-1]) in TARGETS[name].activation_bits]
refused = [(name, bits) for name in TARGETS for bits in WIDTHS if int(bits[-1]) not in TARGETS[name].activation_bits]


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize(("name", "bits"), held)
def test_a_file_computes_what_was_simulated(name, bits, make, tmp_path):
    target = target_of(name)
    pytest.importorskip(target.runs_in, reason=f"target {name} runs its file in it")
    student = quantized(graph(make), PTQ(bits=bits, target=name))
    converted, path = convert(student), tmp_path / target.file
    write_file(converted, SPEC, path, target, notes={"target": name})
    x = images(300, seed=5)
    found = verify_file(path, student, x.split(100), output_step(converted), threads=1, target=target)
    require(found)
    assert (found.agreement_target is None) == (target.runs_in == "onnxruntime")
    assert found.saturating_layers == found.broken_rules == ()
    if bits == "8" and make in (Plain, Mobile):
        check_profile(profile_file(path, target, x[:1]), len(prepared_layers(student.network)))


def check_profile(found: Profile, num_layers: int) -> None:
    """Check that a runtime says of itself that it computes all layers in integers."""
    layers = [
        kernels
        for kernels in found.kernels
        if re.search("conv(?!ert)|gemm|fully_?connected|matmul", kernels.name, re.I)
    ]
    assert {kernels.computes for kernels in layers} == {"integers"}
    assert sum(kernels.count for kernels in layers) == num_layers
    assert found.num_kernels() == found.num_kernels("integers", "float", "conversion", "other")
    if found.milliseconds is None:
        assert found.runtime in ("LiteRT", "ExecuTorch", "TensorRT")
    else:
        assert found.share("integers", "float", "conversion", "other") == pytest.approx(100)
        assert found.num_kernels() < found.num_operators


@pytest.mark.parametrize(("name", "bits"), refused)
def test_widths_that_a_file_cannot_hold_are_refused_in_a_sentence(name, bits):
    with pytest.raises(InputError, match=rf"bits is '{bits}', and files for {TARGETS[name].title} hold .* W\dA8\.$"):
        PTQ(bits=bits, target=name)


def test_settings_that_a_file_cannot_hold_are_refused_before_anything_is_fitted():
    with pytest.raises(InputError, match="first_last_bits is 4, and files for TensorRT hold activations of 8 bits"):
        PTQ(target="tensorrt", first_last_bits=4)
    with pytest.raises(InputError, match="activation_scope is 'layers', and files for TensorRT quantize every"):
        PTQ(target="tensorrt", activation_scope="layers")


def test_a_batch_that_no_file_can_take_is_said():
    with pytest.raises(InputError, match=r"quantizer.batch is 0; it must be at least 1"):
        PTQ(batch=0)


def test_an_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'tensorrt'"):
        target_of("tensorr")


def test_tensorrt_gets_symmetric_grids_and_float_biases(tmp_path):
    student = quantized(graph(Branchy), PTQ(target="tensorrt"))
    found = quantizers(student)
    assert all(q.zero_point.abs().max() == 0 for q in found)
    assert {q.quant_min for q in found if isinstance(q, WeightQuantizer)} == {-127}
    converted = convert(student)
    values = dict(converted.named_buffers())
    assert {value.dtype for name, value in values.items() if name.endswith("weight")} == {torch.int8}
    assert {value.dtype for name, value in values.items() if name.endswith("bias")} == {torch.float32}
    assert not any(value.dtype == torch.int32 for value in values.values())
    write_onnx(converted, SPEC, tmp_path / "model.onnx", TARGETS["tensorrt"])
    assert broken_rules(tmp_path / "model.onnx") == ()


def test_files_for_onnx_runtime_break_tensorrts_rules(tmp_path):
    write_onnx(convert(quantized(graph(Branchy), PTQ())), SPEC, tmp_path / "model.onnx")
    found = broken_rules(tmp_path / "model.onnx")
    assert [text.partition(":")[0] for text in found[:3]] == list(RULES)[:3]


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_distillation_keeps_the_grids_of_tensorrt(scales, tmp_path):
    settings = QAT(target="tensorrt", steps=3, scales=scales)
    teacher = graph(Branchy)
    student = quantized(teacher, settings, learnable=scales == "learnable")
    before = [q.scale.detach().clone() for q in quantizers(student)]

    class Source:
        true_labels, data_free, asks_labels = False, True, False

        def sample(self, count, batch_size=100, name="sample"):
            yield Batch(images(32), torch.zeros(32, dtype=torch.int64))

        def batch(self, step, student):
            return next(self.sample(32))

    learner = Distiller(student, teacher, Source(), settings, torch.device("cpu"))
    for step in range(3):
        learner.step(step)
    found = quantizers(student)
    assert any(not torch.equal(q.scale, scale) for q, scale in zip(found, before, strict=True))
    assert all(q.zero_point.abs().max() == 0 for q in found if isinstance(q, ActivationQuantizer))


def save(path, nodes, tensors):
    """Write a file of these nodes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("images", "logits")]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "test", ends[:1], ends[1:], stored)), path)
    return path


def layer_nodes():
    """Return the nodes of a layer and of a residual addition that TensorRT takes, by their names."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["images", "scale", "zero"], ["q"], name="quantize"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["x"], name="dequantize"),
        node("DequantizeLinear", ["weight", "scale", "zero"], ["w"], name="weight"),
        node("Gemm", ["x", "w", "bias"], ["y"], name="layer"),
        node("QuantizeLinear", ["y", "scale", "zero"], ["yq"], name="quantize_2"),
        node("DequantizeLinear", ["yq", "scale", "zero"], ["yd"], name="dequantize_2"),
        node("Add", ["x", "yd"], ["logits"], name="sum"),
    ]
    return {each.name: each for each in nodes}


TENSORS = {
    "scale": np.float32(1),
    "zero": np.int8(0),
    "weight": np.array([[127, -127], [1, 2]], np.int8),
    "bias": np.zeros(2, np.float32),
}


def reread(nodes, name, slot, value):
    nodes[name].input[slot] = value


BROKEN = {
    "zero points must be 0": lambda nodes, tensors: tensors.update(zero=np.int8(3)),
    "activations must be int8": lambda nodes, tensors: tensors.update(zero=np.uint8(0)),
    "stored integers must be int8, and biases float": lambda nodes, tensors: tensors.update(
        weight=np.array([[1, 2], [3, 4]], np.int32)
    ),
    "nothing may compute on integers but a DequantizeLinear": lambda nodes, tensors: (
        nodes.update(clip=helper.make_node("Clip", ["q", "", "zero"], ["clipped"], name="clip")),
        reread(nodes, "dequantize", 0, "clipped"),
    ),
    "weights must lie in [-127, 127]": lambda nodes, tensors: tensors.update(
        weight=np.array([[-128, 2], [3, 4]], np.int8)
    ),
    "a layer's input and weight must both be dequantized": lambda nodes, tensors: reread(nodes, "layer", 0, "images"),
    "both branches of a residual addition must be dequantized": lambda nodes, tensors: reread(nodes, "sum", 1, "y"),
    "activations must have one scale": lambda nodes, tensors: (
        tensors.update(scales=np.ones(2, np.float32)),
        reread(nodes, "quantize", 1, "scales"),
    ),
}


def test_what_tensorrt_takes_breaks_no_rule(tmp_path):
    assert broken_rules(save(tmp_path / "model.onnx", layer_nodes().values(), TENSORS)) == ()
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_is_found_broken_and_no_other(rule, tmp_path):
    nodes, tensors = layer_nodes(), dict(TENSORS)
    BROKEN[rule](nodes, tensors)
    found = broken_rules(save(tmp_path / "model.onnx", nodes.values(), tensors))
    assert [text.partition(": ")[0] for text in found] == [rule]


def test_a_file_that_breaks_a_rule_is_refused():
    found = Verification(
        9, 9, 100.0, 100.0, 100.0, 0.0, 100.0, broken_rules=("zero points must be 0: QuantizeLinear_1",)
    )
    with pytest.raises(ExportError, match="its target takes no such file: zero points must be 0: QuantizeLinear_1"):
        require(found)


def test_a_file_that_its_own_runtime_computes_otherwise_is_refused():
    fine = {"agreement_target": 100.0, "decided_agreement_target": 100.0, "distance_target_steps": 0.1}
    require(Verification(90, 90, 100.0, 100.0, 100.0, 0.0, 100.0, **fine))
    for change in ({"decided_agreement_target": 90.0}, {"distance_target_steps": 5.0}):
        with pytest.raises(ExportError, match="run by its target"):
            require(Verification(90, 90, 100.0, 100.0, 100.0, 0.0, 100.0, **fine | change))


def test_openvino_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zsq\[openvino\]'"):
        OpenVinoClassifier(tmp_path / "model.onnx")


def test_openvino_says_what_it_cannot_read(tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match="no such file"):
        OpenVinoClassifier(tmp_path / "none.onnx")
    write_onnx(convert(quantized(graph(Branchy), PTQ())), SPEC, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"images are \[1, 3, 9, 9\]; the file takes \['batch', 3, 8, 8\]"):
        OpenVinoClassifier(tmp_path / "model.onnx")(torch.zeros(1, 3, 9, 9))
    (tmp_path / "broken.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="OpenVINO cannot compile it"):
        OpenVinoClassifier(tmp_path / "broken.onnx")


@pytest.mark.slow
def test_openvino_adds_before_it_rounds():
    """A branch of a residual addition that a layer gives is not rounded; the other one, and the sum, are."""
    counts = {
        name: sum(isinstance(q, ActivationQuantizer) for q in quantizers(quantized(graph(Branchy), PTQ(target=name))))
        for name in TARGETS
    }
    assert counts.pop("openvino") == counts["onnxruntime"] - 1
    assert len(set(counts.values())) == 1


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "bits"), [("openvino", "4"), ("litert", "4"), ("executorch", "8"), ("tensorrt", "W4A8")]
)
def test_a_real_residual_network_runs_as_simulated_by_its_target(name, bits, real_data, tmp_path):
    pytest.importorskip(TARGETS[name].runs_in, reason=f"target {name} runs its file in it")
    teacher = load_teacher(
        str(EXAMPLES / "cifar10.py:cifar10_resnet20"), weights=real_data / "weights" / "cifar10_resnet20.safetensors"
    )
    data = open_dataset(str(real_data / "cifar10" / "test.npz"), teacher.spec, limit=200)
    source = Noise(distribution="natural").fit(teacher, Run()).source
    student = quantize_ptq(teacher.network, lambda: source.sample(100), PTQ(bits=bits, target=name), Run())
    converted, target = convert(student), target_of(name)
    path = tmp_path / target.file
    write_file(converted, teacher.spec, path, target)
    batches = [batch.images for batch in data.batches()]
    found = verify_file(path, student, batches, output_step(converted), threads=1, target=target)
    require(found)
    if target.runs_in != "onnxruntime":
        assert found.decided_agreement_target == 100
        assert found.distance_target_steps < 0.5
    assert evaluate(open_file(path, threads=1), data, teacher=teacher.network).teacher_agreement > 85

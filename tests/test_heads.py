"""Networks that give something else than one vector of logits go all the way: every method, quantizer and target."""

from importlib.util import find_spec

import numpy as np
import onnxruntime
import pytest
import torch

import zsq
from tests.heads import NETWORKS, spec_of
from zsq.export.converted import output_step, packed
from zsq.export.files import open_file, write_file
from zsq.export.verify import require, verify_file
from zsq.models.teacher import Teacher, teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.sensitivity import sensitivities
from zsq.targets import TARGETS
from zsq.training.loop import Run
from zsq.types import Batch

QUICK = {"method.steps": 3, "method.batch_size": 8, "quantizer.num_samples": 16}

RUN_HERE = [
    name
    for name, target in TARGETS.items()
    if target.runs_in in (None, "onnxruntime") or find_spec(target.runs_in or "")
]


def noise(teacher: Teacher, count: int) -> torch.Tensor:
    return torch.randn(count, *teacher.spec.shape, generator=torch.Generator().manual_seed(3))


def calibrated(teacher: Teacher, **settings) -> Student:
    batch = Batch(noise(teacher, 32), torch.zeros(32, dtype=torch.int64))
    return quantize_ptq(teacher.network, lambda: iter([batch]), PTQ(num_samples=32, **settings), Run()).eval()


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_for_each_target(tmp_path, name, target) -> None:
    teacher = teacher_from_module(NETWORKS[name](), spec_of(name))
    student, spec, kind = calibrated(teacher, target=target), teacher.spec, TARGETS[target]
    converted, path, images = convert(student), tmp_path / kind.file, noise(teacher, 20)
    if name == "volumes" and target in ("litert", "executorch"):
        with pytest.raises(zsq.ExportError, match=r"no (LiteRT|ExecuTorch) form: .*(computes conv3d|3-D convolution)"):
            write_file(converted, spec, path, kind)
        return
    write_file(converted, spec, path, kind)
    assert packed(converted)(images).shape == student(images).shape
    step = output_step(converted, spec.outputs)
    found = verify_file(path, student, [images], step, outputs=spec.outputs, threads=1, target=kind)
    require(found)
    assert found.by_distance == (spec.classes == 0)
    assert open_file(path).spec == spec


def test_an_onnx_file_names_its_outputs(tmp_path) -> None:
    teacher = teacher_from_module(NETWORKS["detector"](), spec_of("detector"))
    path = tmp_path / "model.onnx"
    write_file(convert(calibrated(teacher)), teacher.spec, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape[1:]) for value in session.get_outputs()] == [
        ("heat", [4, 8, 8]),
        ("size", [2, 8, 8]),
    ]
    images = noise(teacher, 3)
    heat, size = session.run(None, {"images": images.numpy()})
    rows = np.concatenate([heat.reshape(3, -1), size.reshape(3, -1)], axis=1)
    assert np.array_equal(open_file(path)(images).numpy(), rows)


def test_a_file_with_a_changed_output_is_refused(tmp_path) -> None:
    teacher = teacher_from_module(NETWORKS["detector"](), spec_of("detector"))
    student = calibrated(teacher)
    converted, path = convert(student), tmp_path / "model.onnx"
    write_file(converted, teacher.spec, path)
    step, outputs = output_step(converted, teacher.spec.outputs), teacher.spec.outputs

    def other(images: torch.Tensor) -> torch.Tensor:
        answers = student(images).clone()
        answers[:, -64:] *= 1.5
        return answers

    with pytest.raises(zsq.ExportError, match="it computes something else"):
        require(verify_file(path, other, [noise(teacher, 20)], step, outputs=outputs, threads=1))


METHODS = ["adversarial", "zeroq", "deepinversion", "knowledge-within", "spectral", "noise", "dfq"]
ON_OTHER_AXES = ["zeroq", "spectral", "noise", "dfq"]
"""Those that differ in their draws and filters; the others share these, or the generator."""


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ("segmenter", "embedder", "detector") for method in METHODS]
    + [(name, method) for name in ("signals", "volumes") for method in ON_OTHER_AXES],
)
@pytest.mark.slow
def test_every_method(tmp_path, name, method) -> None:
    qat = "qat" in zsq.METHODS[method].quantizers
    made = {key: value for key, value in QUICK.items() if not (method == "dfq" and key.startswith("method"))}
    made |= {"quantizer.steps": 2} if qat else {}
    if method == "noise":
        del made["method.steps"]
    result = zsq.quantize(
        NETWORKS[name](),
        spec_of(name),
        method=method,
        quantizer="qat" if qat else "ptq",
        bits=6,
        settings=made,
        out=tmp_path / "run",
        quiet=True,
    )
    record = zsq.Record.read(tmp_path / "run")
    assert record.verification.by_distance == (name in ("embedder", "detector"))
    if record.samples is not None and name != "signals":
        dense = {"same class", "mean IoU"}
        names = {"segmenter": dense, "volumes": dense, "embedder": {"cosine"}, "detector": {"relative error"}}
        assert {measure.name for measure in record.samples.measures} == names[name]
    assert result.record.evaluation == {}


@pytest.mark.parametrize("name", ["segmenter", "embedder", "detector"])
def test_sensitivities_by_kind(name) -> None:
    teacher = teacher_from_module(NETWORKS[name](), spec_of(name))
    found = sensitivities(teacher.network, noise(teacher, 16), [2, 8])
    assert all(widths[2] > widths[8] >= 0 for widths in found.values())

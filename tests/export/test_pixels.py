"""Files that take pixels: the same logits as those that take normalised images, in both layouts and runtimes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from toys import Branchy, graph, images, quantized

from zsq.errors import InputError
from zsq.export.converted import output_step
from zsq.export.image_spec import notes_of
from zsq.export.onnx import write_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.openvino import OpenVinoClassifier
from zsq.export.options import FileOptions
from zsq.export.pixels import as_pixels, fed, layout_in
from zsq.export.verify import require, verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.targets import TARGETS
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PIXELS = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def student():
    return quantized(graph(Branchy), PTQ())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_pixels_give_the_logits_of_normalised_images(layout, target, tmp_path):
    converted = convert(quantized(graph(Branchy), PTQ(target=target)))
    plain, folded = tmp_path / "plain.onnx", tmp_path / "folded.onnx"
    write_onnx(converted, SPEC, plain, TARGETS[target])
    write_onnx(converted, SPEC, folded, TARGETS[target], options=FileOptions(pixels=layout))
    normalised = SPEC.normalize(PIXELS.permute(0, 3, 1, 2).float() / 255)
    expected = OnnxClassifier(plain, threads=1)(normalised)
    session = onnxruntime.InferenceSession(str(folded), providers=["CPUExecutionProvider"])
    array = PIXELS if layout == "nhwc" else PIXELS.permute(0, 3, 1, 2)
    (found,) = session.run(None, {"pixels": np.ascontiguousarray(array.numpy())})
    assert np.array_equal(found, expected.numpy())
    assert torch.equal(OnnxClassifier(folded, threads=1)(normalised), expected)


def test_pixels_survive_the_way_to_images_and_back():
    normalised = SPEC.normalize(PIXELS.permute(0, 3, 1, 2).float() / 255)
    assert np.array_equal(fed(normalised, SPEC, "nhwc"), PIXELS.numpy())
    assert np.array_equal(fed(normalised, SPEC, "nchw"), PIXELS.permute(0, 3, 1, 2).numpy())
    assert torch.equal(as_pixels(normalised, SPEC), normalised)


def test_a_file_that_takes_pixels_is_checked_on_what_it_sees(student, tmp_path):
    """Images between two pixels, or beyond them, are what the simulation gets otherwise."""
    path, converted = tmp_path / "model.onnx", convert(student)
    write_onnx(converted, SPEC, path, options=FileOptions(pixels="nhwc"))
    seen = []

    def simulate(x):
        seen.append(x)
        return student(x)

    found = verify_file(path, simulate, [3 * images(100)], output_step(converted), threads=1)
    require(found)
    assert found.agreement_optimized == 100
    assert torch.equal(seen[0], as_pixels(seen[0], SPEC))


@pytest.mark.slow
def test_the_input_says_what_it_is(student, tmp_path):
    for layout, shape in (("nchw", [3, 8, 8]), ("nhwc", [8, 8, 3])):
        path = tmp_path / f"{layout}.onnx"
        write_onnx(convert(student), SPEC, path, options=FileOptions(pixels=layout))
        (taken,) = onnx.load(path).graph.input
        assert taken.name == "pixels"
        assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert [size.dim_value for size in taken.type.tensor_type.shape.dim][1:] == shape
        assert layout_in(notes_of(path)) == layout
        assert OnnxClassifier(path).spec == SPEC
        with pytest.raises(InputError, match=r"the file takes \['batch', 3, 8, 8\]"):
            OnnxClassifier(path)(torch.zeros(1, 3, 9, 9))


def test_a_file_that_takes_images_says_nothing_of_pixels(files: Path):
    assert layout_in(notes_of(files / "8.onnx")) is None


@pytest.mark.slow
def test_openvino_takes_pixels(student, tmp_path):
    pytest.importorskip("openvino")
    write_onnx(convert(student), SPEC, tmp_path / "model.onnx", options=FileOptions(pixels="nhwc"))
    normalised = SPEC.normalize(PIXELS.permute(0, 3, 1, 2).float() / 255)
    found, expected = (
        kind(tmp_path / "model.onnx", threads=1)(normalised) for kind in (OpenVinoClassifier, OnnxClassifier)
    )
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95

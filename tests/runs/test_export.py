"""`export`: a finished run's network as another target's file."""

import numpy as np
import pytest
import torch

from zsq import Noise, export_run, quantize
from zsq.cli.main import main
from zsq.data.datasets import open_dataset
from zsq.errors import ExportError, InputError
from zsq.export.files import open_file
from zsq.export.image_spec import notes_of
from zsq.export.pt2 import read_pt2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run at INT8 for ONNX Runtime."""
    out = tmp_path_factory.mktemp("export") / "run"
    quantize("digits", method=Noise(), settings=("quantizer.num_samples=200",), out=out, quiet=True)
    return out


@pytest.fixture(scope="module")
def digits(run):
    """Fifty images of digits, normalised."""
    return next(iter(open_dataset("digits", open_file(run / "model.onnx").spec, limit=50).batches(50))).images


def test_the_same_target_gives_the_same_file(run, tmp_path):
    export_run(run, out=tmp_path / "again.onnx", quiet=True)
    assert (tmp_path / "again.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_a_program_computes_what_the_file_does(run, digits):
    network, spec = read_pt2(run / "model.pt2")
    file = open_file(run / "model.onnx")
    assert spec == file.spec
    with torch.no_grad():
        assert (network(digits).argmax(1) == file(digits).argmax(1)).all()


@pytest.mark.slow
def test_openvino_gets_the_integers_of_the_run(run, digits, tmp_path):
    pytest.importorskip("openvino")
    found = export_run(run, target="openvino", out=tmp_path / "openvino.onnx", data="digits", quiet=True)
    assert found.verification.decided_agreement_target == 100
    assert notes_of(found.path)["target"] == "openvino"
    assert (open_file(found.path)(digits).argmax(1) == open_file(run / "model.onnx")(digits).argmax(1)).all()


@pytest.mark.slow
def test_openvino_gets_an_ir_that_computes_the_same(run, digits, tmp_path):
    pytest.importorskip("openvino")
    export_run(run, target="openvino", out=tmp_path / "model.xml", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    export_run(run, target="openvino", out=tmp_path / "model.onnx", quiet=True)
    file = open_file(tmp_path / "model.xml")
    assert file.spec == open_file(tmp_path / "model.onnx").spec
    assert torch.equal(file(digits), open_file(tmp_path / "model.onnx")(digits))
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(InputError, match="no IR of OpenVINO"):
        open_file(tmp_path / "model.xml")


def test_pixels_and_batch(run, digits, tmp_path):
    found = export_run(run, out=tmp_path / "camera.onnx", pixels="nhwc", batch=3, quiet=True)
    file = open_file(found.path)
    assert file._shape[0] == 3
    assert found.bytes == found.path.stat().st_size
    plain = open_file(run / "model.onnx")
    np.testing.assert_array_equal(file(digits).numpy(), plain(file.seen(digits)).numpy())


def test_what_does_not_suit_a_target_is_refused_and_leaves_nothing(run, tmp_path):
    with pytest.raises(
        ExportError, match=r"do not suit TensorRT.*zero points must be 0.*Quantize again, with target='t"
    ):
        export_run(run, target="tensorrt", out=tmp_path / "model.onnx", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"out": "model.tflite"}, r"out is model.tflite, and files for ONNX Runtime end in .onnx"),
        ({"out": "model.bin", "target": "openvino"}, r"end in .onnx or .xml"),
        ({"out": "model.onnx", "target": "onnx"}, "Unknown target 'onnx'"),
        ({"out": "model.onnx", "packed": True}, "litert can pack"),
        ({"out": "model.onnx", "batch": 0}, "batch is 0"),
        ({"out": "there.onnx"}, "exists; overwrite=True replaces it"),
    ],
)
def test_bad_input_is_said(arguments, text, run, tmp_path):
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(InputError, match=text):
        export_run(run, **arguments | {"out": tmp_path / arguments["out"]}, quiet=True)
    assert (tmp_path / "there.onnx").read_text() == "mine"


def test_the_runs_own_file_stays(run):
    with pytest.raises(InputError, match="the run's own file"):
        export_run(run, out=run / "model.onnx", overwrite=True, quiet=True)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="the run has not finished"):
        export_run(tmp_path, out=tmp_path / "model.onnx", quiet=True)


@pytest.mark.parametrize("damage", ["missing", "text", "foreign"])
def test_a_damaged_program_is_refused(damage, run, tmp_path):
    path = tmp_path / "model.pt2"
    if damage == "text":
        path.write_text("nothing")
    if damage == "foreign":
        torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    with pytest.raises(InputError, match="no such file" if damage == "missing" else "written"):
        read_pt2(path)


@pytest.mark.slow
def test_the_command_prints_what_it_wrote(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "model.onnx")])
    assert "ONNX Runtime" in capsys.readouterr().out
    main(["export", str(run), "--out", str(tmp_path / "two.onnx"), "--json"])
    assert '"target": "onnxruntime"' in capsys.readouterr().out

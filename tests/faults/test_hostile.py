"""Hostile files: lying headers, bombs, things under the wrong name. One expected fault, and bounded memory."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq.data.datasets import open_dataset
from zsq.errors import InputError, TeacherError, ZsqError
from zsq.export.files import open_file
from zsq.export.image_spec import from_json
from zsq.models.weights import read_state
from zsq.runs.recipe_file import run_tables
from zsq.runs.record import Record
from zsq.runtime.files import load_tensors
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Runs:
    def __reduce__(self):
        return print, ("hijacked",)


def npz(path, **headers):
    """Write an npz whose arrays have these shapes and types by their headers, and a million zeros each."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, descr) in headers.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
                member.write(bytes(10**6))
    return str(path)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"images": ((10**15, 8, 8, 3), "|u1")}, "images of"),
        ({"images": ((5, 10**6, 10**6, 3), "|u1")}, "up to 1,000,000,000 images of"),
        ({"images": ((5, 8, 8, 3), "|u1"), "labels": ((10**14,), "<i8")}, "that is no truth"),
        ({"images": ((5, 8, 8, 3), "|u1"), "labels": ((5,), "|O")}, "that is no truth"),
        ({"images": ((10**6, 8, 8, 3), "|u1")}, "ends within image 5208"),
        ({"images": ((2, -8, 8, 3), "|u1")}, "images"),
    ],
)
def test_a_header_that_lies_costs_no_memory(tmp_path, headers, message):
    path = npz(tmp_path / "a.npz", **headers)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        for _ in open_dataset(path, SPEC).batches():
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_large_images_are_cropped_before_a_batch_is_made(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((12, 4000, 2000, 3), np.uint8))
    tracemalloc.start()
    (batch,) = open_dataset(str(tmp_path / "a.npz"), SPEC).batches()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.images.shape == (12, 3, 8, 8)
    assert peak < 200 * 2**20  # of 288 MB


@pytest.mark.parametrize("place", ["{root}/secret.bin", "../secret.bin", "link.bin"])
def test_an_onnx_file_reads_no_other(tmp_path, place):
    folder, weights = tmp_path / "run", np.ones(3, np.float32).tobytes()
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(weights)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3]) for name in ("images", "logits")
    ]
    weight = onnx.helper.make_tensor("weight", onnx.TensorProto.FLOAT, [3], weights, raw=True)
    onnx.external_data_helper.set_external_data(weight, place.format(root=tmp_path), 0, len(weights))
    weight.ClearField("raw_data")
    add = onnx.helper.make_node("Add", ["images", "weight"], ["logits"])
    graph = onnx.helper.make_graph([add], "", values[:1], values[1:], [weight])
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(InputError, match="its weights lie in other files"):
        open_file(folder / "model.onnx")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.safetensors", "a"])
def test_a_pickle_runs_under_no_name(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(TeacherError):
        read_state(tmp_path / name)
    assert "hijacked" not in capsys.readouterr().out


READERS = {
    "a.npz": lambda path: list(open_dataset(str(path), SPEC).batches()),
    "a.pth": read_state,
    "a.safetensors": load_tensors,
    "a.toml": run_tables,
    "result.json": lambda path: Record.read(path.parent),
    "a.png": lambda path: list(open_dataset(str(path.parent), SPEC).batches()),
    "metadata.csv": lambda path: list(open_dataset(str(path.parent), SPEC).batches()),
}
STARTS = [b"", b"\x80\x02", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"{", b"[a]\n", b"a="]


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(tmp_path, name, start, rest):
    (tmp_path / name).write_bytes(start + rest)
    try:
        READERS[name](tmp_path / name)
    except ZsqError as error:
        message = str(error)
    else:  # such as an empty recipe
        message = "read"
    assert message


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_no_note_or_is_refused(value):
    import json

    with pytest.raises(InputError):
        from_json(json.dumps(value))


def test_a_zip_that_says_it_has_other_parts_is_no_checkpoint(tmp_path):
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2)
    (tmp_path / "a.pth").write_bytes(locator + end)
    with pytest.raises(TeacherError, match="neither a whole zip file nor a pickle"):
        read_state(tmp_path / "a.pth")


def test_an_array_whose_header_is_cut_short_is_told(tmp_path):
    header = b"{'descr': '|u1', 'shape': ((("
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(InputError, match="not a readable npz file"):
        open_dataset(str(tmp_path / "a.npz"), SPEC)


def test_a_zip_of_zeros_is_no_set(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(10**7))
    (tmp_path / "a.npz").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match="not a readable npz file"):
        open_dataset(str(tmp_path / "a.npz"), SPEC)

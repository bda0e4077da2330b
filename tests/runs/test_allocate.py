"""Choosing a width for each weight, from the command line to the integers of the file."""

import contextlib
import csv
import io
import re
import tomllib

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from zsq.cli import main
from zsq.errors import InputError
from zsq.methods import Real
from zsq.models.teacher import load_teacher
from zsq.quantization.pair_sums import neighbour_sums
from zsq.quantization.sensitivity import sensitivities, weight_sizes
from zsq.runs.allocate import allocate, parse_size, spread
from zsq.runs.quantize import quantize
from zsq.training.loop import Run

REAL = {"method": "real", "settings": ("method.data=digits:train",)}
FLAGS = ["--method", "real", "--set", "method.data=digits:train", "--images", "64"]
DIGITS = 37_840
"""Weights of the bundled network's convolutions and linear layer."""


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits")


def zsq(*arguments) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder that the command line filled, and what it printed."""
    folder = tmp_path_factory.mktemp("allocate") / "mixed"
    return folder, zsq(
        *("allocate", "digits", *FLAGS, "--widths", "8,2,4,3", "--average", "3.5", "--activation", "6"),
        *("--out", folder),
    )


def test_the_file_holds_widths_within_the_limit(mixed, teacher):
    folder, (code, out, _) = mixed
    assert code == 0
    content = tomllib.loads((folder / "bits.toml").read_text())
    assert content.keys() == {"activation", "weights"}
    assert content["activation"] == 6
    sizes = weight_sizes(teacher.network)
    assert sum(sizes.values()) == DIGITS
    assert content["weights"].keys() == sizes.keys()
    assert set(content["weights"].values()) <= {2, 3, 4, 8}
    total = sum(sizes[name] * width for name, width in content["weights"].items())
    assert 3.3 * DIGITS < total <= 3.5 * DIGITS
    assert f"{total / DIGITS:.3f} bits a weight" in (folder / "bits.toml").read_text()
    marked = [line for line in out.splitlines() if "-> chosen" in line]
    assert len(marked) == 1
    assert f"{total / DIGITS:.3f}" in marked[0]
    for width in (2, 3, 4, 8):
        assert re.search(rf"all {width} bits *\S* *{width}\.000", out)


def test_the_frontier_is_written_and_holds_the_chosen_point(mixed):
    folder, _ = mixed
    with (folder / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [float(row["bytes"]) for row in rows]
    costs = [float(row["sensitivity"]) for row in rows]
    assert sizes == sorted(set(sizes))
    assert (np.diff(costs) < 0).all()
    assert (sizes[0], sizes[-1]) == (DIGITS * 2 / 8, DIGITS)
    chosen = [row for row in rows if row["chosen"] == "1"]
    widths = tomllib.loads((folder / "bits.toml").read_text())["weights"]
    assert [{name: int(row[name]) for name in widths} for row in chosen] == [widths]
    assert costs[rows.index(chosen[0])] == max(
        c for s, c in zip(sizes, costs, strict=True) if s == float(chosen[0]["bytes"])
    )


def test_the_frontier_is_drawn(mixed):
    pytest.importorskip("matplotlib")
    with Image.open(mixed[0] / "frontier.png") as picture:
        colours = picture.convert("RGB").getcolors(2**20)
    assert len(colours) > 20  # a line, a mark and text, not an empty frame


def test_without_matplotlib_the_rest_is_written(teacher, tmp_path, monkeypatch, said):
    monkeypatch.setattr("zsq.runs.allocate.importlib.util.find_spec", lambda name: None)
    done = allocate(teacher, out=tmp_path / "a", average=4, num_images=8, method="noise")
    assert [path.name for path in done.files] == ["bits.toml", "frontier.csv"]
    assert not (tmp_path / "a" / "frontier.png").exists()
    assert said == ["frontier.png needs matplotlib: pip install 'zsq[plots]'"]


@pytest.mark.slow
def test_the_widths_are_those_of_the_file(mixed, teacher, tmp_path):
    folder, _ = mixed
    result = quantize(teacher, out=tmp_path / "run", bits=str(folder / "bits.toml"), data="digits", **REAL)
    widths = tomllib.loads((folder / "bits.toml").read_text())["weights"]
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "run/model.onnx").graph.initializer
    }
    for name, bits in widths.items():
        values = stored[name]
        assert values.dtype == np.int8
        assert -(2 ** (bits - 1)) <= values.min()
        is_bound = values.max() == 2 ** (bits - 1) - 1  # the largest is rounded to the end of its range
        channels = teacher.network.get_parameter(name).shape[1]  # others are padding
        sums = neighbour_sums(torch.tensor(values[:, :channels]).float())
        assert is_bound or (bits == 8 and sums.max() in (127, 128))
    assert re.fullmatch(r"mixed W3\.[345]\dA6", result.record.bits)
    assert result.record.settings["quantizer"]["weight_bits"] == widths
    assert result.record.quantized_top1 > 90
    again = quantize(teacher, out=tmp_path / "again", recipe=tmp_path / "run/settings.toml")
    assert again.record.artifacts["model.onnx"] == result.record.artifacts["model.onnx"]
    with pytest.raises(InputError, match=r"quantizer.weight_bits is \{'conv1"):
        quantize(teacher, out=tmp_path / "run", bits="W8A6", resume=True, **REAL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "options"),
    [("weight_range_rule=mse", {"range_rule": "mse"}), ("weight_granularity=tensor", {"per_channel": False})],
)
def test_grids_are_those_of_the_settings(teacher, tmp_path, setting, options):
    settings = (*REAL["settings"], f"quantizer.{setting}")
    result = allocate(
        teacher, out=tmp_path / "x", average=3, widths=[3], num_images=32, method="real", settings=settings
    )
    assert set(result.allocation.widths.values()) == {3}
    source = Real(data="digits:train").fit(teacher, Run()).source
    images = next(source.sample(32)).images
    assert result.sensitivities == sensitivities(teacher.network, images, [3], **options)
    assert result.sensitivities != sensitivities(teacher.network, images, [3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "an allocation needs one limit: --average BITS or --size BYTES such as 100KB"),
        (["--average", "4", "--size", "1MB"], "an allocation needs one limit"),
        (["--average", "1.5"], "--average is 1.5; at 2 bits each, the 37840 weights take 9.5 KB"),
        (["--size", "9KB"], "--size is 9KB; at 2 bits each"),
        (["--size", "9KM"], "--size is '9KM'; give bytes such as 100KB, 64KiB or 1.5MB"),
        (["--average", "4", "--widths", "4,9"], "a width is 9; widths from 2 to 8 work"),
        (["--average", "4", "--widths", "four"], "--widths is 'four'; whole numbers separated by commas"),
        (["--average", "4", "--activation", "1"], "a width is 1"),
        (["--average", "4", "--images", "0"], "images is 0; at least 1 is needed"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_anything_is_fitted(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("zsq.runs.allocate._allocate", None)
    code, out, err = zsq("allocate", "digits", "--out", tmp_path / "x", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {message}")
    assert not (tmp_path / "x").exists()


def test_another_allocation_is_not_overwritten(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("zsq.runs.allocate._allocate", None)
    code, _, err = zsq("allocate", "digits", "--average", "4", "--out", mixed[0])
    assert code == 1
    assert "holds another run; --resume continues it, --overwrite discards it" in err
    (tmp_path / "file").touch()
    code, _, err = zsq("allocate", "digits", "--average", "4", "--out", tmp_path / "file" / "below")
    assert code == 1
    assert "--out takes a folder" in err


def test_a_file_for_another_network_is_refused_before_the_fit(tmp_path):
    (tmp_path / "bits.toml").write_text('[weights]\n"conv.weight" = 4\n')
    code, _, err = zsq("quantize", "digits", "--bits", tmp_path / "bits.toml", "--out", tmp_path / "run")
    assert code == 1
    assert err.startswith("Error: Unknown weight 'conv.weight'. Did you mean 'conv1.weight'? Known: conv1.weight, fc.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("100KB", 1e5), ("64KiB", 65536), ("1.5 MB", 1.5e6), (300, 300), ("2mib", 2**21), ("7b", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("count", "most", "kept", "expected"),
    [(3, 9, (1,), [0, 1, 2]), (1, 9, (0,), [0]), (101, 3, (7,), [0, 7, 50, 100]), (2, 2, (), [0, 1])],
)
def test_spread(count, most, kept, expected):
    assert spread(count, most, *kept) == expected

"""Bits are flipped in what a run writes and reads again: damage is told, or changes nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq.comparison.layout import read_scores
from zsq.comparison.lines import read_lines
from zsq.data.digits.network import DigitsNet
from zsq.errors import InputError, TeacherError
from zsq.export.files import open_file
from zsq.models.weights import read_state
from zsq.runs.quantize import quantize
from zsq.runs.record import Record, verified
from zsq.runs.settings_file import read_settings
from zsq.runtime.files import load_tensors, save_tensors

pytestmark = pytest.mark.slow

FLIPS = 60


def flipped(path: Path, seed: int) -> None:
    """Flip one bit of a file, at a place that the seed draws."""
    draw, content = random.Random(seed), bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "run"
    settings = ("method.steps=2", "method.batch_size=4", "quantizer.num_samples=100")
    quantize("digits", out=out, settings=settings, checkpoint_every=1, quiet=True)
    return out


@pytest.fixture
def file_of(run, tmp_path):
    """A copy of a file of the run, alone with its record."""

    def copied(name: str) -> Path:
        for each in (name, "result.json", "settings.toml"):
            path = tmp_path / each
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes((run / each).read_bytes())
        return tmp_path / name

    return copied


@pytest.mark.parametrize("name", ["checkpoints/fit.safetensors", "generator.safetensors"])
def test_no_flip_in_tensors_passes(file_of, name):
    path = file_of(name)
    whole, (tensors, notes) = path.read_bytes(), load_tensors(path)
    told = 0
    for seed in range(FLIPS):
        path.write_bytes(whole)
        flipped(path, seed)
        try:
            found, said = load_tensors(path)
        except InputError as error:
            told += str(path) in str(error)
        else:  # the name of the checksum itself
            assert same(found, tensors)
            assert notes.items() <= said.items()
    assert told >= FLIPS - 2


def test_tensors_of_every_type_have_a_checksum(tmp_path):
    types = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float64)
    tensors = {str(kind): torch.ones(3, 2, dtype=kind) for kind in types} | {"one": torch.tensor(2.0)}
    save_tensors(tmp_path / "a", tensors | {"none": torch.zeros(0, 3)}, {"step": "1"})
    found, notes = load_tensors(tmp_path / "a")
    assert same({name: found[name] for name in tensors}, tensors)
    assert notes == {"step": "1"}


def test_tensors_without_a_checksum_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a", {"step": "3"})
    assert load_tensors(tmp_path / "a")[1] == {"step": "3"}


def test_each_flip_in_a_file_is_seen_before_it_is_used(file_of):
    path = file_of("model.onnx")
    whole = path.read_bytes()
    assert verified(path) == path
    for seed in range(FLIPS):
        path.write_bytes(whole)
        flipped(path, seed)
        with pytest.raises(InputError, match=r"model\.onnx is damaged or was edited: its content does not match"):
            verified(path)


def test_evaluate_and_export_refuse_a_damaged_file(file_of, capsys):
    from zsq.cli.main import main

    for name, words in (
        ("model.onnx", lambda path: ["evaluate", str(path), "--data", "digits"]),
        ("model.onnx", lambda path: ["evaluate", "digits", "--file", str(path), "--data", "digits"]),
        ("model.pt2", lambda path: ["export", str(path.parent), "--out", str(path.parent / "new.onnx")]),
    ):
        path = file_of(name)
        flipped(path, 3)
        with pytest.raises(SystemExit):
            main(words(path))
        assert f"Error: {path} is damaged or was edited" in capsys.readouterr().err


def test_a_file_beside_some_other_result_is_evaluated(file_of):
    path = file_of("model.onnx")
    (path.parent / "settings.toml").unlink()
    (path.parent / "result.json").write_text('{"accuracy": 0.5}')
    assert open_file(verified(path)).spec.classes == 10


@pytest.mark.parametrize("name", ["settings.toml", "result.json"])
def test_no_flip_in_settings_and_record_passes(file_of, name):
    path = file_of(name)
    read = (lambda folder: read_settings(folder / name)) if name == "settings.toml" else Record.read
    whole, wanted, told = path.read_bytes(), read(path.parent), 0
    for seed in range(FLIPS):
        path.write_bytes(whole)
        flipped(path, seed)
        try:
            found = read(path.parent)
        except InputError:
            told += 1
        else:
            assert found == wanted
    assert told > FLIPS / 2


def test_a_line_of_a_cell_with_another_figure_does_not_count(tmp_path, said):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(json.dumps({"cell": "a", "status": "skipped", "content_sha256": "0"}).encode() + b"\n\xff\xfe\n")
    assert read_lines(path) == {}
    assert said == [f"WARNING: 2 lines of {path} are damaged or cut short; their cells are run again"]


def test_no_flip_in_predictions_passes(tmp_path):
    path = tmp_path / "predictions.npz"
    values = np.random.default_rng(0).integers(0, 10, 500).astype(np.int32)
    np.savez_compressed(path, predictions=values, labels=values)
    whole = path.read_bytes()
    told = 0
    for seed in range(FLIPS):
        path.write_bytes(whole)
        flipped(path, seed)
        try:
            found = read_scores(path)
        except InputError as error:
            told += "is damaged" in str(error)
        else:
            assert found.file["top-1"].shape == values.shape
            assert found.file["top-1"].all()
    assert told > FLIPS / 2


def test_no_flip_in_a_checkpoint_of_the_users_passes(tmp_path):
    path, state = tmp_path / "net.pth", DigitsNet().state_dict()
    torch.save(state, path)
    whole, told = path.read_bytes(), 0
    for seed in range(FLIPS):
        path.write_bytes(whole)
        flipped(path, seed)
        try:
            found = read_state(path)
        except TeacherError as error:
            told += "net.pth" in str(error)
        else:  # between the parts
            assert same(found, state)
    assert told > FLIPS / 2

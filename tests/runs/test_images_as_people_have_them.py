"""Images without labels, classes in another order, means of another training: what a run says of them."""

import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from terminals import Terminal

from zsq import QAT, Noise, Real, compare, load_teacher, quantize
from zsq.cli.main import main
from zsq.data import digits
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.runs.summary import summary_rows
from zsq.training.loop import Run

FEW = {"quantizer.num_samples": 100}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Fifty digits: `flat` without labels, `sorted` in numbered folders, `named` in others, with `names.txt`."""
    place = tmp_path_factory.mktemp("digits")
    teacher = load_teacher("digits")
    (batch,) = open_dataset("digits", teacher.spec, limit=50).batches(50)
    pixels = teacher.spec.to_pixels(batch.images).numpy()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for index, (image, label) in enumerate(zip(pixels, batch.labels.tolist(), strict=True)):
        for folder in ("flat", f"sorted/{label}", f"named/{words[label]}"):
            (place / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(place / folder / f"{index:02}.png")
    (place / "names.txt").write_text("\n".join(words))
    np.savez(place / "flat.npz", images=pixels)
    return place


@pytest.mark.slow
def test_a_run_measures_agreement_on_images_without_labels(folders, tmp_path):
    data = folders / "flat.npz"
    result = quantize("digits", method=Noise(), settings=FEW, out=tmp_path / "run", data=data, quiet=True)
    record = result.record
    assert (record.quantized_top1, record.float_top1) == (None, None)
    assert record.teacher_agreement > 90
    low, high = record.evaluation["quantized"].agreement_interval
    assert low < record.teacher_agreement <= high
    rows = dict(summary_rows(record))
    assert "50 images without labels" in rows["agreement with teacher"]
    assert "float top-1" not in rows


@pytest.mark.slow
def test_class_names_bring_folders_into_order(folders, tmp_path, caplog):
    caplog.set_level(logging.INFO, "zsq")
    given = {"method": Noise(), "settings": FEW, "data": folders / "named", "quiet": True}
    wrong = quantize("digits", **given, out=tmp_path / "wrong").record
    assert wrong.float_top1 < 30
    assert "no more than guessing would (10 %)" in caplog.text
    assert "eight=0, five=1" in caplog.text
    caplog.clear()
    right = quantize("digits", **given, out=tmp_path / "right", class_names=folders / "names.txt").record
    assert right.float_top1 > 90
    assert "guessing" not in caplog.text


@pytest.fixture(scope="module")
def screens(folders):
    """What a terminal of 80 columns shows of a first use, command by command, in the folder of the images."""
    state = load_file(digits.NETWORK.weights)
    checkpoint = {"epoch": 3, "model_state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(checkpoint, folders / "net.pth")
    (folders / "net.py").write_text("from zsq.data.digits.network import DigitsNet\n\n\nbuild = DigitsNet\n")
    network = "net.py:build --weights net.pth --input 1x8x8 --classes 10 --mean 0.305 --std 0.3757"
    tiny = "--set method.steps=20 --set method.width=8 --set quantizer.num_samples=64"
    shown = {}
    for command in (
        f"quantize {network} {tiny} --out run",
        "evaluate run --data flat",
        "evaluate run --data named",
        "evaluate run --data named --class-names names.txt",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folders)
            terminal = Terminal(patch, 80)
            patch.setattr("sys.stdout", terminal.file)
            main(command.split())
            shown[command.partition(" --out")[0].removeprefix("evaluate run --data ")] = terminal.lines()
        terminal.close()
    first, *others = shown.values()
    return first, dict(zip(list(shown)[1:], others, strict=True))


@pytest.mark.slow
def test_a_first_run_without_images_can_be_read_in_a_terminal(screens, folders):
    lines, _ = screens
    phases = [line.split()[0] for line in lines if re.search(r" \d+/\d+ in \d:\d\d", line)]
    assert phases == ["rehearse", "fit", "recognise", "calibrate", "calibrate", "write", "check", "compare", "report"]
    assert not [line for line in lines if "left" in line.split()]
    summary = "\n".join(lines[-12:])
    assert re.search(r"^agreement on samples:    \S+ ", summary, flags=re.MULTILINE)
    assert re.search(r"^ {25}\S", summary, flags=re.MULTILINE)  # folded beside the names
    assert re.search(r"^folder: +run$", summary, flags=re.MULTILINE)
    assert (folders / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_is_measured_on_images_as_they_come(screens, folders):
    _, shown = screens
    flat, wrong, right = ("\n".join(lines) for lines in shown.values())
    assert re.search(r"│ images +│ +50 │ +50 │", flat)
    assert "eight=0, five=1" in wrong
    words = " ".join(wrong.split())
    assert re.search(r"WARNING: model.onnx recognises \S+ % of 50 images of named, no more than guessing would", words)
    assert "WARNING" not in right


@pytest.mark.slow
def test_a_file_without_its_run_has_no_float_network_to_agree_with(screens, folders, tmp_path, capsys):
    shutil.copy(folders / "run" / "model.onnx", tmp_path)
    for words in (["digits"], [str(tmp_path / "model.onnx")]):
        with pytest.raises(SystemExit):
            main(["evaluate", *words, "--data", str(folders / "flat")])
        assert "has no labels" in capsys.readouterr().err


def test_real_images_without_labels_calibrate_and_teach(folders):
    teacher = load_teacher("digits")
    source = Real(data=str(folders / "flat")).fit(teacher, Run()).source
    assert not source.true_labels
    assert not source.asks_labels
    with torch.no_grad():
        seen = teacher.network(source.images(torch.arange(50))).argmax(1)
    assert torch.equal(source.labels, seen)
    assert QAT().resolved_kd_weight(source) == 1.0
    named = Real(data=str(folders / "named"), class_names=str(folders / "names.txt")).fit(teacher, Run()).source
    assert named.true_labels
    with torch.no_grad():
        agreed = teacher.network(named.images(torch.arange(50))).argmax(1) == named.labels
    assert agreed.float().mean() > 0.9


def test_a_comparison_needs_labels(folders, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        f"""
title = "without labels"
seeds = [0]
[[teachers]]
model = "digits"
data = "{folders / "flat"}"
[[methods]]
name = "noise"
[[quantizers]]
name = "ptq"
bits = ["8"]
"""
    )
    with pytest.raises(InputError, match="has no labels; a comparison measures accuracy"):
        compare(tmp_path / "recipe.toml", out=tmp_path / "out", quiet=True)

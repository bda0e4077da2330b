"""The command line as a user meets it: texts, exit statuses, and what lies on stdout and stderr."""

import contextlib
import inspect
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import zsq as package
from zsq.cli import main, start
from zsq.cli.output import print_rows
from zsq.data import digits
from zsq.export.content_hash import canonical_sha256
from zsq.methods import METHODS
from zsq.quantization import QUANTIZERS
from zsq.runs.console import TerminalProgress
from zsq.runs.forecast import Forecast
from zsq.runs.pipeline import HASHED
from zsq.runtime.checksums import unsealed_values

TINY = [
    *("--set", "method.steps=5", "--set", "method.batch_size=16", "--set", "method.width=8"),
    *("--set", "quantizer.num_samples=64"),
]
STATED = ["--mean", "0.3", "--std", "0.4"]
NOISE = ["--method", "noise", "--set", "quantizer.num_samples=8"]
ZSQ = [sys.executable, "-m", "zsq"]

NETWORKS = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)
    def forward(self, x):
        x = self.norm(x)
        if x.sum() > 0:
            x = -x
        return self.head(x.flatten(1))
"""


class Outcome:
    """What one call of the command line left."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def zsq(*arguments: object) -> Outcome:
    """Call the command line in this process; anything but an exit is a traceback, and fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def error_of(outcome: Outcome) -> str:
    """Return the one line of an expected fault, after checking that nothing else was printed."""
    assert outcome.code == 1, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("Error: ")
    return outcome.err.removeprefix("Error: ").strip()


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Outcome]:
    """A finished run of the bundled network, and what its command printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, zsq("quantize", "digits", "-v", *TINY, "--data", "digits", "--json", "--out", folder)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty current folder with networks.py in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks.py").write_text(NETWORKS)
    return tmp_path


def weights(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return load_file(digits.NETWORK.weights) | {name.replace("__", "."): value for name, value in changed.items()}


# Results


@pytest.mark.slow
def test_json_is_one_object_and_progress_goes_to_stderr(finished):
    folder, outcome = finished
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    record = json.loads(outcome.out)
    assert record == unsealed_values(json.loads((folder / "result.json").read_text()))
    assert 0 <= record["quantized_top1"] <= 100
    assert re.search(r"^fit: 5/5, done in \d+ s ce [\d.]+ bns [\d.]+ label_recognition [\d.]+$", outcome.err, re.M)
    assert "WARNING: the teacher recognises" in outcome.err


@pytest.mark.slow
def test_evaluate_measures_the_file_of_a_run(finished):
    folder, outcome = finished
    found = zsq("evaluate", folder, "--data", "digits", "--json")
    assert found.code == 0
    assert found.out.count("\n") == 1
    record = json.loads(outcome.out)
    expected = record["evaluation"]["quantized"] | {
        "agreement_count": None,
        "teacher_agreement": None,
        "agreement_interval": None,
        "minus_float": None,
    }
    assert json.loads(found.out) == {"model.onnx": expected}
    assert json.loads(found.out)["model.onnx"]["top1"] == record["quantized_top1"]


@pytest.mark.slow
def test_evaluate_measures_a_float_network(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name hides no network
    found = zsq("evaluate", "digits", "--data", "digits")
    assert found.code == 0
    assert "98.67" in found.out
    assert "899" in found.out
    assert json.loads(finished[1].out)["float_top1"] == pytest.approx(98.67, abs=0.005)


@pytest.mark.slow
def test_the_summary_names_what_was_measured(finished, tmp_path):
    shown = zsq("quantize", "digits", "--from", finished[0], "--bits", "4", "--out", tmp_path / "four")
    assert shown.code == 0
    lines = dict(line.split(": ", 1) for line in shown.out.splitlines())
    assert lines["method"].strip() == "zscgan (data-free), ptq, bits 4, activation scope all"
    assert lines["network"].strip().startswith("digits (weights: bundled, sha256 ")
    assert lines["note"].strip() == "widths below 8 bits are stored one value a byte"
    assert lines["folder"].strip() == str(tmp_path / "four")


@pytest.mark.slow
def test_synthesize_prints_the_files(tmp_path, finished):
    made = zsq("synthesize", "digits", "--from", finished[0], "--count", 12, "--out", tmp_path)
    assert made.code == 0
    assert made.out.splitlines() == [str(tmp_path / "images.npz"), str(tmp_path / "samples.png")]
    assert np.load(tmp_path / "images.npz")["images"].shape == (12, 8, 8, 1)
    read = zsq("evaluate", "digits", "--data", tmp_path / "images.npz", "--json")
    assert json.loads(read.out)["digits"]["num_images"] == 12


def test_methods_lists_every_method_and_quantizer():
    lines = zsq("methods").out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["--method", name] for name in METHODS),
        *(["--quantizer", name] for name in QUANTIZERS),
    ]
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", [*METHODS, *QUANTIZERS])
def test_methods_of_one_lists_each_setting_with_default_and_text(name):
    kind = {**METHODS, **QUANTIZERS}[name]
    section = "method" if name in METHODS else "quantizer"
    lines = zsq("methods", name).out.splitlines()
    shown = [re.fullmatch(rf"--set {section}\.(\w+)=(\S*) +(\S.*\.)", line) for line in lines]
    assert all(shown), lines
    assert [match[1] for match in shown if match] == [field.name for field in fields(kind)]
    values = {match[1]: match[2] for match in shown if match}
    defaults = {field.name: field.default for field in fields(kind)}
    assert values == {name: "none" if value is None else str(value) for name, value in defaults.items()}


def test_methods_of_an_unknown_name():
    assert error_of(zsq("methods", "zscgn")).startswith("Unknown method or quantizer 'zscgn'. Did you mean 'zscgan'?")


def test_models_names_each_form():
    found = zsq("models")
    assert found.code == 0
    for form in ("digits", "pytorchcv:NAME", "torchvision:NAME", "timm:NAME", "FILE.py:FACTORY", "MODULE:FACTORY"):
        assert form in found.out


def test_models_searches_the_zoos():
    pytest.importorskip("pytorchcv", reason="the zoo is not installed")
    found = zsq("models", "resnet20")
    assert "  pytorchcv:resnet20_cifar10\n" in found.out
    assert "mobilenet_w1" not in found.out


def test_models_searches_bundled_networks_too():
    assert zsq("models", "SHAPES_mob").out.splitlines()[0] == "  shapes_mobilenet"


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", ".local/share/bash-completion/completions/zsq"), ("zsh", ".zfunc/_zsq")]
)
def test_completion_is_installed(tmp_path, monkeypatch, shell, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    found = zsq("--install-completion")
    assert (found.code, found.out.split(":")[0]) == (0, str(tmp_path / file))
    script = (tmp_path / file).read_text()
    assert all(word in script for word in ("quantize", "--budget"))
    monkeypatch.setenv("SHELL", "/bin/fish")
    assert "the shell is 'fish', and completion is for bash and zsh" in error_of(zsq("--install-completion"))


@pytest.mark.slow
def test_quiet_leaves_the_result_alone(place):
    found = zsq("quantize", "digits", *NOISE, "--out", "run", "--quiet")
    assert (found.code, found.err) == (0, "")
    assert "folder:" in found.out


@pytest.mark.slow
def test_verbose_says_settings_seconds_and_layers(finished):
    told = finished[1].err
    assert re.search(r"^quantizer: name=ptq, bits=8, ", told, flags=re.MULTILINE)
    assert re.search(r"^seconds: fit [\d.]+, quantize [\d.]+, export [\d.]+, ", told, flags=re.MULTILINE)
    assert len(re.findall(r"^layer \S+: \d+ % of what rounding moves", told, flags=re.MULTILINE)) == 5


def test_long_texts_are_folded_beside_their_names_in_a_terminal_alone():
    rows = [("check", "100.00 % of 100 clear images, 100.00 % of all 100"), ("folder", f"runs/{'a' * 40}")]
    printed = []
    for terminal in (True, False):
        out = io.StringIO()
        print_rows(Console(file=out, force_terminal=terminal, width=60, color_system=None), rows)
        printed.append(out.getvalue().splitlines())
    assert printed[1] == [f"{name + ':':24} {text}" for name, text in rows]
    assert printed[0][:2] == [f"{'check:':24} 100.00 % of 100 clear images,", f"{'':24} 100.00 % of all 100"]
    assert printed[0][-1].split()[-1] == rows[1][1]  # a path can be copied


def test_a_mistyped_command_is_corrected():
    found = zsq("quantise", "digits")
    assert found.code == 2
    assert found.err.startswith("Error: Unknown command 'quantise'. Did you mean 'quantize'? Known: allocate, compare,")


@pytest.mark.slow
def test_doctor_checks_the_machine():
    found = zsq("doctor")
    assert found.code == 0
    lines = dict(re.split(r":? {2,}", line, maxsplit=1) for line in found.out.splitlines())
    assert lines["FILE.py:FACTORY"]  # no emoji
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    assert re.fullmatch(r"passed: digits float 98\.67 %, INT8 from noise [\d.]+ % in ONNX Runtime", lines["self-test"])


# Help

HELP_FLAGS = {
    "quantize": "weights input classes outputs mean std resize method quantizer bits target pixels batch class-names "
    "decode recipe budget set from seed device data log resume overwrite checkpoint-every out json devices quiet",
    "synthesize": "weights input classes outputs mean std resize method recipe budget set from seed device log resume "
    "overwrite out count class-names devices quiet",
    "evaluate": "file weights input classes outputs mean std resize data class-names decode device json",
    "export": "out target pixels batch packed data overwrite json quiet",
    "compare": "out only data-root device log resume overwrite dry-run json jobs job-set",
    "allocate": "weights input classes outputs mean std resize method recipe budget set from seed device log resume "
    "overwrite out average size widths activation images quiet",
    "report": "open",
    "methods": "",
    "models": "",
    "doctor": "",
}


def examples(command: str) -> list[str]:
    """Lines below "Examples:" in a command's docstring."""
    text = inspect.cleandoc(main.COMMANDS[command].__doc__)
    return text.partition("Examples:\n")[2].splitlines()


@pytest.mark.parametrize("command", HELP_FLAGS)
def test_help_shows_the_examples_line_by_line(command):
    found = zsq(command, "--help")
    assert (found.code, found.err) == (0, "")
    lines = [line.rstrip() for line in found.out.splitlines()]
    assert examples(command)
    start = lines.index("Examples:") + 1
    assert lines[start : start + len(examples(command))] == examples(command)
    assert max(map(len, lines[start:])) <= 80


@pytest.mark.parametrize("command", HELP_FLAGS)
def test_help_spells_the_flags_as_documented(command):
    text = zsq(command, "--help").out
    flags = re.findall(r"^  (?:-h, )?--([a-z-]+)", text, re.M)
    assert sorted(flags) == sorted(["help", *HELP_FLAGS[command].split()])
    assert "None" not in text
    assert "--no-" not in text


def test_help_lists_the_commands():
    found = zsq("--help")
    assert found.code == 0
    assert re.findall(r"• (\w+)", found.out) == list(HELP_FLAGS)
    assert "Examples" not in found.out


@pytest.mark.parametrize("command", HELP_FLAGS)
def test_the_examples_are_commands(command, monkeypatch):
    taken = []
    monkeypatch.setattr(main.COMMANDS[command], "run", lambda self, console: taken.append(self))
    lines = "\n".join(examples(command)).replace("\\\n", " ").splitlines()
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "zsq"
        assert zsq(*arguments).code == 0, line
    assert len(taken) == len(lines)


def test_set_may_be_repeated(monkeypatch):
    taken = []
    monkeypatch.setattr(main.Quantize, "run", lambda self, console: taken.append(self))
    zsq("quantize", "digits", "--out", "x", "--set", "method.steps=3", "--set", "quantizer.range_rule=mse")
    assert taken[0].request.settings == ("method.steps=3", "quantizer.range_rule=mse")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantise", "digits"],
        ["quantize"],
        ["quantize", "digits"],  # no --out
        ["quantize", "digits", "--out", "x", "--sed", "3"],
        ["quantize", "digits", "--out", "x", "--seed", "three"],
        ["quantize", "digits", "--out", "x", "--device", "tpu"],
        ["quantize", "digits", "--out", "x", "--checkpoint-every", "often"],
        ["evaluate", "digits"],
        ["synthesize", "digits", "--count", "many", "--out", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, place):
    found = zsq(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert "Traceback" not in found.err
    assert not (place / "x").exists()


# Bad input


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"fc__weight": (7, 32), "fc__bias": (7,)}, [], r"w\.safetensors holds 7 classes \(fc\.weight is 7x32\)"),
        ({"conv1__weight": (16, 3, 3, 3)}, [], r"w\.safetensors .*3 channels|w\.safetensors .*16x3x3x3"),
        ({"stage1__conv1__weight": (16, 16, 5, 5)}, [], r"w\.safetensors .*stage1\.conv1\.weight .*16x16x5x5"),
        ({"extra__weight": (3,)}, [], r"w\.safetensors .*1 unexpected: extra\.weight \(3\)"),
        ({}, ["--classes", "12"], r"teacher 'digits' knows 10 classes; --classes says 12"),
        ({}, ["--input", "3x8x8", "--mean", "0,0,0", "--std", "1,1,1"], r"'digits' fails on images of 3x8x8"),
    ],
)
def test_weights_of_another_network(place, changed, arguments, message):
    save_file(weights(**{name: torch.zeros(shape) for name, shape in changed.items()}), place / "w.safetensors")
    found = zsq("quantize", "digits", "--weights", "w.safetensors", *arguments, *NOISE, "--out", "run")
    assert re.search(message, error_of(found))
    assert not (place / "run").exists()


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_checkpoint_that_would_execute_code(place, kind):
    if kind == "pickle":
        (place / "evil.pth").write_bytes(pickle.dumps({"state_dict": _Evil()}, protocol=2))
    else:
        torch.save({"state_dict": _Evil()}, place / "evil.pth")
    message = error_of(zsq("quantize", "digits", "--weights", "evil.pth", *NOISE, "--out", "run"))
    assert message.startswith("evil.pth would execute code when loaded")
    assert not (place / "evil-was-here").exists()


@pytest.mark.slow
def test_a_network_without_batch_norm(place):
    shape = ["--input", "1x8x8", "--classes", "10"]
    message = error_of(zsq("quantize", "networks.py:plain", *shape, *STATED, *TINY, "--out", "run"))
    assert "'networks.py:plain' has no batch norm" in message
    assert message.endswith("Methods that do without: noise, real, and zscgan with --set method.bns_weight=0.")


def test_a_network_that_torch_export_cannot_take(place):
    shape = ["--input", "1x8x8", "--classes", "10"]
    message = error_of(zsq("quantize", "networks.py:Branching", *shape, *TINY, "--out", "run"))
    assert message.startswith("teacher 'networks.py:Branching' cannot be exported by torch.export: ")
    assert len(message) > 100  # the reason
    assert not (place / "run").exists()


@pytest.mark.slow
def test_a_folder_that_holds_another_run(finished):
    folder = finished[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments in (
        [],
        ["--resume", "--overwrite"],
        ["--resume", "--seed", "4"],
        ["--overwrite", "--budget", "soon"],
    ):
        message = error_of(zsq("quantize", "digits", *TINY, "--out", folder, *arguments))
        assert "--resume" in message or "seed" in message or "budget is 'soon'" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def save_npz(path: Path, images: np.ndarray, labels: list[int]) -> None:
    np.savez(path, images=images, labels=np.array(labels, dtype=np.int64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels.npz", "data set 'labels.npz': label 10 of image 1 is outside 0..9"),
        ("empty.npz", "data set 'empty.npz' holds no images"),
        ("colour.npz", "data set 'colour.npz' has 3-channel images; the teacher takes 1"),
        ("cut.npz", "data set 'cut.npz' is not a readable npz file"),
        ("folder", "bad.png is not a readable image"),
        ("nowhere", "no such data set: 'nowhere'"),
        ("networks.py", "data set 'networks.py' is of no known kind"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_images_and_labels_that_do_not_fit(place, name, message, command):
    grey = np.zeros((2, 8, 8, 1), np.uint8)
    save_npz(place / "labels.npz", grey, [0, 10])
    save_npz(place / "empty.npz", grey[:0], [])
    save_npz(place / "colour.npz", np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    (place / "cut.npz").write_bytes((place / "labels.npz").read_bytes()[:200])
    (place / "folder").mkdir()
    (place / "folder" / "metadata.csv").write_text("file_name,label\ngood.png,1\nbad.png,2\n")
    Image.fromarray(grey[0, :, :, 0]).save(place / "folder" / "good.png")
    (place / "folder" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    if command == "evaluate":
        assert message in error_of(zsq("evaluate", "digits", "--data", name))
    elif name != "folder":  # images are read when they are needed
        assert message in error_of(zsq("quantize", "digits", *TINY, "--data", name, "--out", "run"))
        assert not (place / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite(place):
    found = zsq("quantize", "digits", *TINY, "--set", "method.learning_rate=1e30", "--out", "run")
    assert found.code == 1
    last = found.err.splitlines()[-1]
    assert re.match(r"Error: fit: loss '(ce|bns)' is (nan|inf) at step \d of 5; a lower learning rate", last)
    assert "Traceback" not in found.err
    assert (place / "run" / "settings.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "zs-cgan"], "Unknown method 'zs-cgan'. Did you mean 'zscgan'?"),
        (["--quantizer", "gptq"], "Unknown quantizer 'gptq'."),
        (["--bits", "9"], "'9'"),
        (["--bits", "W4"], "'W4'"),
        (["--budget", "5 minutes"], "budget is '5 minutes'; give a time such as 90s, 5m or 1.5h."),
        (["--set", "method.steps"], "--set takes method.NAME=VALUE or quantizer.NAME=VALUE; got 'method.steps'."),
        (["--set", "method.step=3"], "Unknown method setting 'method.step'. Did you mean 'method.steps'?"),
        (["--set", "method.steps=x"], "method.steps is 'x'"),
        (["--set", "method.batch_size=1"], "method.batch_size is 1"),
        (["--recipe", "nowhere.toml"], "nowhere.toml: No such file or directory."),
        (["--recipe", "networks.py"], "networks.py is not TOML"),
        (["--from", "nowhere"], "nowhere holds no generator.safetensors"),
        (
            ["--input", "8"],
            "--input is '8'; channels x height x width are expected, such as 3x32x32, of signals",
        ),
        (["--input", "1x8xq"], "--input is '1x8xq'"),
        (["--input", "0x8x8"], "channels is 0"),
        (["--mean", "0.5,x"], "--mean is '0.5,x'; numbers separated by commas are expected"),
        (["--mean", "0.5,0.5"], "mean has 2 values for 1 channels"),
        (["--std", "0"], "std is (0.0,)"),
        (["--resize", "big"], "--resize is 'big'; a whole number or none is expected."),
        (["--resize", "256,3"], "--resize is '256,3'"),
        (["--resize", "4"], "resize is 4, below the crop of 8x8"),
        (["--checkpoint-every", "0"], "checkpoint-every is 0"),
        (["--weights", "nowhere.pth"], "no such weights file: nowhere.pth"),
        (["--weights", "networks.py"], "networks.py is not a PyTorch checkpoint"),
        (["--method", "real"], "method real needs images: --set method.data=SET"),
        (["--method", "real", "--set", "method.data=nowhere"], "no such data set: 'nowhere'"),
        (["--out", "networks.py"], "networks.py is a file; --out takes a folder."),
        (["--out", "networks.py/run"], "--out takes a folder."),
    ],
)
def test_other_mistakes(place, arguments, message):
    out = [] if "--out" in arguments else ["--out", "run"]
    assert message in error_of_last(zsq("quantize", "digits", *out, *arguments))
    assert not list(place.rglob("*.safetensors"))


def error_of_last(outcome: Outcome) -> str:
    """As `error_of`, where lines of progress may stand before."""
    *progress, last = outcome.err.splitlines()
    assert not [line for line in progress if "Error" in line or "Traceback" in line]
    return error_of(Outcome(outcome.code, outcome.out, last + "\n"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("digts", "Unknown model 'digts'. Did you mean 'digits'?"),
        ("pytorchcv:resnet999", "resnet999"),
        ("nowhere.py:build", "no such file: nowhere.py"),
        ("networks.py:plan", "Unknown factory of networks.py 'plan'. Did you mean 'plain'?"),
        ("networks.py:plain", "'networks.py:plain' does not say what images it takes"),
        ("no_such_package.module:build", "no_such_package"),
    ],
)
def test_models_that_cannot_be_found(place, model, message):
    assert message in error_of(zsq("quantize", model, "--out", "run"))
    assert not (place / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["generator.safetensors", "settings.toml", "checkpoints/fit.safetensors", "model.onnx"]
)
def test_a_file_that_was_cut_is_named(finished, place, name):
    for source in finished[0].rglob("*"):
        if source.is_file():
            target = place / "run" / source.relative_to(finished[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    path = place / "run" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 3])
    if name == "model.onnx":
        found = zsq("evaluate", "run", "--data", "digits")
    elif name.startswith("checkpoints"):
        found = zsq("quantize", "digits", *TINY, "--out", "run", "--resume")
    else:
        found = zsq("quantize", "digits", "--from", "run", "--out", "next")
    assert Path(name).name in error_of(found)


@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_a_folder_without_a_run(place, command):
    (place / "empty").mkdir()
    if command == "evaluate":
        assert "empty" in error_of(zsq("evaluate", "empty", "--data", "digits"))
    else:
        assert "empty" in error_of(zsq("quantize", "digits", "--from", "empty", "--out", "run"))


def test_a_full_disk_is_one_line(place, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device", "run/model.onnx")

    monkeypatch.setattr("zsq.cli.quantize.quantize_request", full)
    assert error_of(zsq("quantize", "digits", "--out", "run")) == "run/model.onnx: No space left on device."


def test_an_interrupt_says_how_to_go_on(place, monkeypatch):
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zsq.cli.quantize.quantize_request", interrupt)
    found = zsq("quantize", "digits", "--out", "run")
    assert (found.code, found.err) == (130, "Stopped; a run continues with --resume.\n")


def test_an_interrupt_is_not_lost_where_python_frees_something(place, monkeypatch):
    class Freed:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def interrupt(*_, **__) -> None:
        Freed()
        time.sleep(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, where nothing ignores it
    monkeypatch.setattr("zsq.cli.quantize.quantize_request", interrupt)
    try:
        found = zsq("quantize", "digits", "--out", "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found.code, found.err) == (130, "Stopped; a run continues with --resume.\n")


# Progress


def test_a_log_gets_few_lines_and_one_at_the_end(capsys):
    with TerminalProgress() as progress:
        for done in range(1, 101):
            progress.update("fit", done, 100, {"ce": 1 / done, "bns": 300.0})
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[-1] == "fit: 100/100, done in 0 s ce 0.01 bns 300"
    assert len(lines) <= 2


def test_a_log_gets_the_time_left_of_the_run(capsys, monkeypatch):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr("zsq.runs.console.time.monotonic", lambda: next(clock))
    with TerminalProgress() as progress:
        progress.expect(Forecast({"fit": 80.0, "write": 10.0}))
        progress.update("fit", 0, 10, {})
        progress.update("fit", 5, 10, {})
    assert capsys.readouterr().err.splitlines() == ["fit: 5/10, about 40 s left, run 50 s"]


def test_a_terminal_gets_a_bar_with_step_losses_and_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with TerminalProgress() as progress:
        progress.update("fit", 30, 100, {"ce": 0.25})
        progress.update("fit", 40, 100, {"ce": 0.125})
    out, err = capsys.readouterr()
    assert out == ""
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err)
    assert "40/100" in shown
    assert "ce 0.125" in shown
    assert "left" in shown


# A process of its own


@pytest.mark.slow
def test_a_process_killed_at_any_moment_continues_to_the_same_hashes(tmp_path):
    arguments = ["quantize", "digits", "--quantizer", "qat", "--bits", "4", *TINY]
    arguments += ["--set", "method.steps=30", "--set", "quantizer.steps=30", "--checkpoint-every", "1", "--out"]
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*ZSQ, *arguments, str(folder)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or b'"distill"' not in metrics.read_bytes():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert out == b""
    assert not (folder / "result.json").exists()
    assert zsq(*arguments, folder, "--resume").code == 0
    assert zsq(*arguments, tmp_path / "whole").code == 0
    written = [name for name in HASHED if (tmp_path / "whole" / name).exists()]
    found, wanted = ({name: canonical_sha256(f / name) for name in written} for f in (folder, tmp_path / "whole"))
    assert found == wanted
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_the_program_exits_with_its_status_and_prints_no_traceback(tmp_path):
    command = [*ZSQ, "quantize", "digits", "--bits", "99", "--out", "run"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert error_of(Outcome(wrong.returncode, wrong.stdout, wrong.stderr)).startswith("bits")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["models", "resnet"], ["quantize", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path, arguments):
    """As in `zsq models resnet | head -1`."""
    command = [*ZSQ, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as reader:
        assert reader.stdout is not None
        reader.stdout.close()
        assert reader.stderr is not None
        assert reader.stderr.read() == b""
    assert reader.returncode == 1


def test_the_next_run_of_a_phase_starts_its_clock_anew(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 1000.0, 1040.0, 1060.0])
    monkeypatch.setattr("zsq.runs.console.time.monotonic", lambda: next(clock))
    with TerminalProgress() as progress:
        for done in (1, 2, 1, 2, 3):
            progress.update("fit", done, 3, {"ce": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "fit: 2/3, about 40 s left ce 1",
        "fit: 3/3, done in 60 s ce 1",
    ]


def test_a_run_of_another_length_starts_its_clock_anew(capsys, monkeypatch):
    """As calibration on 100 images and then on 1,000 does, told every 100."""
    clock = iter([0.0, 50.0, 1000.0, 1100.0])
    monkeypatch.setattr("zsq.runs.console.time.monotonic", lambda: next(clock))
    with TerminalProgress() as progress:
        for done, total in ((50, 100), (100, 100), (100, 1000), (200, 1000)):
            progress.update("calibrate", done, total, {})
    assert capsys.readouterr().err.splitlines() == ["calibrate: 200/1000, about 800 s left"]


def test_a_count_that_is_told_again_is_the_same_run(capsys, monkeypatch):
    """As jobs tell theirs, every few seconds."""
    clock = iter([0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr("zsq.runs.console.time.monotonic", lambda: next(clock))
    with TerminalProgress() as progress:
        for done in (0, 0, 1, 1):
            progress.update("compare", done, 4, {})
    assert capsys.readouterr().err.splitlines() == [
        "compare: 1/4, about 600 s left",
        "compare: 1/4, about 900 s left",
    ]


@pytest.mark.slow
def test_evaluate_takes_the_file_alone_and_beside_its_network(finished):
    folder, outcome = finished
    record = json.loads(outcome.out)
    alone = json.loads(zsq("evaluate", folder / "model.onnx", "--data", "digits", "--json").out)
    assert alone["model.onnx"]["top1"] == record["quantized_top1"]
    for file in (folder, folder / "model.onnx"):
        both = json.loads(zsq("evaluate", "digits", "--file", file, "--data", "digits", "--json").out)
        assert both["digits"]["top1"] == record["float_top1"]
        assert both["model.onnx"]["teacher_agreement"] == record["teacher_agreement"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--weights", "x"], "--weights goes with a network, and {run} is a quantized file"),
        (["{run}/model.onnx", "--mean", "0.5"], "--mean goes with a network"),
        (["{run}", "--file", "{run}"], "--file goes with a network"),
        (["digits", "--input", "1x9x9", "--file", "{run}"], "{run}/model.onnx takes ImageSpec(channels=1, height=8"),
        (["digits", "--file", "gone.onnx"], "gone.onnx: no such file"),
    ],
)
def test_what_cannot_be_evaluated(finished, arguments, message):
    run = str(finished[0])
    found = zsq("evaluate", *(part.format(run=run) for part in arguments), "--data", "digits")
    assert error_of(found).startswith(message.format(run=run))


@pytest.mark.slow
def test_an_onnx_file_of_somebody_else_is_no_run(tmp_path, finished):
    model = onnx.load(finished[0] / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "x.onnx")
    message = error_of(zsq("evaluate", tmp_path / "x.onnx", "--data", "digits"))
    assert "x.onnx does not say how its images are normalised; zsq has not written it" in message


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zsq", "--version"])
    start.main()
    assert capsys.readouterr().out.startswith(f"zsq {package.__version__}, onnx ")


def test_a_search_without_a_match_says_so():
    assert "no network that can be used here has 'zzzz' in its name\n" in zsq("models", "zzzz").out


@pytest.mark.slow
def test_what_a_network_prints_does_not_mix_with_the_result(place):
    text = "from networks import plain as quiet\ndef plain():\n print('hello')\n return quiet()"
    (place / "loud.py").write_text(text)
    found = zsq("evaluate", "loud.py:plain", "--input", "1x8x8", "--classes", "10", "--data", "digits", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["loud.py:plain"]["num_images"] == 899
    assert "hello\n" in found.err
    assert "pixels go into the network as they are, from 0 to 1; --mean and --std normalise them\n" in found.err

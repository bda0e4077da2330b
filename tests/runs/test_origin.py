"""A run's folder knows what it was made of: nothing of it has to be said again."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zsq import Noise, load_teacher, quantize
from zsq.cli.main import main
from zsq.data import digits
from zsq.data.datasets import open_dataset
from zsq.errors import InputError
from zsq.export.content_hash import canonical_sha256
from zsq.models.network import Network
from zsq.runs.origin import completed, lacking, resumed
from zsq.runs.pipeline import HASHED
from zsq.runs.record import Record
from zsq.runs.request import AllocateRequest, AskedNetwork, QuantizeRequest, SynthesizeRequest
from zsq.runs.settings import resolve
from zsq.runs.settings_file import stored_spec, teacher_table, write_settings
from zsq.runs.stored_network import stored_network
from zsq.runtime.checksums import COMMENT, sealed_text

NETWORK = """
from zsq.data.digits.network import DigitsNet

def build():
    return DigitsNet()
"""
IMAGES = {"input": (1, 8, 8), "classes": 10, "mean": (0.3,), "std": (0.4,)}
TINY = [
    *("--set", "method.steps=5", "--set", "method.batch_size=16", "--set", "method.width=8"),
    *("--set", "quantizer.num_samples=64"),
]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def own_network(place: Path) -> None:
    """Write net.py and net.pth, a network of one's own, to a folder."""
    (place / "net.py").write_text(NETWORK)
    torch.save(load_file(digits.NETWORK.weights), place / "net.pth")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder: a network of one's own, and `runs/a` as a run that was started with it leaves it."""
    monkeypatch.chdir(tmp_path)
    own_network(tmp_path)
    teacher = load_teacher("net.py:build", weights="net.pth", **IMAGES)
    facts = {"seed": 7, "data": "test.npz", "directory": str(tmp_path), "class_names": list(WORDS), "zsq": "0.2.0"}
    write_settings(Path("runs/a/settings.toml"), resolve(), teacher_table(teacher), facts)
    return tmp_path


@pytest.fixture
def elsewhere(work, monkeypatch):
    """Another current folder."""
    (work / "other").mkdir()
    monkeypatch.chdir(work / "other")
    return Path("..")


def test_a_folder_knows_its_network_images_and_names(work):
    request = completed(QuantizeRequest(resume=True, out="runs/a"))
    assert request.network == stored_network(Path("runs/a/settings.toml"))
    known = {name: getattr(request.network, name) for name in ("model", "weights", *IMAGES)}
    assert known == {"model": "net.py:build", "weights": str(work / "net.pth")} | IMAGES
    assert (request.data, request.class_names, request.folder) == ("test.npz", WORDS, Path("runs/a"))
    assert request.teacher().spec == stored_spec(Path("runs/a/settings.toml"))


def test_what_is_said_wins_over_the_folder(work):
    network = AskedNetwork(weights="here.pth", resize=9)
    request = completed(
        QuantizeRequest(network, from_run="runs/a", out="b", bits=4, data="mine.npz", class_names="c.txt")
    )
    assert (request.network.weights, request.network.resize, request.network.input) == ("here.pth", 9, (1, 8, 8))
    assert (request.data, request.class_names, request.out) == ("mine.npz", "c.txt", "b")


def test_a_network_that_is_named_takes_nothing_from_the_folder(work):
    request = QuantizeRequest("digits", out="b", from_run="runs/a")
    assert completed(request) is request


@pytest.mark.parametrize(
    ("request_", "folder"),
    [
        (QuantizeRequest(from_run="runs/a", bits=4), "runs/a-4"),
        (QuantizeRequest(from_run="runs/a", bits="mixed/bits.toml", quantizer="qat"), "runs/a-qat-bits"),
        (QuantizeRequest(from_run="runs/a", target="litert"), "runs/a-litert"),
        (QuantizeRequest(recipe="runs/a/settings.toml"), "runs/a-again"),
        (SynthesizeRequest(from_run="runs/a"), "runs/a-images"),
        (AllocateRequest(from_run="runs/a", average=4), "runs/a-bits"),
        (QuantizeRequest(from_run="runs/a", out="x"), "x"),
    ],
)
def test_a_run_that_builds_on_another_lies_beside_it(work, request_, folder):
    assert completed(request_).folder == Path(folder)


def test_a_path_without_a_name_has_a_folder_beside_it(work, monkeypatch):
    monkeypatch.chdir("runs/a")
    assert completed(QuantizeRequest(from_run=".", bits=4)).folder == work / "runs" / "a-4"


def test_the_folder_is_understood_from_anywhere(elsewhere, work):
    (work / "test.npz").touch()
    request = completed(QuantizeRequest(from_run=elsewhere / "runs" / "a", bits=4))
    assert request.network.model == f"{work / 'net.py'}:build"
    assert request.data == str(work / "test.npz")
    assert request.teacher().weights_sha256 == request.network.sha256


def test_resume_takes_a_folder_in_place_of_the_network():
    request = resumed(QuantizeRequest(AskedNetwork(model="runs/a", weights="w.pth"), resume=True))
    assert (request.out, request.network) == ("runs/a", AskedNetwork(weights="w.pth"))
    for other in (QuantizeRequest(AskedNetwork(model="digits"), resume=True, out="x"), QuantizeRequest("digits")):
        assert resumed(other) is other


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (QuantizeRequest(), "which network? Give MODEL"),
        (QuantizeRequest(out="x", recipe="plain.toml"), "which network?"),
        (QuantizeRequest("digits"), "where to? Give --out DIR."),
        (QuantizeRequest(resume=True, out="runs"), "runs holds no run to continue."),
        (QuantizeRequest(resume=True, from_run="runs/a"), "where to?"),
        (QuantizeRequest(from_run="runs/a"), ""),
        (QuantizeRequest(AskedNetwork(), recipe="runs/a/settings.toml"), ""),
    ],
)
def test_what_is_lacking_is_told(work, request_, message):
    Path("plain.toml").write_text("[method]\nsteps = 3\n")
    assert lacking(request_).startswith(message)
    assert bool(lacking(request_)) == bool(message)
    if message:
        with pytest.raises(InputError, match=r"which|where|holds no run"):
            completed(request_)


def test_a_folder_in_place_of_a_network_says_how(work):
    with pytest.raises(
        InputError, match=r"'runs/a' is the folder of a run: resume=True, out='runs/a' continues it, from_run"
    ):
        completed(QuantizeRequest("runs/a", out="b"))


def test_weights_that_have_moved_are_asked_for_by_name(work):
    Path("net.pth").rename("moved.pth")
    with pytest.raises(InputError, match=r"net\.pth \(sha256 [0-9a-f]{12}\), which are gone; .* weights=FILE"):
        completed(QuantizeRequest(from_run="runs/a")).teacher()
    network = AskedNetwork(weights="moved.pth")
    assert completed(QuantizeRequest(network, from_run="runs/a")).teacher().weights_file == str(work / "moved.pth")


def test_weights_that_have_changed_are_refused_by_hash(work):
    state = torch.load("net.pth")
    state["fc.bias"] += 1
    torch.save(state, "net.pth")
    with pytest.raises(InputError, match=r"net\.pth has other weights \(sha256 .*\) than the run of runs/a/settings"):
        completed(QuantizeRequest(recipe="runs/a/settings.toml")).teacher()


def rewrite(path: Path, old: str, new: str) -> None:
    """Write a settings.toml as another zsq, or another run, would have written it."""
    text = path.read_text().rpartition(COMMENT)[0]
    assert old in text
    path.write_text(sealed_text(text.replace(old, new)))


def test_code_that_is_gone_is_named(work):
    Path("net.py").unlink()
    with pytest.raises(InputError, match=r"is of network net\.py:build, and net\.py is gone; name it as MODEL"):
        completed(QuantizeRequest(from_run="runs/a")).teacher()


def test_a_module_in_memory_cannot_be_told_by_a_folder(work):
    rewrite(Path("runs/a/settings.toml"), '"net.pth"', '"memory"')
    with pytest.raises(InputError, match="a module in memory; in Python, give it with its ImageSpec"):
        completed(QuantizeRequest(from_run="runs/a"))


def test_weights_that_nobody_placed_are_looked_for_where_the_run_was_started(elsewhere, work):
    """As a folder of an older version has them, or one written by Python."""
    path = elsewhere / "runs" / "a" / "settings.toml"
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("weights_file"))
    rewrite(path, f"{line}\n", "")
    assert stored_network(path).weights == str(work / "net.pth")


@pytest.mark.parametrize("flag", ["from", "recipe", "resume"])
def test_a_folder_of_another_version_says_so(work, flag, capsys):
    path = Path("runs/a/settings.toml")
    rewrite(path, 'zsq = "0.2.0"', 'zsq = "9.1"')
    rewrite(path, "beta1", "beta_one")
    Path("test.npz").touch()
    Path("runs/a/generator.safetensors").touch()
    given = {
        "from": ["--from", "runs/a"],
        "recipe": ["--recipe", str(path)],
        "resume": ["--resume", "runs/a"],
    }
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", *given[flag], "--data", "digits"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    if flag == "from":  # the generator is read first
        assert "generator.safetensors is not a readable" in error
    else:
        assert "settings.toml was written by zsq 9.1, and this is zsq 0.2.0. " in error
        assert "Unknown method setting 'method.beta_one'" in error


def hashes(folder: Path) -> dict[str, str]:
    return {name: canonical_sha256(folder / name) for name in HASHED if (folder / name).exists()}


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """A folder in which somebody quantized a network of one's own with images in class folders of another order."""
    place = tmp_path_factory.mktemp("journey")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        own_network(place)
        teacher = load_teacher("digits")
        (batch,) = open_dataset("digits", teacher.spec, limit=50).batches(50)
        pixels = teacher.spec.to_pixels(batch.images).numpy()
        for index, (image, label) in enumerate(zip(pixels, batch.labels.tolist(), strict=True)):
            for folder in ("flat", f"test/{WORDS[label]}"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[..., 0]).save(f"{folder}/{index:02}.png")
        Path("names.txt").write_text("\n".join(WORDS))
        network = ["net.py:build", "--weights", "net.pth", "--input", "1x8x8", "--classes", "10"]
        network += ["--mean", "0.305", "--std", "0.3757"]
        run("quantize", *network, *TINY, "--data", "test", "--class-names", "names.txt", "--out", "runs/a")
        Path("other").mkdir()
    return place


@pytest.fixture
def away(journey, monkeypatch):
    monkeypatch.chdir(journey / "other")
    return Path("..") / "runs"


@pytest.mark.slow
def test_settings_repeat_a_run_to_the_same_hashes(away, tmp_path):
    run("quantize", "--recipe", away / "a/settings.toml", "--out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(away / "a")
    assert len(hashes(tmp_path / "again")) == 3
    found, was = Record.read(tmp_path / "again"), Record.read(away / "a")
    assert (found.evaluation, found.seed, found.weights_sha256) == (was.evaluation, was.seed, was.weights_sha256)


@pytest.mark.slow
def test_a_run_from_another_and_its_repetition_have_the_same_hashes(away, tmp_path):
    run("quantize", "--from", away / "a", "--bits", "4", "--out", tmp_path / "four")
    record = Record.read(tmp_path / "four")
    assert (record.bits, record.num_eval_images) == ("4", 50)
    run("quantize", "--recipe", tmp_path / "four" / "settings.toml", "--out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "four")
    (tmp_path / "again" / "model.onnx").unlink()
    run("quantize", "--resume", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "four")


@pytest.mark.slow
def test_a_run_is_measured_and_exported_by_its_folder_alone(away, capsys):
    capsys.readouterr()
    run("evaluate", away / "a", "--data", Path("..") / "test", "--json")  # in the order of its own class names
    labelled = json.loads(capsys.readouterr().out)["model.onnx"]
    assert labelled["top1"] == Record.read(away / "a").quantized_top1
    run("evaluate", away / "a", "--data", Path("..") / "flat", "--json")  # of no labels: beside its float network
    agreement = json.loads(capsys.readouterr().out)["model.onnx"]
    assert agreement["teacher_agreement"] == Record.read(away / "a").teacher_agreement
    run("evaluate", "--file", away / "a", "--data", Path("..") / "test", "--json")
    float_network, file = json.loads(capsys.readouterr().out)
    assert float_network.endswith("net.py:build")
    assert file == "model.onnx"
    run("export", away / "a", "--target", "openvino", "--overwrite")
    assert (away / "a" / "model_openvino.onnx").is_file()


@pytest.mark.slow
def test_images_come_from_the_folder_alone(away, tmp_path):
    run("synthesize", "--from", away / "a", "--count", "20", "--out", tmp_path / "images")
    assert (tmp_path / "images" / "images.npz").is_file()


@pytest.mark.slow
def test_a_named_network_of_python_is_known_to_the_command_line(work):
    network = Network(model="net.py:build", weights="net.pth", **IMAGES)
    quantize(network, method=Noise(), settings={"quantizer.num_samples": 8}, out="runs/b", quiet=True)
    assert stored_network(Path("runs/b/settings.toml")).load().name == "net.py:build"


def test_too_few_class_names_are_refused_before_anything_is_written(work, capsys):
    Path("few.txt").write_text("zero\none\n")
    (Path("test") / "zero").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["quantize", "digits", "--data", "test", "--class-names", "few.txt", "--out", "run"])
    assert "few.txt names 2 classes, one a line; the teacher knows 10." in capsys.readouterr().err
    assert not Path("run").exists()


def test_three_images_among_a_thousand_other_files(work, said):
    place = Path("frames")
    place.mkdir()
    for index in range(1000):
        (place / f"{index}.txt").touch()
    for index in range(3):
        Image.new("L", (8, 8), index).save(place / f"{index}.png")
    data = open_dataset("frames", load_teacher("digits").spec)
    assert (data.num_images, data.labelled) == (3, False)
    assert data.notices == ["data set 'frames' has 3 images and no labels; 1000 other files are left out"]

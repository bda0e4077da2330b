"""Whole runs, as small as they get: the bundled digits, five generator steps, four of distillation."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import zsq
from zsq.data.datasets import open_dataset
from zsq.errors import ExportError, InputError, NumericsError
from zsq.evaluation.accuracy import evaluate
from zsq.export.content_hash import canonical_sha256
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.methods import ZSCGAN
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import QAT
from zsq.runs import budget, stages
from zsq.runs.budget import Costs, Plan
from zsq.runs.fitted import GENERATOR
from zsq.runs.folder import ARTIFACTS
from zsq.runs.pipeline import HASHED
from zsq.runs.quantize import Result, quantize
from zsq.runs.record import SCHEMA
from zsq.runs.settings import resolve
from zsq.runs.settings_file import stored_spec
from zsq.runs.stages import PROGRAM
from zsq.runtime.files import load_tensors
from zsq.training.loop import Run
from zsq.types import ImageSpec

FIT = ("method.steps=5", "method.batch_size=16", "method.width=8")
PTQ = (*FIT, "quantizer.num_samples=64")
QAT_ = (*PTQ, "quantizer.steps=4")

ISSUE_FIELDS = {
    *("model", "weights_sha256", "method", "quantizer", "bits", "seed"),
    *("float_top1", "quantized_top1", "simulated_top1", "teacher_agreement", "runtime_agreement", "label_recognition"),
    *("num_eval_images", "num_calibration_images", "seconds", "artifacts"),
}
PERCENTAGES = ("float_top1", "quantized_top1", "simulated_top1", "teacher_agreement", "runtime_agreement")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits")


@pytest.fixture(scope="module")
def ptq(teacher, tmp_path_factory) -> Result:
    """An unbroken run, evaluated."""
    return quantize(teacher, out=tmp_path_factory.mktemp("ptq") / "run", settings=PTQ, data="digits")


@pytest.fixture(scope="module")
def qat(teacher, tmp_path_factory) -> Result:
    """An unbroken run with distillation."""
    return quantize(teacher, out=tmp_path_factory.mktemp("qat") / "run", settings=QAT_, quantizer="qat", bits=4)


def hashes(folder: Path) -> dict[str, str]:
    return {name: canonical_sha256(folder / name) for name in HASHED if (folder / name).exists()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_all_files_of_the_run_exist(ptq, qat):
    assert {path.name for path in ptq.folder.iterdir()} == {*ARTIFACTS, "checkpoints", "report.html"}
    assert [path.name for path in (ptq.folder / "checkpoints").iterdir()] == ["fit.safetensors"]
    assert {path.name for path in qat.folder.iterdir()} == {*ARTIFACTS, "checkpoints", "report.html"}
    assert sorted(p.name for p in (qat.folder / "checkpoints").iterdir()) == ["distill.safetensors", "fit.safetensors"]
    with Image.open(ptq.folder / "samples.png") as picture:
        assert picture.size == (500, 500)


def test_result_has_the_promised_fields(ptq):
    record = json.loads((ptq.folder / "result.json").read_text())
    assert len(record.pop("content_sha256")) == 64
    assert record == json.loads(json.dumps(ptq.record.as_dict()))
    assert record["schema"] == SCHEMA
    assert record.keys() >= ISSUE_FIELDS
    assert (record["model"], record["method"], record["quantizer"], record["bits"]) == ("digits", "zscgan", "ptq", "8")
    assert (record["seed"], record["num_eval_images"], record["num_calibration_images"]) == (0, 899, 64)
    assert len(record["weights_sha256"]) == 64
    assert record["seconds"] > 0
    assert record["activation_scope"] == "all"
    assert record["data_free"] is True
    assert record["weights"] == "bundled"


@pytest.mark.parametrize("name", [*PERCENTAGES, "label_recognition"])
def test_percentages_run_from_0_to_100(ptq, name):
    value = getattr(ptq.record, name)
    assert isinstance(value, float)
    assert 0 <= value <= 100
    if name in ("float_top1", "runtime_agreement"):
        assert value > 95  # a share would be below 1


def test_artifacts_are_listed_with_size_and_hash(ptq):
    assert ptq.record.artifacts.keys() == {GENERATOR, PROGRAM, "model.onnx"}
    for name, artifact in ptq.record.artifacts.items():
        assert artifact.bytes == (ptq.folder / name).stat().st_size
        assert artifact.sha256 == canonical_sha256(ptq.folder / name)


def test_a_file_says_where_it_comes_from(ptq, teacher):
    noted = {entry.key: entry.value for entry in onnx.load(ptq.folder / "model.onnx").metadata_props}
    assert noted.pop("image_spec")
    expected = {"bits": ptq.record.bits, "target": "onnxruntime", "weights_sha256": teacher.weights_sha256}
    assert noted == expected | {"zsq_version": ptq.record.versions["zsq"]}


def test_recorded_accuracy_is_that_of_the_file(ptq, teacher):
    data = open_dataset("digits", teacher.spec)
    file = evaluate(OnnxClassifier(ptq.folder / "model.onnx"), data, teacher=teacher.network)
    recorded = ptq.record.evaluation["quantized"]
    assert replace(recorded, minus_float=None) == file
    assert recorded.minus_float.mean == pytest.approx(ptq.record.quantized_top1 - ptq.record.float_top1)
    assert ptq.record.quantized_top1 == file.top1
    assert ptq.record.teacher_agreement == file.teacher_agreement
    float_ = evaluate(teacher.network, data)
    assert ptq.record.float_top1 == float_.top1
    assert ptq.record.evaluation["float"].teacher_agreement == 100


@pytest.mark.slow
def test_without_data_no_accuracy_is_claimed(qat):
    for name in ("float_top1", "quantized_top1", "simulated_top1", "teacher_agreement", "data"):
        assert getattr(qat.record, name) is None
    assert qat.record.num_eval_images == 0
    assert qat.record.evaluation == {}
    assert 100 <= qat.record.verification.num_images <= 500


@pytest.mark.slow
def test_settings_are_resolved_and_facts_are_written(qat, teacher):
    content = tomllib.loads((qat.folder / "settings.toml").read_text())
    assert content["teacher"]["weights_sha256"] == teacher.weights_sha256
    assert content["method"]["steps"] == 5
    assert content["quantizer"] | {"name": "qat", "bits": "4", "steps": 4} == content["quantizer"]
    assert content["run"].keys() >= {"seed", "device", "threads", "zsq", "torch", "onnxruntime", "python"}
    assert content["run"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_metrics_tell_each_loss_of_both_phases(qat):
    lines = [json.loads(line) for line in (qat.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("fit", 5), ("distill", 4)]
    assert lines[0].keys() >= {"ce", "bns", "label_recognition"}
    assert lines[1].keys() >= {"kd", "agreement", "ce", "bns", "label_recognition"}


@pytest.mark.slow
def test_low_recognition_is_a_loud_warning(teacher, tmp_path, monkeypatch, said):
    monkeypatch.setattr(stages, "write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path, settings=PTQ)
    assert [text for text in said if text.startswith("WARNING: the teacher recognises ")]


def _stop(*_, **__) -> None:
    raise InputError("far enough")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ptq", "qat"])
def test_two_repetitions_give_the_same_hashes(request, teacher, tmp_path, name):
    """Evaluation, checkpoints and folder enter no hash; the written settings are the recipe."""
    first: Result = request.getfixturevalue(name)
    torch.manual_seed(12345)
    again = quantize(teacher, out=tmp_path / "again", recipe=first.folder / "settings.toml", checkpoint_every=2)
    assert hashes(again.folder) == hashes(first.folder)
    assert again.record.artifacts == first.record.artifacts
    assert (again.folder / "model.onnx").read_bytes() == (first.folder / "model.onnx").read_bytes()
    assert (again.folder / "samples.png").read_bytes() == (first.folder / "samples.png").read_bytes()


@pytest.mark.slow
def test_another_seed_gives_another_generator(ptq, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path, settings=PTQ, seed=1)
    assert hashes(tmp_path)["generator.safetensors"] != hashes(ptq.folder)["generator.safetensors"]


@pytest.mark.slow
def test_the_teacher_is_left_alone(qat, teacher):
    assert load_teacher("digits").weights_sha256 == teacher.weights_sha256 == qat.record.weights_sha256
    fresh = load_teacher("digits").network.state_dict()
    assert all(value.equal(fresh[name]) for name, value in teacher.network.state_dict().items())


@pytest.mark.slow
def test_several_widths_take_one_fit(ptq, teacher, tmp_path):
    before = contents(ptq.folder)
    models = set()
    for quantizer, bits in (("ptq", "6"), ("qat", "W4A8")):
        settings = tuple(text for text in (QAT_ if quantizer == "qat" else PTQ) if text.startswith("quantizer."))
        result = quantize(
            teacher,
            out=tmp_path / bits,
            settings=settings,
            from_run=ptq.folder,
            quantizer=quantizer,
            bits=bits,
            data="digits",
        )
        assert hashes(result.folder)["generator.safetensors"] == hashes(ptq.folder)["generator.safetensors"]
        assert not (result.folder / "checkpoints" / "fit.safetensors").exists()
        assert result.record.settings["method"] == ptq.record.settings["method"]
        assert result.record.bits == bits
        assert result.record.label_recognition == ptq.record.label_recognition
        models.add(hashes(result.folder)["model.onnx"])
    assert len(models) == 2
    assert contents(ptq.folder) == before


@pytest.mark.slow
def test_a_reused_generator_gives_the_model_of_its_own_run(ptq, teacher, tmp_path):
    result = quantize(teacher, out=tmp_path / "run", settings=("quantizer.num_samples=64",), from_run=ptq.folder)
    assert hashes(result.folder) == hashes(ptq.folder)


def network(channels: int = 4, classes: int = 7) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, classes),
        )
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        nn.init.normal_(net[-1].weight, std=3.0)
    return net


SPEC = ImageSpec(channels=4, height=9, width=12, classes=7, mean=(0.5, 0.4, 0.3, 0.2), std=(0.25, 0.2, 0.3, 0.5))


def test_a_generator_of_another_network_is_refused(ptq, tmp_path):
    spec = replace(SPEC, channels=1, height=8, width=8, classes=10, mean=(0.3050,), std=(0.3757,))
    with pytest.raises(InputError, match=r"generator\.safetensors was fitted to other weights"):
        quantize(network(1, 10), spec, out=tmp_path / "other", from_run=ptq.folder)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_module_in_memory_with_4_channels_and_7_classes(tmp_path):
    net = network()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = zsq.quantize(net, SPEC, bits="W4A8", settings=PTQ, out=tmp_path / "run")
    logits = result.model(torch.randn(5, 4, 9, 12))
    assert logits.shape == (5, 7)
    assert result.record.weights == "memory"
    assert net.training
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.height == 7 * (5 * 9 + 2)


@pytest.mark.slow
def test_settings_objects_work_in_place_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_file", _stop)
    method, quantizer = ZSCGAN(steps=3, batch_size=8, width=8), QAT(steps=2, num_samples=32, bits="6")
    with pytest.raises(InputError, match="far enough"):
        quantize(network(), SPEC, method=method, quantizer=quantizer, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("fit", 3), ("distill", 2)]
    written = resolve(recipe=tmp_path / "settings.toml")
    assert (written.method, written.quantizer) == (method, quantizer)


def test_a_module_needs_its_spec(tmp_path):
    with pytest.raises(InputError, match="a module in memory needs its ImageSpec"):
        quantize(network(), out=tmp_path / "run")


@pytest.mark.slow
def test_two_classes_work(tmp_path):
    record = quantize(network(4, 2), replace(SPEC, classes=2), out=tmp_path / "run", settings=PTQ).record
    assert record.runtime_agreement > 95


def test_one_logit_tells_two_classes_apart(tmp_path):
    record = quantize(network(4, 1), replace(SPEC, classes=1), out=tmp_path / "run", settings=PTQ).record
    assert stored_spec(tmp_path / "run" / "settings.toml").classes == 2
    assert record.samples is not None
    assert {measure.name for measure in record.samples.measures} == {"same class"}


@pytest.mark.slow
def test_real_images_calibrate_what_there_are(teacher, tmp_path):
    settings = ("method.data=digits:train", "quantizer.num_samples=5000")
    record = quantize(teacher, out=tmp_path / "run", method="real", settings=settings, data="digits").record
    assert record.data_free is False
    assert record.num_calibration_images == 898
    assert record.label_recognition > 98
    assert record.quantized_top1 > 97
    assert "generator.safetensors" not in record.artifacts
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.slow
def test_noise_serves_distillation(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_file", _stop)
    settings = ("method.batch_size=16", "quantizer.num_samples=300", "quantizer.steps=4")
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path, method="noise", quantizer="qat", settings=settings)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("distill", 4)]
    assert not (tmp_path / "generator.safetensors").exists()
    assert (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_noise_alone_calibrates(teacher, tmp_path):
    record = quantize(teacher, out=tmp_path / "run", method="noise", settings=("quantizer.num_samples=300",)).record
    assert (record.method, record.data_free, record.num_calibration_images) == ("noise", True, 300)
    assert record.artifacts.keys() == {"model.onnx", "model.pt2"}


@pytest.mark.slow
def test_noise_has_no_generator_to_reuse(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path / "noise", method="noise", settings=("quantizer.num_samples=8",))
    with pytest.raises(InputError, match=r"holds no generator\.safetensors"):
        quantize(teacher, out=tmp_path / "next", from_run=tmp_path / "noise")


@pytest.mark.slow
def test_a_file_that_disagrees_fails_and_keeps_everything(ptq, teacher, tmp_path, monkeypatch):
    honest = stages.verify_file

    def disagree(*arguments, **rest):
        return replace(honest(*arguments, **rest), decided_agreement=90.0)

    monkeypatch.setattr(stages, "verify_file", disagree)
    with pytest.raises(ExportError, match=r"the same class on 90\.00 % of \d+ decided images, where 99 % is required"):
        quantize(teacher, out=tmp_path / "run", settings=PTQ, data="digits")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*ARTIFACTS, "checkpoints", "report.html"}
    assert hashes(tmp_path / "run") == hashes(ptq.folder)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["verification"]["decided_agreement"] == 90.0
    assert record["quantized_top1"] == ptq.record.quantized_top1


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_to_onnx_keeps_the_fit(teacher, tmp_path, monkeypatch):
    def fail(*_, **__) -> None:
        raise ExportError("the network has no ONNX form")

    monkeypatch.setattr(stages, "write_file", fail)
    with pytest.raises(ExportError, match="no ONNX form"):
        quantize(teacher, out=tmp_path, settings=PTQ)
    assert {"settings.toml", "generator.safetensors", "samples.png", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(teacher, tmp_path):
    settings = ("method.steps=40", "method.batch_size=16", "method.width=8", "method.learning_rate=1e30")
    with pytest.raises(NumericsError, match=r"fit: loss '(ce|bns)' is (nan|inf) at step \d+ of 40"):
        quantize(teacher, out=tmp_path, settings=settings)
    assert not (tmp_path / "generator.safetensors").exists()


def test_a_folder_that_holds_a_run_is_refused_and_kept(ptq, teacher):
    before = contents(ptq.folder)
    with pytest.raises(InputError, match="holds another run"):
        quantize(teacher, out=ptq.folder, settings=PTQ)
    with pytest.raises(InputError, match=r"method\.steps is 5 there, not 6"):
        quantize(teacher, out=ptq.folder, settings=("method.steps=6",), resume=True)
    assert contents(ptq.folder) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": "5x"},
        {"budget": 1e-6},
        {"settings": ("method.step=3",)},
        {"data": "nowhere.npz"},
        {"bits": "9"},
        {"from_run": "nowhere"},
        {"device": "tpu"},
        {"checkpoint_every": 0},
        {"recipe": "nowhere.toml"},
    ],
)
def test_a_mistake_beside_overwrite_loses_nothing(ptq, teacher, wrong):
    before = contents(ptq.folder)
    with pytest.raises(InputError):
        quantize(teacher, out=ptq.folder, overwrite=True, **wrong)
    assert contents(ptq.folder) == before


@pytest.mark.slow
def test_a_budget_chooses_steps_that_repeat_the_run(ptq, teacher, tmp_path, monkeypatch, said):
    def chosen(settings, *_, **__):
        return Plan(settings.with_steps(method=5), Costs(0.25, 0.0, 0.0, 3.0), 0)

    monkeypatch.setattr(budget, "plan", chosen)
    monkeypatch.setattr(stages, "write_file", _stop)
    settings = tuple(text for text in PTQ if "steps" not in text)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path, settings=settings, budget="1m")
    content = tomllib.loads((tmp_path / "settings.toml").read_text())
    assert content["method"]["steps"] == 5
    assert content["run"]["budget_seconds"] == 60
    assert "schedule: 5 generator steps of 0.250 s; 3 s for the rest (64 calibration images); 4 s expected" in said
    assert hashes(tmp_path)["generator.safetensors"] == hashes(ptq.folder)["generator.safetensors"]


@pytest.mark.slow
def test_a_finished_run_may_be_resumed_and_knows_its_settings(ptq, teacher):
    before = hashes(ptq.folder)
    result = quantize(teacher, out=ptq.folder, data="digits", resume=True)
    assert hashes(ptq.folder) == before
    assert result.record.quantized_top1 == ptq.record.quantized_top1
    assert result.record.settings == ptq.record.settings


@pytest.mark.slow
def test_overwrite_starts_anew(ptq, teacher, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("settings.toml", "generator.safetensors", "checkpoints/fit.safetensors", "metrics.jsonl"):
        (folder / name).write_text("of another run")
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(stages, "write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=folder, settings=PTQ, overwrite=True)
    assert hashes(folder)["generator.safetensors"] == hashes(ptq.folder)["generator.safetensors"]
    assert (folder / "metrics.jsonl").read_bytes() == (ptq.folder / "metrics.jsonl").read_bytes()
    assert (folder / "notes.txt").read_text() == "mine"


MOMENTS = {
    "in a later step of fit": ("update", "fit", 4),
    "while a checkpoint of fit is written": ("replace", "fit.safetensors", 3),
    "while the generator is written": ("replace", "generator.safetensors", 1),
    "during calibration": ("update", "calibrate 1/2", 1),
    "while a checkpoint of distillation is written": ("replace", "distill.safetensors", 2),
    "in the last step of distillation": ("update", "distill", 4),
    "between the two exported files": ("replace", "model.pt2", 1),
}
"""When a run is killed: at the n-th file of this name, or at the n-th sign of progress of this phase."""

DRIVER = """
import json, os, signal, sys, torch, zsq
torch.set_num_threads(1)
teacher = zsq.load_teacher("digits")

def run(kind, name, count, arguments):
    seen, replace = [], os.replace

    def reached(found):
        seen.append(found)
        if seen.count(name) == count and found == name:
            os.kill(os.getpid(), signal.SIGKILL)

    class Watch:
        def update(self, phase, done, total, values):
            if kind == "update":
                reached(phase)

    def watched(source, target):
        if kind == "replace":
            reached(os.path.basename(target))
        replace(source, target)

    os.replace = watched
    zsq.quantize(teacher, observer=Watch(), checkpoint_every=1, **arguments)

run(*json.loads(sys.argv[1]))
"""
"""Runs one job in a process of its own: builds of torch for CUDA cannot train in a forked child."""

KILLED_ARGUMENTS = {"settings": QAT_, "quantizer": "qat", "bits": "4", "seed": 0}


def kill(jobs: list[tuple]) -> list[int]:
    """Run jobs (kind, name, count, arguments) until each is killed; return the exit codes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def code_of(job: tuple) -> int:
        command = [sys.executable, "-c", DRIVER, json.dumps(job)]
        return subprocess.run(command, capture_output=True, check=False, env=environment).returncode

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(code_of, jobs))


@pytest.fixture(scope="module")
def killed(tmp_path_factory, ptq) -> Path:
    """A folder with a killed run for each moment, and one that was killed while it reused a generator."""
    folder = tmp_path_factory.mktemp("killed")
    jobs = [(*moment, KILLED_ARGUMENTS | {"out": str(folder / name)}) for name, moment in MOMENTS.items()]
    settings = ("quantizer.steps=4", "quantizer.num_samples=64")
    reuse = {"settings": settings, "quantizer": "qat", "bits": "4", "from_run": str(ptq.folder)}
    jobs.append(("update", "distill", 2, reuse | {"out": str(folder / "from")}))
    codes = kill(jobs)
    assert codes == [-signal.SIGKILL] * len(jobs), dict(zip([*MOMENTS, "from"], codes, strict=True))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_hashes(qat, killed, teacher, moment):
    folder = killed / moment
    assert not (folder / "result.json").exists()
    result = quantize(teacher, out=folder, resume=True, checkpoint_every=1, **KILLED_ARGUMENTS)
    assert hashes(folder) == hashes(qat.folder)
    assert result.record.artifacts == qat.record.artifacts
    assert {path.name for path in folder.iterdir()} == {
        *ARTIFACTS,
        "checkpoints",
        "report.html",
    }  # nothing half-written is left
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [("fit", step) for step in range(1, 6)] + [("distill", step) for step in range(1, 5)]
    assert [(line["phase"], line["step"]) for line in steps] == wanted
    whole = [json.loads(line) for line in (qat.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[4] == whole[0]
    assert steps[-1] == whole[-1]
    assert load_tensors(folder / "checkpoints" / "distill.safetensors")[1]["step"] == "4"


@pytest.mark.slow
def test_a_killed_run_on_a_reused_generator_goes_on_with_it(ptq, killed, teacher, tmp_path, monkeypatch):
    folder, settings = killed / "from", ("quantizer.steps=4", "quantizer.num_samples=64")
    with pytest.raises(InputError, match="it was started with from_run; give it again"):
        quantize(teacher, out=folder, resume=True)
    arguments = {"settings": settings, "quantizer": "qat", "bits": 4, "from_run": ptq.folder}
    monkeypatch.setattr(stages, "write_file", _stop)  # what is exported follows from the last checkpoint
    for out, resume in ((folder, True), (tmp_path / "whole", False)):
        with pytest.raises(InputError, match="far enough"):
            quantize(teacher, out=out, resume=resume, checkpoint_every=1, **arguments)
        assert hashes(out)["generator.safetensors"] == hashes(ptq.folder)["generator.safetensors"]
    last = Path("checkpoints", "distill.safetensors")
    assert canonical_sha256(folder / last) == canonical_sha256(tmp_path / "whole" / last)
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_data_may_be_a_path(teacher, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.zeros(4, int))
    result = quantize(
        teacher, out=tmp_path / "run", method="noise", settings=("quantizer.num_samples=16",), data=tmp_path / "x.npz"
    )
    assert result.record.data == str(tmp_path / "x.npz")


@pytest.mark.slow
def test_agreement_on_fresh_samples_stands_for_accuracy_where_no_data_is_given(teacher, tmp_path, said):
    """Real images in the place of samples: then both are known."""
    settings = {"method.data": "digits:train", "method.limit": 500}
    result = quantize(teacher, out=tmp_path / "8", method="real", settings=settings, quiet=True)
    assert result.record.samples.num_images == 449  # every second of 898
    assert result.record.samples.num_classes == 10
    assert result.record.samples.teacher_agreement > 98
    assert not [text for text in said if "WARNING" in text]
    low = quantize(
        teacher, out=tmp_path / "2", method="real", bits=2, settings=settings, quiet=True
    ).record.samples.teacher_agreement
    assert low < 80
    assert [f"for only {low:.1f} % of the samples; --quantizer qat or more bits" in said[-1]] == [True]


@pytest.mark.slow
def test_samples_of_few_classes_tell_nothing(ptq, teacher, tmp_path, said):
    settings = ("method.steps=1", "method.batch_size=8", "method.width=8", "quantizer.num_samples=16")
    settings += ("method.bound_contrast=false",)
    result = quantize(teacher, out=tmp_path, settings=settings, quiet=True)
    assert result.record.samples.teacher_agreement is None
    assert 1 <= result.record.samples.num_classes < 5
    assert any("too few to tell how good model.onnx is" in line for line in said)
    assert ptq.record.samples.num_images == 100  # 64 calibrate


def test_fresh_samples_are_others_than_those_that_calibrate(teacher):
    source = resolve(assignments=FIT).method.fit(teacher, Run()).source
    used = {image.numpy().tobytes() for batch in source.sample(100) for image in batch.images}
    fresh = {image.numpy().tobytes() for batch in stages.FreshSamples(source, 100).batches() for image in batch.images}
    assert len(used) == len(fresh) == 100
    assert not used & fresh


@pytest.mark.slow
def test_progress_and_warnings_are_shown_unless_quiet(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "write_file", _stop)
    for quiet in (False, True):
        with pytest.raises(InputError, match="far enough"):
            quantize(teacher, out=tmp_path / str(quiet), settings=PTQ, quiet=quiet)
        assert ("WARNING: the teacher recognises" in capsys.readouterr().err) is not quiet


def test_settings_as_one_text_are_refused(teacher, tmp_path):
    with pytest.raises(InputError, match=r"settings is the text 'method.steps=5'; give a tuple"):
        quantize(teacher, out=tmp_path / "run", settings="method.steps=5")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_recipe_of_a_run_brings_its_seed(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_file", _stop)
    hashed = []
    for name, arguments in {
        "first": {"settings": PTQ, "seed": 3},
        "again": {"recipe": tmp_path / "first" / "settings.toml"},
        "other": {"recipe": tmp_path / "first" / "settings.toml", "seed": 4},
    }.items():
        with pytest.raises(InputError, match="far enough"):
            quantize(teacher, out=tmp_path / name, **arguments)
        hashed.append(hashes(tmp_path / name)["generator.safetensors"])
    assert hashed[0] == hashed[1] != hashed[2]
    with pytest.raises(InputError, match="far enough"):  # the seed of the run that is resumed
        quantize(teacher, out=tmp_path / "first", resume=True)


@pytest.mark.slow
def test_a_generator_that_was_cut_is_written_anew_on_resume(ptq, teacher, tmp_path, said):
    folder = tmp_path / "run"
    shutil.copytree(ptq.folder, folder)
    os.truncate(folder / "generator.safetensors", 1000)
    quantize(teacher, out=folder, settings=PTQ, data="digits", resume=True, quiet=True)
    assert hashes(folder) == hashes(ptq.folder)
    assert "generator.safetensors is not a readable safetensors file" in "".join(said)


@pytest.mark.slow
def test_resuming_nothing_says_so(teacher, tmp_path, monkeypatch, said):
    monkeypatch.setattr(stages, "write_file", _stop)
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path / "run", settings=PTQ, resume=True)
    assert f"{tmp_path / 'run'} holds no run to continue; this one starts anew" in said


@pytest.mark.slow
@pytest.mark.parametrize("budget_given", [False, True])
def test_the_source_is_seen_to_start_once_before_a_folder_is_overwritten(budget_given, teacher, tmp_path, monkeypatch):
    """By the probe that measures a step where there is a budget; then it is built to be trained."""
    (tmp_path / "settings.toml").write_text("")
    made = []
    honest = ZSCGAN.source

    def counted(self, *arguments):
        made.append((tmp_path / "settings.toml").read_text() != "")
        return honest(self, *arguments)

    monkeypatch.setattr(ZSCGAN, "source", counted)
    monkeypatch.setattr(stages, "write_file", _stop)
    monkeypatch.setattr(budget, "MOST_FIT_STEPS", 12)
    monkeypatch.setattr(
        budget.seconds_each, "__kwdefaults__", {"at_least": 2, "at_least_seconds": 0.01, "rounds_of": 1}
    )
    settings = tuple(text for text in PTQ if "steps" not in text or not budget_given)
    asked = {"budget": "1m"} if budget_given else {}
    with pytest.raises(InputError, match="far enough"):
        quantize(teacher, out=tmp_path, settings=settings, overwrite=True, quiet=True, **asked)
    assert made == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_a_target_decides_grids_file_and_record(target, teacher, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    result = zsq.quantize(teacher, method="noise", target=target, data="digits", out=tmp_path / "run", quiet=True)
    assert result.record.target == result.record.settings["quantizer"]["target"] == target
    assert (result.record.verification.agreement_target is None) == (target == "tensorrt")
    assert result.record.quantized_top1 > 97
    with pytest.raises(InputError, match="bits is '4', and files for TensorRT hold activations of 8 bits"):
        zsq.quantize(teacher, method="noise", target="tensorrt", bits=4, out=tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="Did you mean 'openvino'"):
        zsq.quantize(teacher, target="openvno", out=tmp_path / "other", quiet=True)

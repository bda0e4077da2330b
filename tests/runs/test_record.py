"""The record writes and reads itself, and reads what zsq 0.1 has written."""

import json
from pathlib import Path
from typing import Any

import pytest

from zsq.errors import InputError
from zsq.evaluation.accuracy import Difference, Evaluation
from zsq.export.verify import Verification
from zsq.runs.record import SCHEMA, Artifact, Record, SampleAgreement

CHECK = Verification(
    num_images=1399,
    num_decided=1300,
    agreement_literal=99.9,
    agreement_optimized=99.0,
    decided_agreement=100.0,
    max_logit_difference_steps=1.0,
    decided_self_agreement=99.5,
    decided_agreement_optimized=99.5,
)


COMPARED = Evaluation(
    num_images=200, top1_correct=196, top5_correct=None, agreement_count=199, minus_float=Difference(-0.5, -1.9, 0.9)
)


def record(**changed: Any) -> Record:
    evaluation = {
        "float": Evaluation(num_images=200, top1_correct=197, top5_correct=200, agreement_count=200),
        "quantized": Evaluation(num_images=200, top1_correct=196, top5_correct=None, agreement_count=199),
    }
    facts: dict[str, Any] = {
        "model": "digits",
        "weights": "bundled",
        "weights_sha256": "0" * 64,
        "method": "zscgan",
        "data_free": True,
        "quantizer": "qat",
        "bits": "W4A8",
        "activation_scope": "all",
        "range_rule": "mse",
        "kd_weight": 1.0,
        "seed": 3,
        "data": "digits",
        "verification": CHECK,
        "num_eval_images": 200,
        "evaluation": evaluation,
        "artifacts": {"model.onnx": Artifact(bytes=2048, sha256="1" * 64)},
        "settings": {"method": {"name": "zscgan", "steps": 5}, "quantizer": {"name": "qat"}},
        "versions": {"zsq": "0.1.0"},
        "samples": SampleAgreement(num_images=500, num_classes=10, teacher_agreement=97.5),
        "label_recognition": 88.0,
        "num_calibration_images": 512,
        "seconds": 61.5,
        "seconds_by_phase": {"fit": 40.0},
    }
    return Record(**(facts | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"evaluation": {"quantized": COMPARED}},
        {"evaluation": {}, "data": None, "num_eval_images": 0},
        {"samples": None, "kd_weight": None},
    ],
    ids=["all", "without data", "without samples"],
)
def test_what_is_written_is_read_back(changed: dict[str, Any], tmp_path: Path) -> None:
    written = record(**changed)
    written.write(tmp_path)
    assert Record.read(tmp_path) == written


def test_the_file_holds_what_follows_from_the_fields(tmp_path: Path) -> None:
    record().write(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["schema"] == SCHEMA
    assert (content["float_top1"], content["quantized_top1"], content["simulated_top1"]) == (98.5, 98.0, None)
    assert (content["teacher_agreement"], content["runtime_agreement"]) == (99.5, 99.9)
    assert content["evaluation"]["quantized"]["top1_interval"] == list(record().evaluation["quantized"].top1_interval)


def test_a_record_of_an_older_zsq_is_read(tmp_path: Path) -> None:
    """It has no number, and may hold what is not known any more."""
    content = record().as_dict() | {"forgotten": 1}
    del content["schema"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    found = Record.read(tmp_path)
    assert found.schema == 0
    assert (found.quantized_top1, found.artifacts) == (98.0, record().artifacts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds no result\.json; the run has not finished: resume=True continues it"),
        ('{"bits"', r"result\.json is not JSON"),
        ("[]", r"result\.json holds no record"),
        ('{"bits": "8"}', r"result\.json is not a record that zsq has written: model: Field required"),
        (f'{{"schema": {SCHEMA + 1}}}', rf"is of a newer zsq \(schema {SCHEMA + 1}; this one reads up to {SCHEMA}\)"),
    ],
)
def test_what_is_no_record_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Record.read(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("seed", "three"), ("evaluation", {"float": {"num_images": 1}})])
def test_a_value_of_the_wrong_kind_is_named(name: str, value: Any, tmp_path: Path) -> None:
    content = record().as_dict() | {name: value}
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"is not a record that zsq has written: {name}"):
        Record.read(tmp_path)

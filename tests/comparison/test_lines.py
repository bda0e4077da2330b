"""Lines of a comparison: they read what they write, and what was written before some of today's keys."""

import json

import pytest

from zsq.comparison.lines import CellLine, Drawn, Quantized, Skipped, append_line, read_lines

QUANTIZED = Quantized(
    model="digits",
    weights="bundled",
    weights_sha256="ab",
    data_free=True,
    data="digits",
    activation_scope="all",
    range_rule="minmax",
    measure="top-1",
    float_score=98.5,
    score=97.25,
    teacher_agreement=98.0,
    runtime_agreement=100.0,
    label_recognition=None,
    samples={"num_images": 500, "num_classes": 10, "teacher_agreement": None},
    num_eval_images=400,
    num_calibration_images=32,
    seconds=2.5,
    settings={"method": {"name": "noise"}},
    versions={"zsq": "0.1.0"},
    interval=(95.0, 98.75),
    fit_seconds=0.25,
    resumed=False,
    model_bytes=2048,
)
DRAWN = Drawn(weights_sha256="ab", figure="figures/a.png", fit_seconds=1.0, resumed=True, label_recognition=99.0)
SKIPPED = Skipped(reason="it works with: ptq.")


def line_of(outcome, name: str = "digits/noise/ptq-8/seed0") -> CellLine:
    quantizer, bits = (None, None) if isinstance(outcome, Drawn) else ("ptq", "8")
    return CellLine(
        cell=name,
        teacher="digits",
        method="noise",
        quantizer=quantizer,
        bits=bits,
        seed=0,
        digest="cd",
        outcome=outcome,
    )


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [(QUANTIZED, "finished", ""), (DRAWN, "finished", ""), (SKIPPED, "skipped", "it works with: ptq.")],
)
def test_a_line_reads_what_it_writes(outcome, status, reason):
    line = line_of(outcome)
    assert CellLine.from_json(line.to_json()) == line
    assert (line.status, line.reason) == (status, reason)
    written = json.loads(line.to_json())
    assert written.pop("content_sha256")
    assert written == line.as_dict()
    assert list(written)[:8] == ["cell", "teacher", "method", "quantizer", "bits", "seed", "digest", "status"]
    assert "outcome" not in written


def test_a_line_with_other_keys_is_read():
    values = line_of(QUANTIZED).as_dict() | {"date": "2026-11-24"}
    del values["samples"]  # which early lines lack
    former = {"float_score": "float_top1", "score": "quantized_top1", "interval": "top1_interval"}
    values = {former.get(key, key): value for key, value in values.items() if key != "measure"}
    outcome = CellLine.from_json(json.dumps(values)).outcome
    assert (outcome.measure, outcome.float_score, outcome.interval) == ("top-1", 98.5, (95.0, 98.75))
    assert outcome.samples is None
    assert outcome.score == 97.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "status is None; finished and skipped are known"),
        ('{"cell": "a", "status": "began"}', "status is 'began'"),
        ('{"cell": "a", "status": "skipped"}', "reason"),
        (json.dumps(line_of(SKIPPED).as_dict() | {"seed": "x"}), "seed"),
        (json.dumps(line_of(QUANTIZED).as_dict() | {"score": None}), "score"),
        (line_of(QUANTIZED).to_json().replace("97.25", "97.75"), "checksum"),
    ],
)
def test_what_is_no_line_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        CellLine.from_json(text)


def test_the_latest_readable_line_of_a_cell_counts(tmp_path):
    path = tmp_path / "cells.jsonl"
    assert read_lines(path) == {}
    append_line(path, line_of(SKIPPED, "a"))
    append_line(path, line_of(SKIPPED, "b"))
    append_line(path, line_of(QUANTIZED, "a"))
    with open(path, "a") as file:
        file.write('{"cell": "a", "sta')  # a kill in the middle of a line
    append_line(path, line_of(DRAWN, "c"))
    assert read_lines(path) == {"a": line_of(QUANTIZED, "a"), "b": line_of(SKIPPED, "b"), "c": line_of(DRAWN, "c")}
    assert len(path.read_text().splitlines()) == 5

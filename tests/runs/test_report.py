"""The report of a run: what it says, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_record import record

from zsq.errors import InputError
from zsq.evaluation.accuracy import Difference, Evaluation
from zsq.export.profile import Kernels, Profile
from zsq.quantization.coverage import Coverage
from zsq.reports.html import REPORT, Gallery, Section
from zsq.runs.record import Latency, Record, SampleAgreement
from zsq.runs.report import page_of, verdict_of, write_report
from zsq.runs.settings_file import SETTINGS
from zsq.runtime.checksums import sealed_values

EVIL = "<script>document.title='broken'</script>"


def labelled(num: int, floats: int, file: int, found: Difference | None = None) -> Record:
    return record(
        num_eval_images=num,
        evaluation={
            "float": Evaluation(num_images=num, top1_correct=floats, top5_correct=None),
            "quantized": Evaluation(
                num_images=num, top1_correct=file, top5_correct=None, agreement_count=file, minus_float=found
            ),
        },
    )


@pytest.mark.parametrize(
    ("given", "level", "verdict"),
    [
        (labelled(10_000, 9000, 8990), "good", "Within one point of the float network on these images."),
        (labelled(100, 90, 90), "fair", "Within one point of the float network on these images."),
        (
            labelled(100, 90, 90, Difference(0.0, -0.9, 0.9)),
            "good",
            "Within one point of the float network on these images.",
        ),
        (
            labelled(10_000, 9000, 8990, Difference(-0.1, -1.1, 0.9)),
            "fair",
            "Within one point of the float network on these images.",
        ),
        (labelled(10_000, 9000, 8700, Difference(-3.0, -3.4, -2.6)), "fair", "Loses 3.0 points of accuracy."),
        (labelled(10_000, 9000, 8700), "fair", "Loses 3.0 points of accuracy."),
        (labelled(10_000, 9000, 5000), "poor", "Loses 40.0 points of accuracy."),
        (labelled(100, 90, 88), "fair", "Loses 2.0 points on these images."),
        (record(evaluation={}, num_eval_images=0, data=None), "weak", "Not measured on any real image."),
    ],
)
def test_the_verdict_is_as_strong_as_what_it_rests_on(given: Record, level: str, verdict: str) -> None:
    assert verdict_of(given)[:2] == (level, verdict)


def test_without_labels_agreement_is_no_accuracy() -> None:
    found = Evaluation(num_images=200, top1_correct=None, top5_correct=None, agreement_count=170)
    level, verdict, reasons = verdict_of(record(evaluation={"quantized": found}))
    assert (level, verdict) == ("fair", "Agrees with the float network to 85.0 %.")
    assert reasons[-1] == "The images have no labels, so this is agreement with the float network, not accuracy."


def test_samples_alone_say_how_little_they_tell() -> None:
    samples = SampleAgreement(num_images=500, num_classes=10, teacher_agreement=99.9)
    reasons = verdict_of(record(evaluation={}, samples=samples, bits="3"))[2]
    assert any("up to 30 points off" in reason for reason in reasons)
    assert "At so few bits, samples agree more often than real images do." in reasons


def folder_with(folder: Path, **changed: Any) -> Path:
    given = record(**({"model": EVIL} | changed))
    given.write(folder)
    (folder / SETTINGS).write_text('[teacher]\nmodel = "net"\n[run]\ndata = "digits"\n')
    lines = [{"phase": "fit", "step": step, "ce": 3 / step, "bns": float("nan")} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"phase": "f\n')
    Image.new("RGB", (8, 8), "red").save(folder / "samples.png")
    return folder


def test_names_are_text_and_gaps_are_told(tmp_path: Path) -> None:
    text = write_report(folder_with(tmp_path)).read_text()
    assert EVIL not in text
    assert "&lt;script&gt;document.title" in text
    assert "Not finite at some steps: bns. A lower learning rate may help." in text
    assert "1 lines of metrics.jsonl cannot be read." in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_an_unfinished_run_shows_what_is_there(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "result.json").unlink()
    page = page_of(tmp_path)
    assert page.verdict == "No finished run."
    assert "has not finished" in page.reasons[0]
    assert {"Losses: fit", "Samples", "Repeat it"} <= {section.title for section in page.sections}


def test_a_record_of_a_newer_version_is_said(tmp_path: Path) -> None:
    content = json.loads((folder_with(tmp_path) / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(sealed_values(content | {"schema": 99})))
    assert "newer zsq (schema 99" in page_of(tmp_path).reasons[0]


def test_damaged_files_are_said(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "samples.png").write_bytes(b"nothing")
    (tmp_path / SETTINGS).write_text("[teacher\n")
    missing = page_of(tmp_path).sections[0]
    assert missing.title == "What is missing"
    assert len(missing.blocks[0].lines) == 3  # type: ignore[union-attr]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_warnings_say_what_to_do(tmp_path: Path) -> None:
    page = page_of(folder_with(tmp_path, label_recognition=12.0, distillation_undone=True))
    (section,) = [section for section in page.sections if section.title == "Warnings"]
    first, second = section.blocks[0].lines  # type: ignore[union-attr]
    assert first.startswith("The float network recognises 12.0 % of the samples' labels")
    assert "--quantizer ptq" in second


def test_size_and_latency_stand_beside_those_of_the_float_file(tmp_path: Path) -> None:
    kernels = (
        Kernels(name="QLinearConv", computes="integers", count=3, implementation="CPU", milliseconds=0.3),
        Kernels(name="Softmax<b>", computes="float", count=1, milliseconds=0.1),
    )
    given = record(
        latency=Latency(file=0.5, float_file=1.0, float_bytes=8192, float_runtime="onnxruntime"),
        profile=Profile(runtime="ONNX Runtime", kernels=kernels, num_operators=17, source="its profile"),
    )
    size = given.artifacts[given.file].bytes
    given.write(tmp_path)
    text = write_report(tmp_path).read_text()
    assert f"2.00 times as fast, {8192 / size:.2f} times smaller" in text
    assert "0.5 ms" in text
    assert (
        "17 operators run as 4 kernels: 3 in integers, 1 in float; integers take 75 % of the time. Its profile." in text
    )
    assert "Softmax&lt;b&gt;" in text
    assert Record.read(tmp_path) == given
    ruled = Profile(runtime="TensorRT", kernels=(replace(kernels[0], milliseconds=None),), source="its rules")
    record(latency=Latency(file=0.5, note="the float network has no file <b>"), profile=ruled).write(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "times as fast" not in text
    assert "by its rules, not run: operators 3 in integers. Its rules." in text
    assert "share of the time" not in text
    assert "the float network has no file &lt;b&gt;." in text


def with_samples(folder: Path, **changed: Any) -> Path:
    Image.new("RGB", (3 * 34, 2 * 34), "green").save(folder / "samples.png")
    content = {"rows": 2, "columns": 3, "labels": [0, 7], "seen": [[0, 7], [0, None]], "names": {"0": EVIL}} | changed
    (folder / "samples.json").write_text(json.dumps(content))
    return folder


def samples_of(folder: Path) -> Section:
    (section,) = [section for section in page_of(folder).sections if section.title == "Samples"]
    return section


def test_samples_are_shown_beside_the_class_that_the_network_sees(tmp_path: Path) -> None:
    section = samples_of(with_samples(folder_with(tmp_path)))
    (gallery,) = section.blocks
    assert isinstance(gallery, Gallery)
    assert [(title, note) for title, note, _ in gallery.rows] == [
        (EVIL, "1 of 2 recognised"),
        ("class 7", "0 of 1 recognised"),
    ]
    captions = [[(tile.caption, tile.marked) for tile in shown] for _, _, shown in gallery.rows]
    assert captions == [[(EVIL, False), ("✗ class 7", True)], [(f"✗ {EVIL}", True)]]
    assert "ten spread evenly" in section.note
    assert EVIL not in write_report(tmp_path).read_text()


def test_maps_of_classes_have_rows_without_captions(tmp_path: Path) -> None:
    (gallery,) = samples_of(with_samples(folder_with(tmp_path), seen=[])).blocks
    assert isinstance(gallery, Gallery)
    assert [len(shown) for _, _, shown in gallery.rows] == [3, 3]
    assert not any(tile.caption for _, _, shown in gallery.rows for tile in shown)


def test_samples_of_no_class_are_one_row(tmp_path: Path) -> None:
    (gallery,) = samples_of(with_samples(folder_with(tmp_path), labels=[])).blocks
    assert isinstance(gallery, Gallery)
    ((_, _, shown),) = gallery.rows
    assert [(tile.caption, tile.marked) for tile in shown] == [(EVIL, False), ("class 7", False), (EVIL, False)]


@pytest.mark.parametrize("damaged", [{"rows": 0}, {"rows": 7}, {"labels": "ab"}, {"seen": [[0]]}])
def test_samples_that_do_not_fit_together_are_said(tmp_path: Path, damaged: dict[str, Any]) -> None:
    missing = page_of(with_samples(folder_with(tmp_path), **damaged)).sections[0]
    assert missing.title == "What is missing"
    assert any("samples." in line for line in missing.blocks[0].lines)  # type: ignore[union-attr]


PROBE = """<script>
const button = [...document.querySelectorAll("th button")].find(b => b.textContent === "how much");
const column = () => [...button.closest("table").tBodies[0].rows].map(row => row.cells[1].textContent.trim());
const before = column(); button.click(); const down = column(); button.click(); const up = column();
const images = [...document.images].every(image => image.complete && image.naturalWidth > 0);
document.documentElement.dataset.found = JSON.stringify({before, down, up, images, title: document.title,
  wide: document.documentElement.scrollWidth > innerWidth});
</script>"""


@pytest.mark.slow
def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    covered = Coverage(quantized_weights=1, quantized_operations=1, float_operations={"a": 2.0, "b": 10.0, "c": 1.0})
    path = write_report(with_samples(folder_with(tmp_path, coverage=covered)))
    path.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--window-size=500,900"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, (tmp_path / REPORT).as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr
    found = json.loads(match[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert found == {
        "before": ["a", "b", "c"],
        "down": ["b", "a", "c"],
        "up": ["c", "a", "b"],
        "images": True,
        "title": f"zsq: {EVIL}",
        "wide": False,
    }
    assert "CONSOLE" not in done.stderr

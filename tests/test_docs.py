"""Commands, links and code of README and documentation work, and generated pages say what the code says."""

import importlib.util
import inspect
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zsq
from zsq.cli import main
from zsq.comparison.recipe import cells, read_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import reference
import results_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPORTS = sorted((ROOT / "benchmarks").rglob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *REPORTS]
SOURCES = sorted(path for folder in ("examples", "benchmarks", "recipes") for path in (ROOT / folder).glob("*.[pt]*"))

START = r"(?:\.venv/bin/)?zsq|python3? -m zsq|torchrun .*?-m zsq"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCED.findall(text) if name == language]


def shown(text: str, indent: str) -> list[str]:
    """Return the arguments of each zsq command that stands on a line of its own with this indent."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.match(rf"{indent}(?:{START}) +(.*)", line) for line in lines]
    return [match[1].partition("  #")[0].strip() for match in found if match]


def commands() -> Iterator[tuple[str, str]]:
    """Yield place and arguments: fenced blocks, indented ones, comments, and the examples of each command's help."""
    for page in PAGES:
        text = page.read_text()
        name = str(page.relative_to(ROOT))
        yield from ((name, command) for block in blocks(text, "sh") for command in shown(block, ""))
        yield from ((name, command) for command in shown(FENCED.sub("", text), r"(?: {4}|\t)+"))
    for path in SOURCES:
        yield from ((str(path.relative_to(ROOT)), command) for command in shown(path.read_text(), r"#? {4,}"))
    for verb, kind in main.COMMANDS.items():
        _, _, examples = inspect.cleandoc(kind.__doc__ or "").partition("Examples:\n")
        yield from ((f"zsq {verb} --help", command) for command in shown(examples, "  "))


COMMANDS = sorted(set(commands()))


def slug(heading: str) -> str:
    """Return the anchor that the site gives to a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def test_there_are_commands_of_every_kind() -> None:
    places = {place for place, _ in COMMANDS}
    assert {
        "README.md",
        "docs/quickstart.md",
        "recipes/digits.toml",
        "benchmarks/reports/2026-11-accuracy.md",
    } <= places
    assert {f"zsq {verb} --help" for verb in main.COMMANDS} <= places


@pytest.mark.parametrize(("place", "command"), COMMANDS)
def test_command_parses(place: str, command: str) -> None:
    assert main.parse(shlex.split(command)), place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_sentences_exist(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for command in re.findall(r"`zsq ([^`\s]+)", text):
        assert command in {*main.COMMANDS, "--version", "--install-completion", "COMMAND"}, (
            f"{page.name}: zsq {command}"
        )


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shell = "\n".join(block for page in PAGES for block in blocks(page.read_text(), "sh"))
    targets = re.findall(r"^make (\w+)", shell, flags=re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        assert "://" not in target, f"{page.name}: {target}"
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", FENCED.sub("", file.read_text()), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_recipe_of_the_guide_is_one(tmp_path: Path) -> None:
    (recipe,) = blocks((ROOT / "docs" / "guides" / "comparing.md").read_text(), "toml")
    (tmp_path / "recipe.toml").write_text(recipe)
    assert cells(read_recipe(tmp_path / "recipe.toml"))


def test_reference_pages_say_what_the_code_says() -> None:
    assert reference.stale() == [], "run make docs"


def test_table_of_results_is_that_of_the_recorded_lines() -> None:
    assert results_page.stale() == [], "run python benchmarks/results_page.py"


def test_readme_gives_the_figures_of_the_results_page() -> None:
    measured, floats = results_page.read()
    for network, title in results_page.NETWORKS.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {title} ")]
        columns = [("8", "ptq"), ("8", "qat"), ("6", "qat"), ("4", "ptq"), ("4", "qat")]
        found = [measured.get((network, "zscgan", *column)) for column in columns]
        figures = [f"{floats[network][0]:.2f}", *(cell.shown() if cell else "" for cell in found)]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == figures


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `zsq.quantize` take a few steps, whatever budget is asked for."""
    whole = zsq.quantize

    def quantize(*arguments: Any, budget: str | None = None, **named: Any) -> zsq.Result:
        settings = {"quantizer.num_samples": 50}
        settings |= {} if "from_run" in named else {"method.steps": 5}
        settings |= {"quantizer.steps": 2} if named.get("quantizer") == "qat" else {}
        return whole(*arguments, settings=settings, quiet=True, **named)

    monkeypatch.setattr(zsq, "quantize", quantize)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    settings = {"quantizer.num_samples": 50}
    zsq.quantize(zsq.load_teacher("digits"), out=folder, method="noise", settings=settings, quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(page.relative_to(ROOT)) for page in PAGES if blocks(page.read_text(), "python")])
def test_python_of_a_page_runs(name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez("test.npz", images=images, labels=np.arange(20) % 10)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    names: dict[str, Any] = {"net": nn.Sequential(*layers, nn.Linear(8, 10)), "images": torch.zeros(2, 3, 32, 32)}
    text = (ROOT / name).read_text()
    if "onnxruntime.InferenceSession" in text:  # the page starts from the folder of a run
        shutil.copytree(run, "runs/int8")
    if "runs/pixels" in text:
        settings = {"quantizer.num_samples": 50}
        digits = zsq.load_teacher("digits")
        zsq.quantize(digits, out="runs/pixels", pixels="nhwc", method="noise", settings=settings, quiet=True)
    if "import openvino" in text:
        pytest.importorskip("openvino")
    if "runs/litert" in text:
        pytest.importorskip("ai_edge_litert")
        settings = {"quantizer.num_samples": 50, "quantizer.target": "litert"}
        zsq.quantize("digits", out="runs/litert", pixels="nhwc", method="noise", settings=settings, quiet=True)
    has_executorch = importlib.util.find_spec("executorch") is not None
    if "runs/executorch" in text and has_executorch:
        settings = {"quantizer.num_samples": 50, "quantizer.target": "executorch"}
        zsq.quantize("digits", out="runs/executorch", method="noise", settings=settings, quiet=True)
    short(monkeypatch)
    logits = []
    for code in blocks(text, "python"):
        if "from executorch" in code and not has_executorch:
            continue
        exec(code, names)
        logits += [names["logits"]] if "logits" in code else []
    assert all(found.shape == (len(found), 10) for found in logits)
    assert all(np.allclose(np.asarray(found), np.asarray(logits[0]), atol=1e-5) for found in logits)
    if "result" in names:
        assert names["result"].record.bits in ("8", "4")


SMALLER = {"1x128x128": "1x32x32", "3x128x128": "3x32x32", "1x16x64x64": "1x4x16x16"}
"""Inputs in place of those that the guides name; their networks take any."""


def data_of_the_guides() -> None:
    """Write images of every kind that the guides name to the current folder."""
    random = np.random.default_rng(0)

    def pixels(*shape: int, most: int = 256) -> np.ndarray:
        return random.integers(0, most, shape, dtype=np.uint8)

    for index in range(4):
        for path, image in (
            (Path("scans", "images", f"{index}.png"), pixels(32, 32)),
            (Path("scans", "masks", f"{index}.png"), pixels(32, 32, most=4)),
            (Path("faces", f"person{index % 2}", f"{index}.png"), pixels(112, 112, 3)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    boxes = np.tile(np.float32([[4, 4, 20, 24, 0], [-1, -1, -1, -1, -1]]), (6, 1, 1))
    np.savez("boxes.npz", images=pixels(6, 32, 32, 3), boxes=boxes)
    np.savez("beats.npz", inputs=random.normal(size=(6, 12, 256)), labels=np.arange(6) % 5)


def commands_of_a_guide(guide: str) -> Iterator[list[str]]:
    """Yield the words of each command of a guide that is about its own networks, or about what came of them."""
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    for command in [command for block in blocks(text, "sh") for command in shown(block, "")]:
        words = [SMALLER.get(word, word) for word in shlex.split(command)]
        if "examples/other_outputs.py" in command or any(
            word.startswith("runs/") and Path(word).is_dir() for word in words
        ):
            yield words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "measured"),
    [
        (
            "other-outputs",
            {
                "unet": {"same class", "mean IoU"},
                "embedder": {"cosine"},
                "detector": {"relative error"},
                "detector4": {"AP50", "relative error"},
            },
        ),
        ("signals-and-volumes", {"rhythms": set(), "lesions": {"same class", "mean IoU"}}),
    ],
)
def test_networks_of_a_guide_go_through_its_commands(guide, measured, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    data_of_the_guides()
    fit = [f"--set=method.{name}" for name in ("steps=2", "batch_size=4", "width=8")]
    told = ""
    for words in commands_of_a_guide(guide):
        quick = ["--set=quantizer.num_samples=8", "--quantizer=qat", "--set=quantizer.steps=1", "--quiet"]
        quick += [] if "--from" in words else fit
        main.main(words + (quick if words[0] == "quantize" else []))
        told += capsys.readouterr().out
    found = {}
    for folder in Path("runs").iterdir():
        record = zsq.Record.read(folder)
        assert record.samples is not None
        real = record.evaluation.get("quantized")
        of = record.samples.measures if real is None else real.truths + real.measures
        found[folder.name] = {measure.name for measure in of}
    assert found == measured
    if guide == "other-outputs":
        assert all(name in told for name in ("pixel accuracy", "verification accuracy", "AP50"))
    else:
        assert "float top-1" in told


@pytest.mark.slow
def test_keys_of_the_record_are_those_of_the_page(run: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    page = (ROOT / "docs" / "guides" / "run-folder.md").read_text()
    section = page.partition("## The record\n")[2].partition("\n## ")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert len(keys) > 10
    assert set(keys) <= set(record)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "reference"], ids=lambda p: p.stem)
def test_lines_are_short(page: Path) -> None:
    """Those of text; tables and code are as long as they are, and reference pages are made."""
    lines = FENCED.sub("", page.read_text()).splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "    "))] == []

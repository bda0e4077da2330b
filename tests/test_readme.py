"""The commands and the code of README and documents are those that the program takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zsq import load_teacher, quantize
from zsq.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    joined = "\n".join(block.replace("\\\n", " ") for page in PAGES for block in blocks(page.read_text(), "sh"))
    return [line.partition("  #")[0].strip() for line in joined.splitlines() if line.startswith("zsq ")]


def test_there_are_commands_to_check() -> None:
    assert commands()


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    assert main.parse(shlex.split(command)[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(README, "sh")), flags=re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez("test.npz", images=images, labels=np.arange(20) % 10)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    names = {"net": nn.Sequential(*layers, nn.Linear(8, 10)), "images": torch.zeros(2, 3, 32, 32)}
    (code,) = blocks(README, "python")
    exec(code.replace('budget="10m"', 'settings=("method.steps=5", "quantizer.num_samples=50")'), names)
    assert names["logits"].shape == (2, 10)
    assert names["result"].record.bits == "8"


@pytest.mark.slow
def test_the_files_of_a_run_are_used_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"quantizer.num_samples": 50}
    quantize(load_teacher("digits"), out="runs/int8", method="noise", settings=settings, quiet=True)
    names: dict[str, Any] = {}
    by_runtime, by_torch = blocks((ROOT / "docs" / "files.md").read_text(), "python")
    exec(by_runtime, names)
    logits = names["logits"]
    assert logits.shape == (4, 10)
    exec(by_torch, names)
    assert np.allclose(names["logits"].numpy(), logits, atol=1e-5)

"""Imports point down only, functions and files stay short, and no file names a place on somebody's machine."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "zsq"

FLOORS = {
    "errors": 0,
    # values, and small helpers on graphs
    "types": 1,
    "graphs": 1,
    "stems": 1,
    "parallel": 1,
    "allocator": 1,
    "replay": 2,
    "kernels.base": 1,
    "kernels.biases": 2,
    "kernels.norms": 2,
    "kernels.ranges": 2,
    "kernels.rounding": 2,
    "kernels.weights": 3,
    "kernels": 4,
    "gpu": 5,
    "optimizers": 1,
    # equations, networks, the graph of a network
    "losses": 10,
    "patterns": 9,
    "tracing": 10,
    "batchnorm": 11,
    "equalize": 12,
    "networks": 12,
    "digits.network": 10,
    "digits": 11,
    "digits.train": 12,
    # where networks and images come from, and the one loop
    "checkpoints": 20,
    "zoo": 20,
    "datasets": 20,
    "training": 20,
    "teachers": 21,
    # from a float graph to a quantized one
    "quantize.fakequant": 30,
    "quantize.quantizers": 31,
    "quantize.gates": 31,
    "quantize.ranges": 32,
    "quantize.prepare": 32,
    "quantize.correction": 33,
    "quantize.sensitivity": 33,
    "quantize.centring": 34,
    "quantize.ptq": 34,
    "quantize.merging": 35,
    "quantize.qat": 36,
    "quantize.convert": 36,
    "quantize": 37,
    # what stands in for the training data
    "methods.base": 40,
    "methods.pool": 41,
    "methods.given": 42,
    "methods.generator": 42,
    "methods.zscgan": 43,
    "methods.equalization": 43,
    "methods.adversarial": 43,
    "methods.biggan": 43,
    "methods.inversion": 43,
    "methods.zeroq": 44,
    "methods.deepinversion": 44,
    "methods.knowledge_within": 44,
    "methods": 45,
    # what is decided and measured
    "settings": 50,
    "budget": 51,
    "evaluate": 51,
    "report": 51,
    "verification": 51,
    "export": 52,
    # whole runs
    "console": 50,
    "runs": 60,
    "stages": 69,
    "experiment": 70,
    "samples": 71,
    "allocation": 71,
    # comparisons
    "tables": 51,
    "recipes": 71,
    "figures": 72,
    "outcomes": 72,
    "cells": 73,
    "grid": 74,
    "jobs": 75,
    "compare": 76,
    # what the user meets
    "workers": 80,
    "doctor": 80,
    "options": 85,
    "cli_allocate": 86,
    "cli_compare": 86,
    "cli": 90,
    "__main__": 91,
    "": 91,
}
"""Each module's floor; a module imports from lower floors only, so there is no cycle."""

MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400

MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:" + "|".join(("work", "root", "home", "Users")) + r")(?:/|\b(?!\.))")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of zsq that a file imports, anywhere in it; `from zsq import x` is module x where there is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{name.name}" for name in node.names}
            known = {name for name in inner if name.removeprefix("zsq.") in MODULES}
            found |= known if known else {str(node.module)}
    return {name.partition(".")[2] for name in found if name.partition(".")[0] == "zsq"}


def test_the_table_knows_every_module():
    assert FLOORS.keys() == MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    up = {name: FLOORS[name] for name in imported(MODULES[module]) if FLOORS[name] >= FLOORS[module]}
    assert up == {}, f"{module} stands on floor {FLOORS[module]}"


def test_the_test_sees_imports():
    assert imported(MODULES["teachers"]) >= {"checkpoints", "digits", "zoo", "errors"}
    assert imported(MODULES["cli"]) >= {"experiment", "doctor", "samples"}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_files_stay_short(module):
    text = MODULES[module].read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: length(f) for f in functions if length(f) >= MOST_FUNCTION_LINES} == {}
    assert len(text.splitlines()) < MOST_FILE_LINES


def texts() -> dict[str, str]:
    """Every text file of the project that is not ignored, by its path."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for name in listed:
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            found[name] = content.decode()
    return found


def test_no_file_names_a_place_on_a_machine():
    found = {name: MACHINE_PATH.findall(text) for name, text in texts().items()}
    assert len(found) > 40
    assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize("folder", ["work/main", "root/.cache", "home/ann/x", "root"])
def test_a_place_on_a_machine_is_recognised(folder):
    assert MACHINE_PATH.search(f'open("/{folder}")')
    assert MACHINE_PATH.search(f"cd /{folder}\n")


@pytest.mark.parametrize("text", ["a/work/b", "https://x.org/home/", "/rootless", "../work/x", "input/root.txt"])
def test_other_text_is_let_alone(text):
    assert MACHINE_PATH.search(text) is None

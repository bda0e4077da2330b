"""No file names a place on somebody's machine. The order of packages is import-linter's contract (pyproject.toml)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:" + "|".join(("work", "root", "home", "Users")) + r")(?:/|\b(?!\.))")


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

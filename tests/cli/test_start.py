"""What `zsq` says before PyTorch is there."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zsq.cli import main
from zsq.cli.names import NAMES
from zsq.cli.start import LOADING, NOTHING_DONE
from zsq.runtime.versions import version_line

NO_TORCH = "import sys\nsys.modules['torch'] = None\nfrom zsq.cli.start import main\nmain()"
"""A process in which importing torch fails."""

ENDLESS = "import time\nprint('here', flush=True)\ntime.sleep(60)\n"


def without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True, check=False)


def test_the_names_are_those_of_the_commands_in_order() -> None:
    assert [kind.__name__.lower() for kind in main.KINDS] == list(NAMES)


def test_a_mistyped_command_is_corrected_without_pytorch() -> None:
    found = without_torch("quantise", "digits")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("Error: Unknown command 'quantise'. Did you mean 'quantize'? Known: ")


def test_the_version_is_named_without_pytorch_imported() -> None:
    text = (
        "import sys, zsq.cli.start\nsys.argv[1:] = ['--version']\nzsq.cli.start.main()\nprint('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    line, imported = found.stdout.splitlines()
    assert line.startswith("zsq ")
    assert f"torch {version_line().partition('torch ')[2].partition(',')[0]}," in line
    assert imported == "False"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_are_imported_ends_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "tyro.py").write_text(ENDLESS)  # stands for a library that takes long
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, where nothing ignores it
    process = subprocess.Popen(
        [sys.executable, "-m", "zsq", "quantize", "digits"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert said.strip() == NOTHING_DONE
    assert process.returncode == 128 + number


def test_a_terminal_is_told_at_once_what_takes_so_long(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise SystemExit(3)\n")
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "zsq", "methods"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    os.close(theirs)
    said = os.read(ours, 1000).decode()
    os.close(ours)
    assert said == f"{LOADING}\r{' ' * len(LOADING)}\r"  # erased, whatever follows

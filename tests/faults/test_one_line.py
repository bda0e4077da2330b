"""Each fault is one line with the value and a remedy, never a traceback."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from zsq.cli import main as command_line
from zsq.cli.main import main
from zsq.errors import InputError, StorageError
from zsq.runtime.files import replacing, save_tensors
from zsq.runtime.memory import clear_memory_errors
from zsq.training.checkpoints import METRICS, Checkpoints

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
import pathlib, torch
from zsq.errors import StorageError
from zsq.runtime.files import save_tensors
path = pathlib.Path(sys.argv[2])
try:
    save_tensors(path, {"a": torch.zeros(100_000)})
except StorageError as error:
    print(error)
print(sorted(each.name for each in path.parent.iterdir()))
"""


def error_of(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_no_half_file(tmp_path):
    path = tmp_path / "folder" / "fit.safetensors"
    words = [sys.executable, "-c", LIMITED, "50000", str(path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith(f"{path} cannot be written: ")
    assert "resume=True continues it" in said[0]
    assert said[1] == "[]"


def test_what_cannot_be_written_keeps_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def fill():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"a cannot be written: No space left on device\. What was there before"):
        fill()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_tensors(tmp_path / "a" / "b.safetensors", {"x": torch.ones(1)})


def test_a_byte_that_is_not_utf8_in_the_metrics_is_left_out(tmp_path):
    from zsq.training.checkpoints import _forget_metrics

    path = tmp_path / METRICS
    line = b'{"phase": "fit", "step": 1}\n'
    path.write_bytes(line + b"\xff\xfe\n" + line)
    _forget_metrics(path, "fit", 3)
    assert path.read_bytes() == line * 2
    assert Checkpoints(tmp_path, "fit", None).path == tmp_path / "checkpoints" / "fit.safetensors"


def test_memory_that_is_not_there_is_told():
    with pytest.raises(InputError, match=r"the machine has too little memory.*batch_size"), clear_memory_errors():
        torch.empty(2**60)


@pytest.mark.parametrize("fault", [KeyError("k"), RecursionError("deep"), AssertionError(), MemoryError()])
def test_what_nobody_expects_is_one_line(monkeypatch, capsys, fault):
    def raises(words, **_):
        raise fault

    monkeypatch.setattr(command_line, "_run", raises)
    said = error_of(["doctor"], capsys)
    assert ("too little memory" if isinstance(fault, MemoryError) else "please report it") in said


def test_debug_shows_where(monkeypatch, capsys):
    def raises(words, **_):
        assert words == ["doctor"]
        raise KeyError("k")

    monkeypatch.setattr(command_line, "_run", raises)
    with pytest.raises(SystemExit):
        main(["doctor", "--debug"])
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("Error: zsq doctor met what it does not expect: KeyError")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&- 2>&-", "> /dev/full"])
def test_standard_streams_may_be_closed_or_full(closed):
    found = subprocess.run(
        f"{sys.executable} -m zsq --version {closed}", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in found.stderr
    assert found.returncode == (1 if "full" in closed else 0)
    if "full" in closed:
        assert found.stderr.splitlines() == ["Error: writing: No space left on device."]

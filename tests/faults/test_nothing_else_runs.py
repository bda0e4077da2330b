"""Nothing runs that the user did not name, and what was named ends zsq only as a fault."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zsq.cli.main import WORKER, main
from zsq.cli.output import PlainConsole
from zsq.comparison import submit
from zsq.data.datasets import open_dataset
from zsq.errors import InputError, TeacherError
from zsq.models.teacher import load_teacher
from zsq.runtime.plain_text import printable
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=2, mean=(0.0,) * 3, std=(1.0,) * 3)

NETWORKS = """
import sys, warnings
from torch import nn

class Own(Exception):
    pass

class Leaves(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault, self.layer = fault, nn.Conv2d(1, 2, 8)
    def forward(self, x):
        if self.fault is not None:
            raise self.fault
        return self.layer(x).flatten(1)

def exits(): sys.exit()
def exits_0(): sys.exit(0)
def own(): raise Own("mine")
def stops(): raise StopIteration
def forward_exits(): return Leaves(SystemExit(0))
def forward_own(): return Leaves(Own("theirs"))
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("exits", r"fails: SystemExit: SystemExit \(networks\.py, line 17\)"),
        ("exits_0", "fails: SystemExit"),
        ("own", "fails: Own: mine"),
        ("stops", "fails: StopIteration"),
        ("forward_exits", "fails on images of 1x8x8: SystemExit"),
        ("forward_own", "fails on images of 1x8x8: Own: theirs"),
    ],
)
def test_a_network_that_leaves_is_a_fault(tmp_path, factory, message):
    (tmp_path / "networks.py").write_text(NETWORKS)
    with pytest.raises(TeacherError, match=message):
        load_teacher(f"{tmp_path / 'networks.py'}:{factory}", input=(1, 8, 8), classes=2)


@pytest.mark.parametrize(
    "text", ["import sys; sys.exit(0)", "raise KeyError('k')", "class A(Exception): pass\nraise A"]
)
def test_a_file_that_leaves_at_its_import_is_a_fault(tmp_path, text):
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(TeacherError, match=r"file\.py does not import"):
        load_teacher(f"{tmp_path / 'file.py'}:net", input=(1, 8, 8), classes=2)


def test_workers_import_nothing_of_the_current_folder(tmp_path):
    (tmp_path / "types.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    assert WORKER[1:] == ("-P", "-m", "zsq")
    found = subprocess.run([*WORKER[:2], "-c", "import json"], cwd=tmp_path, capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, b"")


def test_jobs_import_nothing_of_the_current_folder(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with submit._safe_path():
        code = "import sys; print(sys.flags.safe_path)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"True\n"
    assert "PYTHONSAFEPATH" not in os.environ


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(hijacked) print\n%%EOF\n"


@pytest.mark.parametrize(("name", "content"), [("a.png", EPS), ("a.jpg", b"%PDF-1.4\n"), ("a.gif", b"#define a 1\n")])
def test_an_image_is_of_a_format_that_zsq_names(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not a readable image: cannot identify"):
        list(open_dataset(str(tmp_path), SPEC).batches())


def test_an_image_with_more_pixels_than_pillow_trusts_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.png is not a readable image: Image size \(1600 pixels\) exceeds limit"):
        list(open_dataset(str(tmp_path), SPEC).batches())


def test_pipes_and_devices_are_no_images(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    found = open_dataset(str(tmp_path), SPEC)
    assert found.num_images == 1
    assert found.notices == [f"data set '{tmp_path}' has 1 images and no labels; 3 other files are left out"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;title\x07.png", r"a\x1b]0;title\x07.png"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("a\udcff\x9b", r"a\udcff\x9b"),
        ("été 猫 🐈.png", "été 猫 🐈.png"),
    ],
)
def test_names_do_not_steer_the_terminal(text, shown, capsys):
    assert printable(text) == shown
    PlainConsole().print(text)
    assert capsys.readouterr().out.strip() == shown


def test_an_error_shows_escape_sequences_written_out(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "digits", "--data", f"{tmp_path}/\x1b[2J.npz"])
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert r"\x1b[2J.npz" in error

"""Faults from outside, as a user's shell would meet them: kills, flipped bits, full disks, hostile files.

    python benchmarks/trials.py [--kills 40] [--flips 200] [--disks 20] [--hostile 1000] [--minutes 10]

A trial fails where a traceback is shown, a file is left half-written, a kill loses a run, damage changes a result
without a word, or a hostile file is not refused in one line. Kills hit every command in `VERBS` once it has used a
drawn part of the processor time that it takes undisturbed, however busy the machine is; the command is then repeated,
and has to give what it gives undisturbed. Prints one JSON line of counts, with the kills by command and by how much of
it was done and the last file that was there; `make soak` runs it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from zsq.comparison.lines import read_lines
from zsq.data.datasets import open_dataset
from zsq.errors import ZsqError
from zsq.export.content_hash import canonical_sha256
from zsq.export.files import open_file
from zsq.models.weights import read_state
from zsq.runs.recipe_file import run_tables
from zsq.runs.record import Record, verified
from zsq.runs.settings_file import read_settings
from zsq.runtime.files import load_tensors
from zsq.types import ImageSpec

ZSQ = [sys.executable, "-m", "zsq"]
RUN = [
    *("quantize", "digits", "--set", "method.steps=40", "--set", "method.batch_size=8", "--checkpoint-every", "5"),
    *("--quantizer", "qat", "--set", "quantizer.steps=20", "--set", "quantizer.num_samples=64"),
]
RECIPE = """
title = "Tried"
seeds = [0]
[[teachers]]
model = "digits"
data = "digits"
[[methods]]
name = "zscgan"
steps = 20
batch_size = 8
[[methods]]
name = "noise"
[[quantizers]]
name = "ptq"
bits = ["8"]
num_samples = 64
"""

STAGES = ("settings.toml", "checkpoints", "generator.safetensors", "fit.json", "model.pt2", "model.onnx", "result.json")
"""What appears in a folder, in order."""

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)

SPEC = ImageSpec(channels=3, height=8, width=8, classes=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Trials:
    """What was tried and what failed, within a bound of time."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.until = folder, time.monotonic() + 60 * minutes
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def each(self, kind: str, count: int, trial: Callable[[int], str]) -> None:
        """Run a trial so many times while there is time; it returns what went wrong, or nothing."""
        for number in range(count):
            if time.monotonic() > self.until:
                break
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if wrong := trial(number):
                self.failures.append(f"{kind} {number}: {wrong}")
                print(self.failures[-1], file=sys.stderr, flush=True)


def shell(words: list[str], bytes_left: int | None = None) -> "subprocess.CompletedProcess[str]":
    """Run zsq; no file may grow beyond `bytes_left`."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if bytes_left is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))

    return subprocess.run([*ZSQ, *words], capture_output=True, text=True, check=False, preexec_fn=limit)


def half_files(folder: Path) -> list[str]:
    """Return what was left half-written."""
    return [path.name for path in folder.rglob("*.part")]


@dataclass(frozen=True)
class Verb:
    """A command that is killed, and what it gives."""

    words: Callable[[Path], list[str]]
    """The command, given the folder in which it works; `run` in it is a finished run of its own."""
    again: tuple[str, ...]
    """What is added to repeat it."""
    result: Callable[[Path], object]
    """What it leaves in that folder, equal whenever it gave the same."""
    kills: int = 1
    """How often it is killed before it is let through; the last one counts."""


def arrays_of(path: Path) -> list[tuple[str, bytes]]:
    """Return the arrays of an npz."""
    with np.load(path) as stored:
        return [(name, stored[name].tobytes()) for name in sorted(stored)]


def cells_of(folder: Path) -> list[object]:
    """Return the accuracies and predictions of a comparison."""
    lines = sorted(read_lines(folder / "cells.jsonl").items())
    predicted = [arrays_of(path) for path in sorted(folder.rglob("predictions.npz"))]
    return [*((name, getattr(line.outcome, "score", None)) for name, line in lines), *predicted]


QUANTIZE = Verb(
    lambda place: [*RUN, "--out", str(place / "out")],
    ("--resume",),
    lambda place: canonical_sha256(place / "out" / "model.onnx"),
)
VERBS = {
    "quantize": QUANTIZE,
    "quantize --resume": replace(QUANTIZE, kills=2),
    "synthesize": Verb(
        lambda place: ["synthesize", *RUN[1:6], "--count", "200", "--out", str(place / "out")],
        ("--resume",),
        lambda place: arrays_of(place / "out" / "images.npz"),
    ),
    "compare": Verb(
        lambda place: ["compare", str(place / "recipe.toml"), "--out", str(place / "out")],
        ("--resume",),
        lambda place: cells_of(place / "out"),
    ),
    "evaluate": Verb(
        lambda place: ["evaluate", str(place / "run"), "--data", "digits"],
        (),
        lambda place: sorted((path.name, path.read_bytes()) for path in (place / "run").glob("*.*")),
    ),
    "export": Verb(
        lambda place: ["export", str(place / "run"), "--target", "openvino"],
        ("--overwrite",),
        lambda place: canonical_sha256(place / "run" / "model_openvino.onnx"),
    ),
    "report": Verb(
        lambda place: ["report", str(place / "run")],
        (),
        lambda place: (place / "run" / "report.html").read_bytes(),
    ),
}
ORDER = [name for name in VERBS if name in ("quantize", "quantize --resume", "synthesize", "compare")] * 2 + list(VERBS)
"""Which commands are killed in turn: those that take long more often."""


QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


class Kills:
    """Kills of each command in a drawn part of what it does, and where they hit."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.whole: dict[str, tuple[float, object]] = {}
        self.hits: dict[str, dict[str, int]] = {}
        self.late = 0
        """Signals that came when the command had ended already, which count as no kill."""

    def place(self, name: str) -> Path:
        """Return a folder in which a command can work."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.run, place / "run")
        (place / "recipe.toml").write_text(RECIPE)
        return place

    def undisturbed(self, name: str) -> tuple[float, object]:
        """Return how many seconds of a processor a command takes, and what it gives."""
        if name not in self.whole:
            place, before = self.place("undisturbed"), resource.getrusage(resource.RUSAGE_CHILDREN)
            found = shell(VERBS[name].words(place))
            assert found.returncode == 0, found.stderr
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            self.whole[name] = seconds, VERBS[name].result(place)
        return self.whole[name]

    def kill(self, number: int) -> str:
        """Kill a command in a drawn part, repeat it, and compare what it gives; return what is wrong."""
        name, draw = ORDER[number % len(ORDER)], random.Random(number)
        verb, (seconds, whole) = VERBS[name], self.undisturbed(name)
        killed = False
        while not killed:
            place, words, left = self.place("kill"), verb.words(self.folder / "kill"), seconds
            for _ in range(verb.kills):
                part = draw.random()
                killed, said = killed_at(words, part * left, draw.choice(SIGNALS))
                if "Traceback" in said:
                    return f"{name}: a traceback: {said[-600:]}"
                words, left = [*verb.words(place), *verb.again], (1 - part / 2) * seconds
            self.late += not killed
        self._count(name, place / "out", part)
        again = shell(words)
        if again.returncode:
            return f"{name}: {again.stderr[-200:]}"
        return f"{name}: the result differs" if verb.result(place) != whole else ", ".join(half_files(place))

    def _count(self, name: str, out: Path, part: float) -> None:
        found = [stage for stage in STAGES if any(out.rglob(stage))]
        where = f"{QUARTERS[int(4 * part)]}{f', {found[-1]}' if found else ''}"
        hits = self.hits.setdefault(name, {})
        hits[where] = hits.get(where, 0) + 1


def killed_at(words: list[str], seconds: float, number: signal.Signals) -> tuple[bool, str]:
    """Signal a command once it has used so much of a processor; return whether it still ran, and what it said."""
    process = subprocess.Popen([*ZSQ, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ticks = Path(f"/proc/{process.pid}/stat")
    while process.poll() is None:
        user, system = ticks.read_text().rpartition(")")[2].split()[11:13]
        if (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") >= seconds:
            break
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    return process.returncode != 0, said


def disk(trials: Trials, number: int) -> str:
    """Run where no file may be larger than so many bytes: an error of one line, and no half file."""
    out = trials.folder / f"disk{number}"
    found = shell([*RUN, "--out", str(out)], bytes_left=2 ** (7 * number % 20) * 4)
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    wrong = "a traceback" if "Traceback" in found.stderr else ""
    wrong = wrong or ("" if found.returncode == 0 or len(errors) == 1 else f"{len(errors)} errors")
    wrong = wrong or ", ".join(half_files(out) if out.exists() else [])
    shutil.rmtree(out, ignore_errors=True)
    return wrong


def flip(run: Path, place: Path, number: int) -> str:
    """Flip a bit of a file of a run, and read it as zsq does: an error, or what was written."""
    readers: dict[str, Callable[[Path], object]] = {
        "generator.safetensors": lambda path: sorted((k, v.sum().item()) for k, v in load_tensors(path)[0].items()),
        "checkpoints/fit.safetensors": lambda path: sorted(
            (k, v.sum().item()) for k, v in load_tensors(path)[0].items()
        ),
        "model.onnx": lambda path: open_file(verified(path)).spec,
        "model.pt2": lambda path: canonical_sha256(verified(path)),
        "settings.toml": lambda path: read_settings(path.parent),
        "result.json": lambda path: Record.read(path.parent),
    }
    name = list(readers)[number % len(readers)]
    shutil.copytree(run, place, dirs_exist_ok=True)
    path = place / name
    wanted, content, draw = readers[name](path), bytearray(path.read_bytes()), random.Random(number)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    try:
        found = readers[name](path)
    except ZsqError:
        return ""
    return "" if found == wanted else f"{name}: damage changed what is read"


READERS: dict[str, Callable[[Path], object]] = {
    ".png": lambda path: list(open_dataset(str(path.parent), SPEC).batches()),
    ".csv": lambda path: list(open_dataset(str(path.parent), SPEC).batches()),
    ".npz": lambda path: list(open_dataset(str(path), SPEC).batches()),
    ".pth": read_state,
    ".safetensors": load_tensors,
    ".onnx": lambda path: open_file(path)(torch.zeros(1, 1, 8, 8)),
    ".toml": run_tables,
    ".json": lambda path: Record.read(path.parent),
}
"""What reads a file of a kind, by its ending."""


def hostile(trials: Trials, seeds: dict[str, bytes], number: int) -> str:
    """Give a reader a file that was made to harm it: one expected fault, or a harmless read."""
    draw = random.Random(number)
    name = list(seeds)[number % len(seeds)]
    content = bytearray(seeds[name])
    match draw.randrange(4):
        case 0:  # bytes changed
            for _ in range(draw.randrange(1, 9)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        case 1:  # cut short
            del content[draw.randrange(len(content)) :]
        case 2:  # another kind of file under this name
            content = bytearray(seeds[draw.choice(list(seeds))])
        case _:  # something put in
            at = draw.randrange(len(content))
            content[at:at] = draw.choice([b"\x00" * 64, b"\xff" * 9, b"9" * 30, b"[" * 5000, b"\x1b[2J", b"../../etc"])
    folder = trials.folder / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / name
    path.write_bytes(content)
    (folder / "a.png").exists() or (folder / "a.png").write_bytes(seeds["a.png"])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            READERS[path.suffix](path)
    except ZsqError:
        return ""
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"{name}: {type(error).__name__}: {str(error)[:120]}"
    return ""


def seeds_of(run: Path) -> dict[str, bytes]:
    """Return a whole file for each reader."""
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    png, npz, pth, lying = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(images[0]).save(png, "PNG")
    np.savez(npz, images=images, labels=np.arange(6) % 3)
    torch.save({"a": torch.ones(3, 4)}, pth)
    with zipfile.ZipFile(lying, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(10**6))
    return {
        "a.png": png.getvalue(),
        "metadata.csv": b"file_name,label\na.png,1\n",
        "a.npz": npz.getvalue(),
        "lying.npz": lying.getvalue(),
        "a.pth": pth.getvalue(),
        **{name: (run / name).read_bytes() for name in ("generator.safetensors", "model.onnx", "settings.toml")},
        "result.json": (run / "result.json").read_bytes(),
    }


def main() -> None:
    """Run the trials and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 40), ("flips", 200), ("disks", 20), ("hostile", 1000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--minutes", type=float, default=10.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands ignore what is ignored here, as below `nohup`
    with tempfile.TemporaryDirectory(prefix="zsq-trials-") as place:
        trials = Trials(Path(place), asked.minutes)
        whole = trials.folder / "whole"
        first = shell([*RUN, "--out", str(whole)])
        if first.returncode:
            sys.exit(f"Error: the run that is tried fails by itself: {first.stderr[-500:]}")
        seeds = seeds_of(whole)
        trials.each("hostile", asked.hostile, lambda number: hostile(trials, seeds, number))
        trials.each("flips", asked.flips, lambda number: flip(whole, trials.folder / "flip", number))
        trials.each("disks", asked.disks, lambda number: disk(trials, number))
        kills = Kills(trials.folder, whole)
        trials.each("kills", asked.kills, kills.kill)
    print(json.dumps({**trials.counts, "failures": len(trials.failures), "late": kills.late, "hits": kills.hits}))
    sys.exit(bool(trials.failures))


if __name__ == "__main__":
    main()

"""Long and large: many runs in one process, many images, many classes, large images, and a machine that dies.

    python benchmarks/endurance.py                        # all; about ten minutes on one core
    python benchmarks/endurance.py --only runs images     # some of: runs, images, classes, sides, machines

`runs` quantizes digits 50 times in one process and reads its memory, open files and temporary files after each.
`images` evaluates digits on 100,000 images of a folder and of an npz. `classes` quantizes a network of 10,000 classes,
`sides` one on images of 512x512 and 1024x1024. `machines` lets torchrun spread a run over two network namespaces,
kills all of one, and continues the run on both; it needs root and `ip`. Memory is the peak of a process of its own.
Prints one JSON line; exits with 1 where something failed.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RUNS, IMAGES, CLASSES, SIDES = 50, 100_000, 10_000, (512, 1024)
QUICK = {"method.steps": 2, "method.batch_size": 4, "quantizer.num_samples": 50}

MOST_GROWTH = 0.5
"""MiB by which a process may grow a run, once the first ten have loaded what they need."""

MOST_GROWN = 128
"""MiB that images may need beyond what a thousand of them do: the most that is read at once, twice."""

PATIENCE = 60
"""Seconds within which a machine has to notice that the other one is gone."""


def memory() -> dict[str, float]:
    """Return what this process holds: memory now and at its peak in MiB, open files, and temporary files of zsq."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": round(pages * resource.getpagesize() / 2**20, 1),
        "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "open": len(os.listdir("/proc/self/fd")),
        "temporary": sum(1 for path in Path(tempfile.gettempdir()).iterdir()),
    }


def many_runs(folder: Path, count: int = RUNS) -> dict[str, Any]:
    """Quantize digits again and again in this process."""
    import zsq

    seen = []
    for number in range(count):
        zsq.quantize("digits", out=folder / str(number), settings=QUICK, quiet=True)
        shutil.rmtree(folder / str(number))
        seen.append(memory())
    settled, last = seen[min(9, count // 2)], seen[-1]
    growth = (last["resident"] - settled["resident"]) / (count - 1 - min(9, count // 2))
    same = all(settled[name] == last[name] for name in ("open", "temporary"))
    return {
        "runs": count,
        "settled": settled,
        "last": last,
        "growth": round(growth, 3),
        "ok": growth < MOST_GROWTH and same,
    }


def many_images(folder: Path, kind: str) -> dict[str, Any]:
    """Evaluate digits on many images, drawn at 8x8 of 64 kinds so that files are written quickly."""
    from PIL import Image

    import zsq
    from zsq.data.datasets import open_dataset
    from zsq.evaluation.accuracy import evaluate

    drawn, path = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8), folder / kind
    if kind == "npz":
        path = folder / "many.npz"
        np.savez(path, images=np.tile(drawn, (IMAGES // 64 + 1, 1, 1))[:IMAGES], labels=np.arange(IMAGES) % 10)
    else:
        path.mkdir()
        for number, image in enumerate(drawn):
            Image.fromarray(image).save(path / f"{number:06d}.png")
        for number in range(64, IMAGES):
            os.link(path / f"{number % 64:06d}.png", path / f"{number:06d}.png")
    teacher = zsq.load_teacher("digits")
    evaluate(teacher.network, open_dataset(str(path), teacher.spec, limit=1000))
    before, begin = memory(), time.perf_counter()
    found = evaluate(teacher.network, open_dataset(str(path), teacher.spec))
    grown = memory()["peak"] - before["peak"]
    seconds = round(time.perf_counter() - begin, 1)
    return {"images": found.num_images, "grown": round(grown, 1), "seconds": seconds, "ok": grown < MOST_GROWN}


def quantized(folder: Path, side: int, classes: int = 0) -> dict[str, Any]:
    """Quantize a small MobileNet-like network with a generator of two steps, of classes or of ten values."""
    import torch
    from torch import nn

    import zsq

    def block(inputs: int, outputs: int, stride: int, groups: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    torch.manual_seed(0)
    widths = (8, 16, 32, 64)
    layers = [block(3, 8, 2)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [block(inputs, inputs, 2, inputs), block(inputs, outputs, 1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes or 10))
    gives: dict[str, Any] = {"classes": classes} if classes else {"outputs": (zsq.Output("", "values"),)}
    spec = zsq.ImageSpec(channels=3, height=side, width=side, mean=(0.5,) * 3, std=(0.25,) * 3, **gives)
    with torch.no_grad():
        for _ in range(5):  # batch norms settle
            network(torch.randn(4, 3, 1, 1) + torch.randn(4, 3, side, side))
    before, begin = memory(), time.perf_counter()
    zsq.quantize(network.eval(), spec, out=folder / "run", settings=QUICK, quiet=True)
    seconds = round(time.perf_counter() - begin, 1)
    return {"side": side, "classes": classes, "grown": round(memory()["peak"] - before["peak"]), "seconds": seconds}


class Machines:
    """Two network namespaces with a cable between them, until the block ends; a run in `out` is spread over both."""

    names = ("zsq-one", "zsq-two")

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "shared"

    def __enter__(self) -> "Machines":
        for name in self.names:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "zsq0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "zsq1",
            "netns",
            self.names[1],
        )
        for rank, name in enumerate(self.names):
            _ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", f"zsq{rank}")
            for device in ("lo", f"zsq{rank}"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for rank, name in enumerate(self.names):
            self.kill(rank)
            _ip("netns", "delete", name)

    def start(self, *more: str) -> "list[subprocess.Popen[str]]":
        """Start the run on both."""
        return [self._start(rank, *more) for rank in (0, 1)]

    def _start(self, rank: int, *more: str) -> "subprocess.Popen[str]":
        words = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-conf", f"is_host={1 - rank}"]
        words += ["--local-addr", f"10.77.0.{rank + 1}"]
        words += ["-m", "zsq", "quantize", "digits", "--set", "method.steps=400", "--set", "method.batch_size=16"]
        words += ["--set", "quantizer.num_samples=64", "--checkpoint-every", "20", "--out", str(self.out), *more]
        here = os.environ | {"GLOO_SOCKET_IFNAME": f"zsq{rank}"}  # the host name may stand for the loopback interface
        with (self.folder / f"said{rank}").open("w") as to:
            return subprocess.Popen(words, text=True, stderr=to, stdout=subprocess.DEVNULL, env=here)

    def kill(self, rank: int) -> None:
        """End all that runs on one; torchrun gives its workers sessions of their own."""
        for number in _ip("netns", "pids", self.names[rank]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)

    def said(self, rank: int) -> list[str]:
        """Return what one wrote to its standard error."""
        return (self.folder / f"said{rank}").read_text().splitlines()

    def errors(self, seconds: float) -> list[str]:
        """Return the errors of the first once it has told one, or nothing after so long."""
        until, found = time.monotonic() + seconds, list[str]()
        while not found and time.monotonic() < until:
            time.sleep(0.1)
            found = [line for line in self.said(0) if line.startswith("Error: ")]
        return found


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def machines(folder: Path) -> dict[str, Any]:
    """Let one of two machines die in the fit, and continue the run on both."""
    with Machines(folder) as two:
        both = two.start()
        while not (two.out / "checkpoints" / "fit.safetensors").exists():
            if any(process.poll() is not None for process in both):
                return {"ok": False, "said": two.said(0) + two.said(1)}
            time.sleep(0.1)
        two.kill(1)
        died = time.monotonic()
        lines = two.errors(PATIENCE)
        noticed = round(time.monotonic() - died, 1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            both[0].wait(10)
        two.kill(0)  # torchrun itself waits longer for the other machine
        codes = [process.wait(600) for process in two.start("--resume")]
        ok = len(lines) == 1 and codes == [0, 0] and (two.out / "result.json").exists()
        said = lines if ok else [*lines, *two.said(0), *two.said(1)]
    return {"noticed_seconds": noticed, "said": said, "codes": codes, "ok": ok}


def parts() -> dict[str, list[tuple[str, Callable[[Path], dict[str, Any]]]]]:
    """Return what is measured, each part in a process of its own."""
    return {
        "runs": [("50 runs", many_runs)],
        "images": [(kind, functools.partial(many_images, kind=kind)) for kind in ("npz", "folder")],
        "classes": [("10,000 classes", functools.partial(quantized, side=64, classes=CLASSES))],
        "sides": [(str(side), functools.partial(quantized, side=side)) for side in SIDES],
        "machines": [("two machines", machines)],
    }


def main() -> None:
    """Measure each part, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(parts()), default=list(parts()))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        part, number, folder = asked.child
        print(json.dumps(parts()[part][int(number)][1](Path(folder))))
        return
    found: dict[str, Any] = {}
    for part in asked.only:
        for number, (title, _) in enumerate(parts()[part]):
            with tempfile.TemporaryDirectory(prefix="zsq-endurance-", ignore_cleanup_errors=True) as folder:
                words = [sys.executable, __file__, "--child", part, str(number), folder]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
            found[title] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"ok": False}
            print(json.dumps({title: found[title]}), file=sys.stderr, flush=True)
    print(json.dumps(found))
    sys.exit(not all(each.get("ok", True) for each in found.values()))


if __name__ == "__main__":
    main()

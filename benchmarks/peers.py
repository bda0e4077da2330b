"""What each way of making images costs and gives: same teacher, same quantizer, same test images.

    python benchmarks/peers.py --data ../shared/data
    python benchmarks/peers.py --small
    python benchmarks/peers.py mobilenet_v2 --mct ../mct/bin/python --sources mct noise --tools zsq zsq-default --bits 8

Images: zsq's generator (zscgan), ZeroQ's distilled data (zeroq), GENIE's (genie, see genie.py), real ones and noise.
ZeroQ and GENIE are written anew from their papers, and each method stops when its time is over, so that these are not
those papers' figures. Quantizers: zsq's PTQ at INT8, INT6 and INT4, its distillation at the target's width, and the
static INT8 quantization of ONNX Runtime (with int8 and with uint8 activations) and of NNCF, each at its defaults. Every
top-1 is an ONNX file's in ONNX Runtime, every agreement that of the same file with the float network. Sony MCT's images
(mct) are made by MCT itself, in an environment of its own: mct_images.py. zsq-default is `zsq quantize NET --bits 8`
without more, zsq-live is `zsq quantize --recipe recipes/quick.toml` as a whole.

One process after the other does the work, each measured by its own peak memory. A finished row is not run again;
its line is in benchmarks/results/peers.jsonl, and its files are under the folder of --out.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from machine import load, processor
from records import append

EXAMPLES = Path(__file__).parents[1] / "examples"
SYNTHETIC = ("zscgan", "zeroq", "genie")
MCT = "mct"
SOURCES = (*SYNTHETIC, MCT, "real", "noise")
LIVE = "zsq-live"
"""The whole of recipes/quick.toml: the generator goes on learning while it teaches, and no images are stored."""
DEFAULT = "zsq-default"
"""The command without a setting: it chooses when to stop."""
WHOLE = (LIVE, DEFAULT)
TOOLS = ("zsq", "zsq-qat", *WHOLE, "onnxruntime", "onnxruntime-uint8", "nncf")
DATA_FREE_PEERS = ("zeroq", "genie")
MCT_IMAGES, MCT_ITERATIONS = 32, 120
"""One batch, and as many iterations as take some minutes of two CPU cores."""


@dataclass(frozen=True)
class Network:
    """Where a network and its images lie below the data folder, and which accuracy counts as good enough."""

    model: str
    weights: str
    test: str
    train: str
    target: tuple[str, float]
    """Bits, and the least top-1 in percent."""
    resize: Literal["none"] | None = None
    """`none`: the test images are crops already."""


NETWORKS = {
    "cifar10": Network(
        "cifar10.py:cifar10_resnet20",
        "weights/cifar10_resnet20.safetensors",
        "cifar10/test.npz",
        "cifar10/train.npz",
        ("4", 80.0),
    ),
    "mobilenet_v1_025": Network(
        "mobilenet_v1.py:mobilenet_v1_025",
        "weights/imagenet_mobilenet_v1_025.safetensors",
        "imagenet/val",
        "imagenet/calib",
        ("8", 64.92 - 3.5),
    ),
    "mobilenet_v2": Network(
        "mobilenet_v2.py:mobilenet_v2",
        "weights/imagenet_mobilenet_v2.safetensors",
        "imagenet/val",
        "imagenet/calib",
        ("8", 81.38 - 1.0),
        resize="none",
    ),
}


class Bench:
    """Runs the rows of one network."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        network, data = NETWORKS[name], arguments.data
        self.name, self.arguments, self.target = name, arguments, network.target
        self.folder = arguments.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = {
            "model": str(EXAMPLES / network.model),
            "weights": str(data / network.weights),
            "test": str(data / network.test),
            "train": str(data / network.train),
            "folder": str(self.folder),
            "threads": arguments.threads,
            "resize": network.resize,
        }

    def images(self, source: str) -> dict[str, Any]:
        """Make or take a source's images, unless that is done."""
        job = {"kind": "images", "source": source, "images": self.arguments.images, "seconds": self.arguments.seconds}
        if source == MCT:
            job |= {"python": self.arguments.mct, "images": MCT_IMAGES, "iterations": MCT_ITERATIONS}
        return self.do(f"images-{source}", job)

    def row(self, tool: str, source: str) -> dict[str, Any]:
        """Quantize with a source's images, unless that is done; record the row."""
        none: dict[str, Any] = {"kept": [{"images": "fresh"}], "images_per_second": None}
        made = none if tool in WHOLE else self.images(source)
        if tool not in ("zsq", *WHOLE):
            self.do("float", {"kind": "float"})  # by itself, so that it counts in nobody's memory
        job = {"kind": "quantize", "tool": tool, "source": source, "kept": made["kept"]}
        job |= {"bits": self.arguments.bits, "target": self.target, "test_images": self.arguments.test_images}
        job |= {"distill_steps": self.arguments.distill_steps} if tool == "zsq-qat" else {}
        name = f"{tool}-{source}"
        is_new = not self.finished(name, job)
        found = self.do(name, job)
        facts = {key: value for key, value in made.items() if key not in ("kept", "job_seconds")}
        row = {
            "network": self.name,
            "tool": tool,
            "source": "own" if tool == DEFAULT else source,
            "images": made["kept"][-1]["images"],
            **facts,
        }
        row |= {"threads": self.arguments.threads, "test_images": self.arguments.test_images, **found}
        if is_new and "skipped" not in row and not self.arguments.no_record:
            hardware = {"processor": processor(), "cores": os.cpu_count(), "load": load()}
            append("peers", {**row, "budget_seconds": self.arguments.seconds, "target": self.target, **hardware})
        return row

    def finished(self, name: str, job: dict[str, Any]) -> bool:
        """Tell whether a job is done just as it is asked for now."""
        asked = self.folder / f"{name}.json"
        done = asked.with_suffix(".done")
        if not (asked.exists() and done.exists()) or "skipped" in json.loads(done.read_text()):
            return False
        return bool(json.loads(asked.read_text()) == json.loads(json.dumps(self.common | job)))

    def do(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a job, which runs in a process of its own where it is not finished."""
        asked = self.folder / f"{name}.json"
        done = asked.with_suffix(".done")
        if not self.finished(name, job):
            print(f"{self.name}: {name}", flush=True)
            done.unlink(missing_ok=True)
            asked.write_text(json.dumps(self.common | job))
            script = Path(__file__).with_name("peer_jobs.py")
            threads = {"OMP_NUM_THREADS": str(self.arguments.threads)}
            log = asked.with_suffix(".log")
            command = [sys.executable, str(script), str(asked)]
            with open(log, "w") as file:
                code = subprocess.run(
                    command, env=os.environ | threads, stdout=file, stderr=file, check=False
                ).returncode
            if code:
                raise SystemExit(f"{name} failed ({code}); see {log}")
        result: dict[str, Any] = json.loads(done.read_text())
        return result


def cells(row: dict[str, Any], bits: list[str]) -> list[str]:
    """Return a row of the table."""
    if "skipped" in row:
        return [row["tool"], row["source"], f"skipped: {row['skipped']}", *["-"] * (7 + len(bits))]

    def text(value: Any, form: str = "{:.0f}") -> str:
        return "-" if value is None else form.format(value)

    return [
        row["tool"],
        row["source"],
        text(row["synthesis_seconds"]),
        str(row["images"]),
        text(row.get("seconds_to_target")) if row["tool"] == "zsq" else "-",
        *(text(row["top1"].get(width), "{:.2f}") for width in bits),
        text(row.get("agreement", {}).get(bits[0]), "{:.2f}"),
        text(row.get("synthesis_peak_MiB")),
        text(row["peak_MiB"]),
        text(row["job_seconds"]),
        text(row["images_per_second"]),
    ]


def table(rows: list[dict[str, Any]], bits: list[str], target: tuple[str, float]) -> str:
    """Return the rows as a Markdown table."""
    head = ["quantizer", "images of", "s to synthesise", "images", f"s to INT{target[0]} {target[1]:.1f} %"]
    head += [f"INT{width} top-1" for width in bits]
    head += [f"INT{bits[0]} agreement"]
    head += ["peak MiB, synthesis", "peak MiB, quantizing", "s, quantizing", "images/s once trained"]
    lines = [head, ["---"] * len(head), *(cells(row, bits) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aims(rows: list[dict[str, Any]]) -> list[str]:
    """Say when each source's images, distilled, gave what those of the best data-free peer gave in the end.

    Seconds are those of making the images and of distilling; rates are images a second of making.
    """
    names = {"zsq-qat": "{}", LIVE: "{}, live"}
    by_source = {names[row["tool"]].format(row["source"]): row for row in rows if row["tool"] in names}
    peers = {name: by_source[name]["curve"][-1]["top1"] for name in DATA_FREE_PEERS if name in by_source}
    if not peers:
        return []
    best = max(peers, key=lambda name: peers[name])
    spent = sum(by_source[best]["curve"][-1][part] for part in ("seconds", "distill_seconds"))
    lines = [f"best data-free peer, distilled: {best}, {peers[best]:.2f} % in {spent:.0f} s"]
    for name, row in by_source.items():
        reached = [moment for moment in row["curve"] if moment["top1"] >= peers[best]]
        if reached:
            first = reached[0]["seconds"] + reached[0]["distill_seconds"]
            lines.append(f"{name}: reached after {first:.0f} s, {first / spent:.2f} of that time")
        else:
            most = max(moment["top1"] for moment in row["curve"])
            lines.append(f"{name}: not reached, at most {most:.2f} %")
        if row["synthesis_seconds"] and row["images"] != "fresh":
            rate = row["images_per_second"] or row["images"] / row["synthesis_seconds"]
            lines[-1] += f"; {rate:.4g} images/s"
    return lines


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all, with --small cifar10")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, help="where rows and files are kept; default: runs/peers")
    parser.add_argument("--small", action="store_true", help="about ten minutes: 60 s a method, 1000 test images")
    parser.add_argument("--seconds", type=float, help="of synthesis, for each method (600; small: 60)")
    parser.add_argument("--images", type=int, help="calibration images (1024; small: 256)")
    parser.add_argument("--test-images", type=int, help="images of the accuracy (all; small: 1000)")
    parser.add_argument("--distill-steps", type=int, help="of 64 images (200; small: 50)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mct", help="interpreter that has MCT, for the source mct")
    parser.add_argument("--no-record", action="store_true", help="append nothing to the results")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=[*SYNTHETIC, "real", "noise"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--bits", nargs="+", default=["8", "6", "4"])
    arguments = parser.parse_args(given)
    if unknown := [name for name in arguments.networks if name not in NETWORKS]:
        parser.error(f"unknown networks {', '.join(unknown)}; known: {', '.join(NETWORKS)}")
    if MCT in arguments.sources and not arguments.mct:
        parser.error("the source mct needs --mct PYTHON; see mct_images.py")
    small = arguments.small
    arguments.networks = arguments.networks or (["cifar10"] if small else list(NETWORKS))
    arguments.out = arguments.out or Path("runs/peers-small" if small else "runs/peers")
    arguments.seconds = arguments.seconds or (60.0 if small else 600.0)
    arguments.distill_steps = arguments.distill_steps or (50 if small else 200)
    arguments.images = arguments.images or (256 if small else 1024)
    arguments.test_images = arguments.test_images or (1000 if small else None)
    return arguments


def main(given: list[str] | None = None) -> None:
    """Run every row and print the tables."""
    arguments = parse(given)
    for name in arguments.networks:
        bench = Bench(name, arguments)
        pairs = ((tool, source) for tool in arguments.tools for source in arguments.sources)
        rows = [bench.row(*pair) for pair in pairs if pair[0] not in WHOLE or pair[1] == arguments.sources[0]]
        print(f"\n{name}, {arguments.threads} thread(s)\n\n{table(rows, arguments.bits, bench.target)}\n", flush=True)
        print("\n".join(aims(rows)), flush=True)


if __name__ == "__main__":
    main()

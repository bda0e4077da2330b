"""Speed and size of the INT8 file against the float file and ONNX Runtime's own quantization of the same network.

    python benchmarks/deployed.py
    python benchmarks/deployed.py --small --profile

The files take turns on one thread with the same images, so that a busy machine slows all alike. Weights are
random and calibration images noise: this is about time and bytes, not about accuracy. Appends one line for each network
and batch size to benchmarks/results/deployed.jsonl and prints Markdown tables.
"""

import argparse
import hashlib
import json
import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from floatfile import quantize_by_onnxruntime, write_float
from machine import load, processor
from records import append
from timing import Times, interleaved, milliseconds, ratio

import zsq
from zsq.export.onnx import write_onnx
from zsq.methods import Noise
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run

EXAMPLES = Path(__file__).parents[1] / "examples"

NETWORKS = {
    "digits": "digits",
    "resnet20": str(EXAMPLES / "cifar10.py:cifar10_resnet20"),
    "resnet18": "pytorchcv:resnet18",
    "mobilenetv2": "pytorchcv:mobilenetv2_w1",
    "mobilenetv3_large": "pytorchcv:mobilenetv3_large_w1",
    "efficientnet_b0": "pytorchcv:efficientnet_b0",
    "densenet121": "pytorchcv:densenet121",
}
CELLS = [(name, batch) for name in NETWORKS if name != "digits" for batch in (1, 16)]
SMALL_CELLS = [("resnet20", 1), ("resnet20", 16), ("mobilenetv3_large", 1)]

LEAST_SHARE = 0.95
"""Bar: our speed-up over float divided by the better one of ONNX Runtime's own quantization."""
LEAST_SPEEDUP = {"mobilenetv3_large": 1.5}
"""Bar: speed-up over float."""

CONVERSIONS = frozenset(("QuantizeLinear", "DequantizeLinear"))
MOVES = frozenset(
    """Concat Constant Flatten Gather Identity MaxPool NhwcMaxPool Pad Reshape Shape Slice Split Squeeze
    Transpose Unsqueeze""".split()  # noqa: SIM905
)
"""Operations that compute no new value, whatever type they work on."""

PEERS = ("onnxruntime", "onnxruntime-uint8")
"""The other tool at its defaults, and with unsigned activations, which its runtime often runs faster."""
FILES = ("float", "zsq", *PEERS)


def size_bound(model: onnx.ModelProto) -> int:
    """Return the bytes that the file may have: 1.1 x (int8 weights + 9 an output channel) + 400 a node.

    The nine bytes are a channel's scale, zero point and int32 bias.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights: dict[str, int] = {}
    channels = 0
    for node in model.graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is None or tensor.data_type != onnx.TensorProto.INT8 or tensor.name in weights:
            continue
        weights[tensor.name] = int(np.prod(tensor.dims))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        channels += tensor.dims[axis]
    return int(1.1 * (sum(weights.values()) + 9 * channels)) + 400 * len(model.graph.node)


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Count the operations of an optimised graph by what they do: integer, convert, move, float."""
    counts = {"integer": 0, "convert": 0, "move": 0, "float": 0}
    integers: set[str] = set()
    for node in model.graph.node:
        named_integer = node.op_type.startswith("QLinear") or node.op_type in ("QGemm", "ConvInteger", "MatMulInteger")
        on_integers = bool(integers & set(node.input))
        if node.op_type in CONVERSIONS:
            counts["convert"] += 1
        elif node.op_type in MOVES:
            counts["move"] += 1
        else:
            counts["integer" if named_integer or on_integers else "float"] += 1
        if node.op_type != "DequantizeLinear" and (named_integer or on_integers or node.op_type == "QuantizeLinear"):
            integers.update(node.output)
    return counts


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def sources_sha256() -> str:
    """Return a hash of zsq's code: a file that other code wrote is not timed as this code's."""
    digest = hashlib.sha256()
    for path in sorted(Path(zsq.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_files(name: str, out: Path, count: int) -> dict[str, Path]:
    """Write the files of a network where they are not there yet; all quantizers see the same images."""
    folder = out / name
    stamps = {"float": f"torch {torch.__version__}", "zsq": sources_sha256()}
    stamps |= dict.fromkeys(PEERS, f"{onnxruntime.__version__} {stamps['float']}")
    stamps = {kind: f"{stamp}, {count} images" for kind, stamp in stamps.items()}
    files = {kind: folder / f"{kind}.onnx" for kind in FILES}

    def stale(kind: str) -> bool:
        note = files[kind].with_suffix(".txt")
        return not (files[kind].exists() and note.exists() and note.read_text() == stamps[kind])

    wanted = [kind for kind in FILES if stale(kind)]
    if not wanted:
        return files
    folder.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(NETWORKS[name], weights=None if name == "digits" else "random")
    source = Noise().fit(teacher, Run()).source
    images = torch.cat([batch.images for batch in source.sample(count)])
    for kind in wanted:
        print(f"{name}: writing {files[kind]}", flush=True)
        if kind == "float":
            write_float(teacher, files[kind])
        elif kind == "zsq":
            write_ours(teacher, lambda: source.sample(count), files[kind])
        else:
            batches = [image[None].numpy() for image in images]
            quantize_by_onnxruntime(files["float"], batches, files[kind], unsigned=kind == "onnxruntime-uint8")
        files[kind].with_suffix(".txt").write_text(stamps[kind])
    return files


def write_ours(teacher: Teacher, images: Any, path: Path) -> None:
    """Write zsq's INT8 file; the correction of biases changes no cost and is left out."""
    student = quantize_ptq(teacher.network, images, PTQ(bias_correction=False), Run())
    write_onnx(convert(student), teacher.spec, path)


def session(path: Path, *, optimized: Path | None = None, profile: Path | None = None) -> Any:
    """Open a file as users do, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def require_same_job(sessions: dict[str, Any], feed: dict[str, np.ndarray]) -> dict[str, float]:
    """Return each file's largest difference from the float logits, as a share of their largest.

    Raises:
        ValueError: the files do not take the same input or do not give the same output.
    """
    inputs = {kind: [(i.name, i.type, i.shape[1:]) for i in s.get_inputs()] for kind, s in sessions.items()}
    if len({str(value) for value in inputs.values()}) != 1:
        raise ValueError(f"the files take different inputs, so their times say nothing: {inputs}")
    logits = {kind: s.run(None, feed)[0] for kind, s in sessions.items()}
    shapes = {kind: value.shape for kind, value in logits.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the files give different outputs, so their times say nothing: {shapes}")
    most = float(np.abs(logits["float"]).max())
    return {kind: round(float(np.abs(v - logits["float"]).max()) / most, 4) for kind, v in logits.items()}


def take_turns(sessions: dict[str, Any], feed: dict[str, np.ndarray], *, seconds: float, least: int) -> Times:
    """Run the files in turn, for so long but `least` rounds; return the seconds of each round."""
    actions = {kind: partial(runner.run, None, feed) for kind, runner in sessions.items()}
    device = torch.device("cpu")
    first = interleaved(actions, 3, device)
    cost = sum(min(values) for values in first.values())
    return interleaved(actions, max(least, int(seconds / cost)), device, warm_up=0)


def executed(path: Path) -> onnx.ModelProto:
    """Return the graph that the runtime executes, after it has fused what it can."""
    optimized = path.with_suffix(".optimized")
    session(path, optimized=optimized)
    return onnx.load(optimized, load_external_data=False)


def time_by_operation(path: Path, feed: dict[str, np.ndarray], prefix: Path, runs: int = 20) -> dict[str, list[float]]:
    """Return for each kind of operation how many there are and their milliseconds a run, the slowest first."""
    runner = session(path, profile=prefix)
    for _ in range(runs):
        runner.run(None, feed)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    trace = Path(runner.end_profiling())
    for event in json.loads(trace.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            entry = found[event["args"]["op_name"]]
            entry[0] += 1 / runs
            entry[1] += event["dur"] / 1e3 / runs
    trace.unlink()
    return {name: [round(n), round(ms, 4)] for name, (n, ms) in sorted(found.items(), key=lambda item: -item[1][1])}


def measured(times: Times) -> dict[str, Any]:
    """Return medians, minima, speed-ups over float, and our speed-up as a share of the other tool's better one.

    Speed-ups are medians over the rounds of the ratio within a round.
    """
    minima = {kind: round(1e3 * min(values), 4) for kind, values in times.items()}
    peer, fastest = (min(PEERS, key=lambda kind: found[kind]) for found in (milliseconds(times), minima))
    return {
        "rounds": len(times["float"]),
        "median_ms": milliseconds(times),
        "min_ms": minima,
        "speedup": {kind: ratio(times, "float", [kind]) for kind in FILES[1:]},
        "speedup_of_minima": {kind: round(minima["float"] / minima[kind], 3) for kind in FILES[1:]},
        "peer": peer,
        "share_of_peer": ratio(times, peer, ["zsq"]),
        "share_of_peer_of_minima": round(minima[fastest] / minima["zsq"], 3),
    }


def verdicts(record: dict[str, Any]) -> dict[str, bool]:
    """Hold a record against the bars."""
    reached = {
        "share_of_peer": record["share_of_peer"] >= LEAST_SHARE,
        "file_bytes": record["file_bytes"]["zsq"] <= record["size_bound"],
    }
    if record["network"] in LEAST_SPEEDUP:
        reached["speedup"] = record["speedup"]["zsq"] >= LEAST_SPEEDUP[record["network"]]
    return reached


def measure(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network at one batch size."""
    files = write_files(name, arguments.out, arguments.calibration)
    sessions = {kind: session(path) for kind, path in files.items()}
    taken = sessions["float"].get_inputs()[0]
    images = np.random.default_rng(0).standard_normal((batch, *taken.shape[1:]), np.float32)
    feed = {taken.name: images}
    error = require_same_job(sessions, feed)
    before = load()
    times = take_turns(sessions, feed, seconds=arguments.seconds, least=arguments.rounds)
    graphs = {kind: executed(path) for kind, path in files.items()}
    record = {
        "network": name,
        "batch": batch,
        "threads": 1,
        **measured(times),
        "load_before": before,
        "file_bytes": {kind: path.stat().st_size for kind, path in files.items()},
        "size_bound": size_bound(onnx.load(files["zsq"])),
        "logit_error": error,
        "operations": {k: dict(Counter(n.op_type for n in g.graph.node).most_common()) for k, g in graphs.items()},
        "kinds": {kind: kinds(graph) for kind, graph in graphs.items()},
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if arguments.profile:
        prefix = arguments.out / name / "profile"
        record["ms_by_operation"] = {kind: time_by_operation(path, feed, prefix) for kind, path in files.items()}
    return record | {"reached": verdicts(record)}


def row(record: dict[str, Any]) -> list[str]:
    """Return a record as a row of the table."""
    median, speedup, counts = record["median_ms"], record["speedup"], record["kinds"]
    missed = [name for name, reached in record["reached"].items() if not reached]
    return [
        record["network"],
        str(record["batch"]),
        *(f"{median[kind]:.2f}" for kind in FILES),
        *(f"{speedup[kind]:.2f}" for kind in FILES[1:]),
        f"{record['share_of_peer']:.2f}",
        *("/".join(str(value) for value in counts[kind].values()) for kind in FILES[1:]),
        f"{record['file_bytes']['zsq']:,} of {record['size_bound']:,}",
        f"{record['file_bytes']['onnxruntime']:,}",
        "missed: " + ", ".join(missed) if missed else "reached",
    ]


HEAD = ["network", "batch", "float ms", "zsq ms", "ORT ms", "ORT u8 ms", "zsq x", "ORT x", "ORT u8 x", "zsq / ORT"]
HEAD += ["zsq ops", "ORT ops", "ORT u8 ops", "zsq bytes of bound", "ORT bytes", "bars"]


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/deployed"), help="where exported files are kept")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes of the networks named; default: 1 and 16")
    parser.add_argument("--seconds", type=float, default=20.0, help="least time of a cell")
    parser.add_argument("--rounds", type=int, default=20, help="least rounds of a cell")
    parser.add_argument("--calibration", type=int, default=8, help="calibration images")
    parser.add_argument("--small", action="store_true", help="resnet20, and mobilenetv3_large at batch 1; 3 s a cell")
    parser.add_argument("--profile", action="store_true", help="time each kind of operation, too")
    parser.add_argument("--no-record", action="store_true", help="append nothing to the results")
    arguments = parser.parse_args(given)
    if unknown := [name for name in arguments.networks if name not in NETWORKS]:
        parser.error(f"unknown networks {', '.join(unknown)}; known: {', '.join(NETWORKS)}")
    if arguments.small:
        arguments.seconds = min(arguments.seconds, 3.0)
    return arguments


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, record and print."""
    arguments = parse(given)
    torch.set_num_threads(1)
    cells = SMALL_CELLS if arguments.small else CELLS
    if arguments.networks:
        cells = [(name, batch) for name in arguments.networks for batch in arguments.batch or (1, 16)]
    records = []
    for name, batch in cells:
        records.append(measure(name, batch, arguments))
        if not arguments.no_record:
            append("deployed", {k: v for k, v in records[-1].items() if k != "ms_by_operation"})
    print("\nops: integer/convert/move/float, as executed\n" + markdown(HEAD, [row(record) for record in records]))
    for record in records if arguments.profile else ():
        for kind, table in record["ms_by_operation"].items():
            rows = [[name, str(count), f"{ms:.3f}"] for name, (count, ms) in list(table.items())[:14]]
            print(f"\n{record['network']}, batch {record['batch']}, {kind}\n")
            print(markdown(["operation", "count", "ms a run"], rows))
    return records


if __name__ == "__main__":
    main()

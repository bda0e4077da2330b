"""The benchmarks of deployed files and of peers: bounds, counts, tables, records, and one small run."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a script of benchmarks/ as the scripts import each other; forget it afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def model(nodes, initializers=()):
    graph = helper.make_graph(nodes, "test", [], [], list(initializers))
    return helper.make_model(graph)


def test_size_bound_counts_weights_channels_and_nodes_once(module):
    weight = helper.make_tensor("w", TensorProto.INT8, (4, 3, 2, 2), np.zeros(48, np.int8).tobytes(), raw=True)
    bias = helper.make_tensor("b", TensorProto.INT32, (4,), [0] * 4)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf2"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "s"], ["bf"], axis=0),
    ]
    assert module("deployed").size_bound(model(nodes, [weight, bias])) == int(1.1 * (48 + 9 * 4)) + 400 * 3


def test_operations_count_by_the_type_that_they_work_on(module):
    nodes = [
        helper.make_node("QuantizeLinear", ["images"], ["a"]),
        helper.make_node("QLinearConv", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"]),
        helper.make_node("Clip", ["c"], ["d"]),  # of integers
        helper.make_node("DequantizeLinear", ["d"], ["e"]),
        helper.make_node("HardSwish", ["e"], ["f"]),
    ]
    assert module("deployed").kinds(model(nodes)) == {"integer": 2, "convert": 2, "move": 1, "float": 1}


def times(zsq, default, unsigned):
    return {"float": [0.004, 0.008], "zsq": zsq, "onnxruntime": default, "onnxruntime-uint8": unsigned}


def test_speedups_are_ratios_within_a_round_and_the_better_peer_counts(module):
    deployed = module("deployed")
    found = deployed.measured(times([0.002, 0.004], [0.008, 0.016], [0.001, 0.002]))
    assert found["speedup"] == {"zsq": 2.0, "onnxruntime": 0.5, "onnxruntime-uint8": 4.0}
    assert (found["peer"], found["share_of_peer"], found["rounds"]) == ("onnxruntime-uint8", 0.5, 2)
    assert found["min_ms"]["zsq"] == 2.0


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"share_of_peer": 0.94}, ["share_of_peer"]),
        ({"file_bytes": {"zsq": 101}}, ["file_bytes"]),
        ({"network": "mobilenetv3_large", "speedup": {"zsq": 1.49}}, ["speedup"]),
        ({"network": "resnet18", "speedup": {"zsq": 1.0}}, []),
    ],
)
def test_bars(module, change, missed):
    record = {"network": "mobilenetv3_large", "share_of_peer": 0.95, "file_bytes": {"zsq": 100}, "size_bound": 100}
    reached = module("deployed").verdicts(record | {"speedup": {"zsq": 1.5}} | change)
    assert [name for name, good in reached.items() if not good] == missed


class Fake:
    """Stands in for a session."""

    def __init__(self, shape, outputs):
        self.shape, self.outputs = shape, outputs

    def get_inputs(self):
        return [type("Input", (), {"name": "images", "type": "tensor(float)", "shape": ["batch", *self.shape]})]

    def run(self, names, feed):
        del names
        return [np.ones((len(feed["images"]), self.outputs), np.float32)]


@pytest.mark.parametrize(("other", "words"), [(Fake((3, 9, 9), 10), "inputs"), (Fake((3, 8, 8), 5), "outputs")])
def test_different_jobs_are_not_timed(module, other, words):
    feed = {"images": np.zeros((1, 3, 8, 8), np.float32)}
    with pytest.raises(ValueError, match=f"different {words}"):
        module("deployed").require_same_job({"float": Fake((3, 8, 8), 10), "zsq": other}, feed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_digits_are_exported_timed_and_cached(module, tmp_path, capsys):
    deployed = module("deployed")
    command = ["digits", "--batch", "1", "--out", str(tmp_path), "--seconds", "0.1", "--no-record", "--profile"]
    (record,) = deployed.main(command)
    assert record["kinds"]["zsq"]["float"] == 0
    assert record["file_bytes"]["zsq"] <= record["size_bound"]
    assert record["logit_error"]["float"] == 0 < record["logit_error"]["zsq"] < 0.2
    assert set(record["ms_by_operation"]) == set(deployed.FILES)
    assert "QLinearConv" in capsys.readouterr().out
    assert json.dumps(record)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").glob("*.onnx")}
    deployed.main(command[:-1])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(stamps) == len(deployed.FILES)
    onnx.checker.check_model(onnx.load(tmp_path / "digits" / "float.onnx"))


def test_images_are_kept_at_the_ends_of_batches(module):
    kept = module("peer_jobs").kept_steps
    assert kept(800, 1) == [100, 200, 400, 800]
    assert kept(1000, 500) == [500, 1000]
    assert kept(1, 500) == [1]


ROW = {
    "tool": "zsq",
    "source": "zscgan",
    "images": 256,
    "synthesis_seconds": 61.3,
    "seconds_to_target": 7.7,
    "top1": {"8": 91.5, "4": 82.25},
    "agreement": {"8": 96.25, "4": 88.0},
    "synthesis_peak_MiB": 512,
    "peak_MiB": 600,
    "job_seconds": 20.2,
    "images_per_second": 800.4,
}


def test_peers_table_says_what_was_not_measured(module):
    peers = module("peers")
    other = ROW | {"tool": "onnxruntime", "top1": {"8": 90.0}, "agreement": {}, "images_per_second": None}
    skipped = {"tool": "nncf", "source": "real", "skipped": "pip install nncf"}
    lines = peers.table([ROW, other, skipped], ["8", "4"], ("4", 80.0)).splitlines()
    assert lines[2] == "| zsq | zscgan | 61 | 256 | 8 | 91.50 | 82.25 | 96.25 | 512 | 600 | 20 | 800 |"
    assert lines[3] == "| onnxruntime | zscgan | 61 | 256 | - | 90.00 | - | - | 512 | 600 | 20 | - |"
    assert "skipped: pip install nncf" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def distilled(source, curve, rate=None):
    moments = [{"seconds": s, "distill_seconds": 10.0, "top1": top1} for s, top1 in curve]
    made = {"synthesis_seconds": curve[-1][0], "images": 100, "images_per_second": rate}
    return {"tool": "zsq-qat", "source": source, "curve": moments, **made}


def test_the_aim_is_what_the_best_data_free_peer_ends_with(module):
    rows = [
        distilled("zscgan", [(20.0, 85.0), (40.0, 88.0), (100.0, 89.0)], rate=5000.0),
        distilled("zeroq", [(50.0, 89.5), (100.0, 87.5)]),
        distilled("genie", [(100.0, 80.0)]),
        distilled("real", [(0.0, 91.0)]),
        {"tool": "zsq", "source": "zscgan"},
        distilled("zscgan", [(12.0, 87.6)]) | {"tool": "zsq-live", "images": "fresh"},
    ]
    assert module("peers").aims(rows) == [
        "best data-free peer, distilled: zeroq, 87.50 % in 110 s",
        "zscgan: reached after 50 s, 0.45 of that time; 5000 images/s",
        "zeroq: reached after 60 s, 0.55 of that time; 1 images/s",
        "genie: not reached, at most 80.00 %; 1 images/s",
        "real: reached after 10 s, 0.09 of that time",
        "zscgan, live: reached after 22 s, 0.20 of that time",
    ]
    assert module("peers").aims(rows[:1]) == []


def test_a_finished_job_is_not_run_again(module, tmp_path):
    peers = module("peers")
    bench = peers.Bench("cifar10", peers.parse(["cifar10", "--small", "--out", str(tmp_path)]))
    job = {"kind": "images", "source": "noise", "images": 8, "seconds": 1.0}
    assert not bench.finished("images-noise", job)
    asked = tmp_path / "cifar10" / "images-noise.json"
    asked.write_text(json.dumps(bench.common | job))
    asked.with_suffix(".done").write_text('{"kept": []}')
    assert bench.finished("images-noise", job)
    assert bench.do("images-noise", job) == {"kept": []}
    assert not bench.finished("images-noise", job | {"images": 9})
    asked.with_suffix(".done").write_text('{"skipped": "not installed"}')
    assert not bench.finished("images-noise", job)


def test_swing_moves_by_less_than_the_stride_and_keeps_the_shape(module):
    swing = module("genie").Swing((1, 1))
    x = torch.arange(36.0).view(1, 1, 6, 6)
    seen = set()
    for seed in range(40):
        swing.random = torch.Generator().manual_seed(seed)
        moved = swing(x)
        assert moved.shape == x.shape
        seen.add(float(moved[0, 0, 2, 2]) - float(x[0, 0, 2, 2]))
    assert seen == {6.0 * rows + columns for rows in (-1, 0, 1) for columns in (-1, 0, 1)}
    assert torch.equal(swing.forward(torch.ones(1, 1, 6, 6)), torch.ones(1, 1, 6, 6))

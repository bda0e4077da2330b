"""Two random networks on the runtimes that are installed; `benchmarks/random_networks.py` draws hundreds."""

import sys
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from zsq.models.teacher import teacher_from_module

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import random_networks


@pytest.mark.slow
@pytest.mark.parametrize("seed", [57, 6])  # of signals, whose mean OpenVINO takes wrongly over three axes; of images
def test_runtimes_compute_what_is_simulated(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", ONNXRegistry.from_torchlib)  # set back at the end
    random_networks.list_operators_once()
    drawn = random_networks.drawn(seed)
    teacher = teacher_from_module(drawn.network, drawn.spec)
    lines = [
        random_networks.tried(drawn, teacher, target, tmp_path / f"{target.name}{target.suffix}")
        for target in random_networks.installed(["onnxruntime", "openvino", "litert"])
    ]
    assert lines
    assert all(line["status"] == "agrees" for line in lines), lines

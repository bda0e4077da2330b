import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from converted import SPEC, converted_network
from torch import fx, nn

from zsq.errors import ExportError
from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.pt2 import write_pt2
from zsq.graph.edit import aten


@pytest.mark.slow
@pytest.mark.parametrize(("write", "name"), [(write_onnx, "8.onnx"), (write_pt2, "8.pt2")])
def test_the_same_network_gives_the_same_bytes(
    write: Callable[..., None], name: str, files: Path, tmp_path: Path
) -> None:
    network = converted_network()
    code = network.code
    write(network, SPEC, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (files / name).read_bytes()
    assert network.code == code
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8.onnx", "8.pt2"])
def test_files_hold_no_local_path(name: str, files: Path) -> None:
    content = (files / name).read_bytes()
    for trace in (str(Path(__file__).parents[2]), str(Path.home()), sys.prefix, "stack_trace", ".py"):
        assert trace.encode() not in content


def test_logits_that_are_not_quantized_are_refused() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.erfinv.default, (graph.placeholder("images"),)),))
    with pytest.raises(ExportError, match=r"ends in 'aten\.erfinv\.default'"):
        output_step(fx.GraphModule(nn.Module(), graph))

"""What cannot be exported is told before anything is learnt; what stays float is named then, and in the record."""

import json
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, Plain

import zsq
from zsq.errors import ExportError, InputError
from zsq.methods.noise_and_real import Noise
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ, QAT
from zsq.quantization.coverage import Coverage
from zsq.runs import rehearsal, start
from zsq.runs.record import Record
from zsq.runs.rehearsal import rehearse
from zsq.runs.summary import summary_rows
from zsq.training.loop import Run


class Recurrent(Plain):
    """A quarter of its values belong to a GRU, which no runtime has in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.conv(x)))))
        return self.head(self.gru(x.flatten(2).transpose(1, 2))[0][:, -1])


class Unwritable(Plain):
    """Pools to a size that ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(self.second(F.relu(self.norm(self.conv(x)))), 3)
        return self.head(x.mean((2, 3)))


SETTINGS = {"quantizer.num_samples": 32}


def test_a_network_without_a_file_is_refused_before_the_fit(tmp_path, monkeypatch) -> None:
    def fit(*_: object, **__: object) -> None:
        raise AssertionError("something was fitted")

    monkeypatch.setattr(Noise, "fit", fit)
    with pytest.raises(ExportError, match=r"cannot write 'adaptive_max_pool2d', aten\.adaptive_max_pool2d"):
        zsq.quantize(Unwritable().eval(), SPEC, method="noise", settings=SETTINGS, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_can_be_quantized_nowhere_is_refused_before_the_fit(tmp_path) -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * 2

    with pytest.raises(InputError, match="no convolution or linear layer whose weight could be quantized"):
        zsq.quantize(Bare(), SPEC, method="noise", settings=SETTINGS, out=tmp_path / "run", quiet=True)


def test_a_fault_of_a_library_is_one_line(monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such operator")

    monkeypatch.setattr(rehearsal, "write_file", broken)
    teacher = teacher_from_module(Plain(), SPEC, name="mine")
    with pytest.raises(ExportError, match=r"^network 'mine' cannot be quantized and exported: KeyError: 'no such op"):
        rehearse(teacher, PTQ(), Run())


@pytest.mark.parametrize("quantizer", [PTQ(bits="4"), QAT(bits="4", steps=3), PTQ(activation_scope="layers")])
def test_a_rehearsal_counts_what_is_quantized(quantizer: PTQ) -> None:
    teacher = teacher_from_module(Plain(), SPEC)
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    found = rehearse(teacher, quantizer, Run())
    assert found.quantized_weights == 6 * 27 + 6 + 8 * 54 + 8 + 5 * 8 + 5
    assert found.float_weights == {}
    assert found.warning() is None or quantizer.activation_scope == "layers"
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())


def test_shares_and_warning_by_hand() -> None:
    found = Coverage(
        quantized_weights=970,
        float_weights={"a": 20, "b": 10},
        quantized_operations=3,
        float_operations={"gelu": 0.6, "lstm in rnn": 0.3},
    )
    assert found.float_weight_share == 3.0
    assert found.float_operation_share == pytest.approx(0.9)
    assert found.warning() == "not quantized, but kept in float: 3.0 % of the weights (a, b)."
    many = {f"w{index}": 10 + index for index in range(7)}
    named = Coverage(quantized_weights=0, float_weights=many, quantized_operations=0, float_operations={"gru": 2.0})
    assert named.warning() == (
        "not quantized, but kept in float: 100.0 % of the weights (w6, w5, w4, w3, w2 and 2 more) and 2.0 % of the "
        "arithmetic (gru)."
    )
    nothing = Coverage(quantized_weights=999, float_weights={"a": 1}, quantized_operations=1)
    assert nothing.warning() is None


@pytest.mark.slow
def test_what_stays_float_is_named_before_the_run_in_the_record_and_in_the_summary(tmp_path, caplog) -> None:
    torch.manual_seed(0)
    net = Recurrent().eval()
    with caplog.at_level(logging.WARNING, logger="zsq"):
        result = zsq.quantize(net, SPEC, method="noise", settings=SETTINGS, out=tmp_path / "run", quiet=True)
    warned = [record.getMessage() for record in caplog.records]
    assert any("of the weights (gru.weight_ih_l0, " in text and "arithmetic (gru in gru)" in text for text in warned)
    covered = json.loads((tmp_path / "run" / "result.json").read_text())["coverage"]
    assert covered["float_weights"] == {
        "gru.weight_ih_l0": 96,
        "gru.weight_hh_l0": 48,
        "gru.bias_ih_l0": 12,
        "gru.bias_hh_l0": 12,
    }
    assert covered["float_weight_share"] == pytest.approx(100 * 168 / (168 + covered["quantized_weights"]), abs=1e-3)
    assert Record.read(tmp_path / "run").coverage == result.record.coverage
    row = dict(summary_rows(result.record))["in integers"]
    assert "float weights: gru.weight_ih_l0" in row
    assert "gru in gru" in row


def test_a_folder_that_is_taken_is_refused_before_the_rehearsal(tmp_path, monkeypatch) -> None:
    (tmp_path / "model.onnx").touch()

    def never(*_: object) -> None:
        raise AssertionError("rehearsed")

    monkeypatch.setattr(start, "rehearse", never)
    with pytest.raises(InputError, match="holds another run"):
        zsq.quantize("digits", method="noise", out=tmp_path, quiet=True)

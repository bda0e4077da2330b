import argparse
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zsq.errors import TeacherError
from zsq.models.weights import load_weights
from zsq.types import ImageSpec

SPEC = ImageSpec(channels=2, height=6, width=6, classes=4, mean=(0.5, 0.5), std=(0.25, 0.25))


def load(path: Path, **said: int) -> nn.Module:
    """Load a file into a new network whose error texts the tests quote."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    load_weights(net, path, SPEC, said)
    return net


@pytest.fixture
def trained() -> dict[str, Tensor]:
    """Weights that fit the network, without batch norm's counter."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (3, 2, 3, 3), "0.bias": (3,), "4.weight": (4, 48), "4.bias": (4,)}
    shapes |= {f"1.{name}": (3,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model", "net"])
def test_checkpoints(trained, tmp_path, prefix, nest) -> None:
    state = {prefix + name: value for name, value in trained.items()}
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "w.pth")
    save_file(trained, tmp_path / "w.safetensors")
    loaded = load(tmp_path / "w.pth")
    plain = load(tmp_path / "w.safetensors").state_dict()
    for name, value in trained.items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(plain[name], value)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_checkpoint_that_would_execute_code(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(TeacherError, match=r"^evil\.pth would execute code when loaded \(it holds .*as safetensors"):
        load(tmp_path / "evil.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(TeacherError, match=r"would execute code when loaded \(it holds torch\.nn\.modules\.linear"):
        load(tmp_path / "module.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malicious(), protocol=4))
    with pytest.raises(TeacherError, match=r"would execute code when loaded \(it needs Python's own unpickler\)"):
        load(tmp_path / "evil.pkl")
    assert not (tmp_path / "executed").exists()


def test_training_options_beside_the_weights(trained, tmp_path) -> None:
    torch.save({"state_dict": trained, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth")
    assert torch.equal(loaded.get_parameter("4.weight"), trained["4.weight"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a PyTorch checkpoint: it is neither"),
        (b"plain text", "is not a PyTorch checkpoint: it is neither a whole zip file nor a pickle."),
        (b"PK\3\4 cut short", "it is neither a whole zip file"),
        ([1, 2], "w.pth holds a list; a state dict is wanted, at the top or under state_dict, model_state_dict"),
        ({}, "w.pth holds nothing; a state dict is wanted"),
        ({"epoch": 3, "loss": 0.5}, "w.pth holds the keys epoch, loss; a state dict is wanted"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, text) -> None:
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(TeacherError) as caught:
        load(path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_weights(tmp_path) -> None:
    with pytest.raises(TeacherError, match=r"^no such weights file: .*nothing\.pth$"):
        load(tmp_path / "nothing.pth")
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(TeacherError, match=r"^w\.safetensors is not a readable safetensors file"):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "said", "text"),
    [
        (
            {"4.weight": torch.zeros(9, 48), "4.bias": torch.zeros(9)},
            {"classes": 4},
            "w.pth holds 9 classes (4.weight is 9x48); classes says 4.",
        ),
        (
            {"4.weight": torch.zeros(9, 48), "4.bias": torch.zeros(9)},
            {},
            "w.pth holds 9 classes (4.weight is 9x48); the network has 4.",
        ),
        (
            {"0.weight": torch.zeros(3, 1, 3, 3)},
            {"channels": 2},
            "w.pth takes 1 channels (0.weight is 3x1x3x3); input says 2.",
        ),
        (
            {"0.weight": torch.zeros(3, 1, 3, 3)},
            {},
            "w.pth takes 1 channels (0.weight is 3x1x3x3); the network takes 2.",
        ),
        (
            {"1.bias": torch.zeros(5), "0.bias": torch.zeros(5)},
            {},
            "w.pth does not fit, in 2 shapes: 0.bias is 5 there and 3 in the network, 1.bias is 5 there and",
        ),
        (
            {"9.weight": torch.zeros(2, 3), "9.bias": torch.zeros(())},
            {},
            "another network; 2 unexpected: 9.weight (2x3), 9.bias (a single number).",
        ),
        ({"0.weight": None}, {}, "w.pth holds the weights of another network; 1 missing: 0.weight (3x2x3x3)."),
    ],
)
def test_weights_of_another_network(trained, tmp_path, change, said, text) -> None:
    state = {name: value for name, value in (trained | change).items() if value is not None}
    path = tmp_path / "w.pth"
    torch.save(state, path)
    with pytest.raises(TeacherError) as caught:
        load(path, **said)
    assert text in str(caught.value)


def test_averaged_weights_beside_the_raw_ones_are_told_and_can_be_chosen(trained, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "zsq")
    averaged = {name: value + 1 for name, value in trained.items()}
    torch.save({"state_dict": trained, "state_dict_ema": averaged}, tmp_path / "w.pth")
    assert torch.equal(load(tmp_path / "w.pth").state_dict()["4.bias"], trained["4.bias"])
    assert "w.pth holds state_dict and state_dict_ema; the weights are those of state_dict" in caplog.text
    assert torch.equal(load(tmp_path / "w.pth:state_dict_ema").state_dict()["4.bias"], averaged["4.bias"])
    with pytest.raises(TeacherError, match=r"w\.pth has no entry 'ema'; it has state_dict, state_dict_ema"):
        load(tmp_path / "w.pth:ema")
    torch.save({"ema": averaged}, tmp_path / "only.pth")
    assert torch.equal(load(tmp_path / "only.pth").state_dict()["4.bias"], averaged["4.bias"])

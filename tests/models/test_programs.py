"""A saved torch.export program is a network; what cannot be one is told why, and what would work."""

import pytest
import torch
from torch import Tensor, nn
from toys import SPEC, Plain

import zsq
from zsq.errors import TeacherError
from zsq.graph.batchnorm import batch_norms
from zsq.models.teacher import load_teacher, teacher_from_module

BATCH = {0: torch.export.Dim("batch")}


def images() -> Tensor:
    return torch.randn(2, *SPEC.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_computes_what_its_network_does(tmp_path, decomposed) -> None:
    net = Plain().eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=(BATCH,))
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "net.pt2")
    teacher = load_teacher(str(tmp_path / "net.pt2"), classes=5, mean=SPEC.mean, std=SPEC.std)
    own = teacher_from_module(net, SPEC)
    assert teacher.spec == own.spec
    assert teacher.weights_sha256 == own.weights_sha256
    assert len(batch_norms(teacher.network)) == len(batch_norms(own.network)) == 1
    torch.testing.assert_close(teacher.network(images()), net(images()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_folder_of_a_run_knows_its_program(tmp_path, monkeypatch) -> None:
    program = torch.export.export(Plain().eval(), (images(),), dynamic_shapes=(BATCH,))
    torch.export.save(program, tmp_path / "net.pt2")
    monkeypatch.chdir(tmp_path)
    few = {"quantizer.num_samples": 16}
    network = zsq.Network(model="net.pt2", classes=5, mean=SPEC.mean, std=SPEC.std)
    first = zsq.quantize(network, method="noise", settings=few, out="run", quiet=True)
    monkeypatch.chdir("run")
    again = zsq.quantize(recipe="settings.toml", out="../again", quiet=True)
    assert again.record.artifacts == first.record.artifacts
    (tmp_path / "net.pt2").unlink()
    with pytest.raises(zsq.InputError, match=r"is of network .*net\.pt2, and .*net\.pt2 is gone"):
        zsq.quantize(recipe="settings.toml", out="../third", quiet=True)


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.mean((2, 3)) + mask


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_programs_that_cannot_serve(tmp_path) -> None:
    torch.export.save(torch.export.export(Plain().eval(), (images(),)), tmp_path / "fixed.pt2")
    with pytest.raises(TeacherError, match=r"fixed\.pt2 takes batches of 2 only; .* torch\.export\.Dim\('batch'\)"):
        load_teacher(str(tmp_path / "fixed.pt2"), classes=5)
    torch.export.save(torch.export.export(Two(), (images(), torch.zeros(1))), tmp_path / "two.pt2")
    with pytest.raises(TeacherError, match=r"two\.pt2 takes 2 inputs \(x, mask\)"):
        load_teacher(str(tmp_path / "two.pt2"), classes=5)
    (tmp_path / "broken.pt2").write_bytes(b"no program")
    with pytest.raises(TeacherError, match=r"broken\.pt2 is not a torch\.export program"):
        load_teacher(str(tmp_path / "broken.pt2"), classes=5)
    with pytest.raises(TeacherError, match="no such file"):
        load_teacher(str(tmp_path / "none.pt2"), classes=5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("net.onnx", "'net.onnx' is not a network: an ONNX file has its batch norms folded"),
        ("net.ts", "TorchScript is not a form that can be exported"),
        ("net.safetensors", "it holds weights, and no program"),
    ],
)
def test_files_of_other_kinds(name, text) -> None:
    with pytest.raises(TeacherError, match=f"{text}.*give FILE.py:FACTORY"):
        load_teacher(name)


def test_a_network_of_several_inputs() -> None:
    with pytest.raises(TeacherError, match=r"takes 2 inputs \(x, mask\); .* Give the others a default"):
        teacher_from_module(Two(), SPEC, name="mine")

"""ExecuTorch files: what XNNPACK computes of them, what is said where it cannot, pixels, batches, threads."""

import sys

import pytest
import torch
from torch import nn
from toys import SPEC, Branchy, ClampedGate, Plain, SharedLayer, Shift, graph, images, quantized

from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.export import executorch
from zsq.export.content_hash import canonical_sha256
from zsq.export.converted import output_step
from zsq.export.executorch import ExecuTorchClassifier, write_executorch
from zsq.export.files import open_file
from zsq.export.options import FileOptions
from zsq.export.verify import require, verify_file
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.runs.rehearsal import rehearse
from zsq.targets import TARGETS
from zsq.training.loop import Run


def need(name):
    """Skip where the package is not installed in which the target's files are run."""
    pytest.importorskip(TARGETS[name].runs_in, reason=f"target {name} runs its file in {TARGETS[name].title}")


@pytest.mark.slow
def test_executorch_says_what_is_missing_or_too_old(tmp_path, monkeypatch):
    def without(name):
        raise executorch.metadata.PackageNotFoundError(name)

    (tmp_path / "model.pte").write_bytes(b"")
    monkeypatch.setattr(executorch.metadata, "version", without)
    with pytest.raises(MissingExtraError, match=r"not installed: pip install 'zsq\[executorch\]'"):
        open_file(tmp_path / "model.pte")
    monkeypatch.setattr(executorch.metadata, "version", lambda name: "1.0.1")
    with pytest.raises(
        MissingExtraError, match=r"needs ExecuTorch 1\.5 or newer, and 1\.0\.1 is installed: pip install"
    ):
        open_file(tmp_path / "model.pte")
    monkeypatch.setattr(executorch.metadata, "version", lambda name: "1.5.1")
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(MissingExtraError, match=r"ExecuTorch 1\.5\.1 does not load: "):
        open_file(tmp_path / "model.pte")


@pytest.mark.slow
def test_executorch_says_what_it_cannot_read(tmp_path):
    need("executorch")
    path = tmp_path / "model.pte"
    with pytest.raises(InputError, match="no such file"):
        open_file(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="ExecuTorch cannot load it: "):
        open_file(path)
    lowered = write_executorch(convert(quantized(graph(Plain), PTQ(target="executorch"))), SPEC, path)
    assert (lowered.num_lowered, lowered.left, lowered.percent) == (lowered.num_nodes, (), 100)
    with pytest.raises(InputError, match=r"images are \[1, 3, 9, 9\]; the file takes \[1, 3, 8, 8\]"):
        open_file(path)(torch.zeros(1, 3, 9, 9))


@pytest.mark.slow
def test_a_file_for_executorch_carries_its_notes_and_repeats_bit_for_bit(tmp_path):
    need("executorch")
    converted = convert(quantized(graph(Branchy), PTQ(target="executorch")))
    paths = [tmp_path / f"{name}.pte" for name in ("one", "two", "other")]
    for path, bits in zip(paths, ("8", "8", "W8A8"), strict=True):
        lowered = write_executorch(converted, SPEC, path, notes={"target": "executorch", "bits": bits})
    assert lowered.left == ("slice_copy",)
    assert lowered.num_lowered == lowered.num_nodes - 2
    file = open_file(paths[0])
    assert file.spec == SPEC
    assert (file._notes["target"], file._notes["bits"]) == ("executorch", "8")
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    assert len({canonical_sha256(path) for path in paths}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_executorch_takes_pixels(layout, tmp_path):
    need("executorch")
    student = quantized(graph(Plain), PTQ(target="executorch"))
    write_executorch(convert(student), SPEC, tmp_path / "model.pte", options=FileOptions(pixels=layout))
    file = open_file(tmp_path / "model.pte")
    x = file.seen(images(50, seed=5))
    assert (file(x).argmax(1) == student(x).argmax(1)).float().mean() > 0.95


@pytest.mark.slow
def test_threads_of_executorch_may_change_between_files(tmp_path):
    need("executorch")
    student, x = quantized(graph(Plain), PTQ(target="executorch")), images(4, seed=5)
    write_executorch(convert(student), SPEC, tmp_path / "model.pte")
    files = [ExecuTorchClassifier(tmp_path / "model.pte", threads=threads) for threads in (1, 2, None)]
    expected = files[0](x)
    assert all(torch.equal(file(x), expected) for file in (*files, *files))


class Bounded(Plain):
    """A layer whose channels are clipped, each at limits of its own, before it is rounded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.full((6, 1, 1), -0.2))
        self.register_buffer("high", torch.linspace(0.5, 3, 6).view(6, 1, 1))

    def forward(self, x):
        x = torch.clamp(self.norm(self.conv(x)), self.low, self.high)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Joined(nn.Module):
    """Seven layers of ranges of their own, concatenated."""

    def __init__(self):
        super().__init__()
        self.parts, self.head = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(7)), nn.Linear(28, 5)

    def forward(self, x):
        return self.head(torch.cat([torch.relu(part(x)) for part in self.parts], 1).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Bounded, Joined, ClampedGate, SharedLayer, Shift])
def test_what_xnnpack_cannot_take_in_integers_is_computed_as_simulated(make, tmp_path):
    need("executorch")
    student, path, x = quantized(graph(make), PTQ(target="executorch")), tmp_path / "model.pte", images(200, seed=5)
    converted = convert(student)
    write_executorch(converted, SPEC, path)
    found = verify_file(path, student, x.split(100), output_step(converted), threads=1, target=TARGETS["executorch"])
    require(found)
    assert found.agreement_target == 100
    assert found.max_logit_difference_steps <= 1.01


class Unknown(nn.Module):
    """A layer behind an operator that ExecuTorch has no kernel for."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        return self.head(torch.special.i0e(x).flatten(1))


@pytest.mark.slow
def test_an_operator_that_executorch_lacks_is_refused_before_the_fit():
    need("executorch")
    with pytest.raises((ExportError, InputError), match=r"ExecuTorch cannot .*\.$") as caught:
        rehearse(teacher_from_module(Unknown().eval(), SPEC), PTQ(target="executorch"), Run())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_file_of_a_fixed_batch_takes_any_number(tmp_path):
    need("executorch")
    student, x = quantized(graph(Plain), PTQ(target="executorch")), images(7, seed=5)
    write_executorch(convert(student), SPEC, tmp_path / "one.pte")
    write_executorch(convert(student), SPEC, tmp_path / "three.pte", FileOptions(batch=3))
    assert torch.equal(open_file(tmp_path / "one.pte")(x), open_file(tmp_path / "three.pte")(x))

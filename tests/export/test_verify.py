from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from converted import converted_network, simulate
from torch import Tensor

from zsq.errors import ExportError, InputError
from zsq.export.content_hash import canonical_sha256
from zsq.export.converted import output_step
from zsq.export.verify import OnnxClassifier, Verification, exceeds, require, verify_onnx


@pytest.mark.slow
def test_a_tampered_file_is_refused(files: Path, images: Tensor, tmp_path: Path) -> None:
    network = converted_network()
    model = onnx.load(files / "8.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "second_weight.scale")
    scale.raw_data = (4 * onnx.numpy_helper.to_array(scale)).tobytes()
    onnx.save(model, tmp_path / "tampered.onnx")
    verification = verify_onnx(tmp_path / "tampered.onnx", simulate(network), [images], output_step(network), threads=1)
    with pytest.raises(ExportError, match=r"disagrees .* where 99 % is required"):
        require(verification)
    assert canonical_sha256(tmp_path / "tampered.onnx") != canonical_sha256(files / "8.onnx")


@pytest.mark.slow
def test_verification_counts_and_figures(files: Path, images: Tensor) -> None:
    network, run = converted_network(), OnnxClassifier(files / "8.onnx", threads=1)
    step = output_step(network)
    shifted = verify_onnx(files / "8.onnx", lambda batch: run(batch) + 3 * step, [images], step, threads=1)
    assert shifted.decided_agreement == shifted.agreement_optimized == 100
    assert shifted.max_logit_difference_steps == pytest.approx(3, abs=2)
    rolled = verify_onnx(files / "8.onnx", lambda batch: run(batch).roll(1, dims=1), [images], step, threads=1)
    assert rolled.decided_agreement == 0
    margins = torch.arange(200)[:, None] * torch.tensor([1.0, 0, 0, 0, 0])  # 0, 1, 2, ... steps: decided from 3 up
    assert verify_onnx(files / "8.onnx", lambda _: step * margins, [images], step, threads=1).num_decided == 197
    wide = verify_onnx(files / "8.onnx", lambda _: step * margins, [images], step, threads=1, margin_steps=99.5)
    assert wide.num_decided == 100
    undecided = verify_onnx(files / "8.onnx", lambda batch: 0 * run(batch), [images], step, threads=1)
    assert (undecided.num_decided, undecided.decided_agreement) == (0, 0)
    with pytest.raises(ExportError, match="on none of 200 images"):
        require(undecided)
    with pytest.raises(InputError, match="at least one image"):
        verify_onnx(files / "8.onnx", run, [], step)


def test_require_accepts_the_minimum_itself() -> None:
    at_minimum = Verification(100, 100, 99.0, 90.0, 90.0, 3.0)
    require(at_minimum)
    with pytest.raises(ExportError, match=r"99.00 % of 100 decided images, where 99.5 %"):
        require(at_minimum, minimum=99.5)


def test_a_file_that_disagrees_with_itself_need_not_agree_more_with_the_simulation() -> None:
    found = Verification(1000, 1000, 98.4, 95.0, 95.0, 9.0, decided_self_agreement=98.0)
    shared = replace(found, only_from_simulation=6, only_from_itself=10)
    require(shared)
    require(replace(shared, decided_self_agreement=98.6, only_from_itself=4))  # two images more are chance
    with pytest.raises(ExportError, match=r"98.40 % of 1000 .* where 99 % is required; .* itself on 99.00"):
        require(replace(found, decided_self_agreement=99.0, only_from_simulation=6, only_from_itself=0))
    with pytest.raises(ExportError, match=r"94.90 % of 1000 decided images, where 99 % is required"):
        require(replace(shared, decided_agreement=94.9))  # chaos is no excuse
    with pytest.raises(ExportError, match=r"98.90 % of 1000 .* itself on 100.00"):
        require(replace(found, decided_agreement=98.9, decided_self_agreement=100.0))  # it has none
    with pytest.raises(ExportError, match=r"literally and optimised, .* on 94.00 % of 1000 decided images, where 95 %"):
        require(replace(found, decided_agreement=100.0, decided_self_agreement=94.0))  # users run it optimised


@pytest.mark.parametrize(
    ("count", "other", "expected"),
    [(4, 0, False), (5, 0, True), (6, 1, False), (7, 1, True), (3, 3, False), (5000, 5000, False), (5200, 5000, True)],
)
def test_exceeds_is_the_sign_test(count: int, other: int, expected: bool) -> None:
    assert exceeds(count, other) == expected  # 1/16, 1/32, 8/128, 9/256; 2 deviations of 50 from 5,100


@pytest.mark.slow
def test_verification_counts_differences_that_are_not_shared(
    files: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 100 * torch.eye(5)[torch.zeros(200, dtype=torch.int64)]
    other = logits.roll(1, dims=1)
    literal, optimized = logits.clone(), logits.clone()
    literal[:7], optimized[:3] = other[:7], other[:3]  # 4 times alone, 3 times together
    literal[7:10] = other[7:10]
    optimized[10:15] = other[10:15]

    class Runner:
        def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
            self.logits = optimized if optimize else literal

        def __call__(self, batch: Tensor) -> Tensor:
            return self.logits

    monkeypatch.setattr("zsq.export.verify.OnnxClassifier", Runner)
    found = verify_onnx(files / "8.onnx", lambda batch: logits, [images], 1.0)
    assert (found.decided_agreement, found.decided_self_agreement) == (95.0, 94.0)
    assert (found.only_from_simulation, found.only_from_itself) == (3, 5)


@pytest.mark.slow
def test_files_and_images_that_do_not_fit_are_named(files: Path, tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(InputError, match="no such file"):
        OnnxClassifier(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        OnnxClassifier(tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"images are \[200, 3, 8\]"):
        OnnxClassifier(files / "8.onnx")(images[..., 0])

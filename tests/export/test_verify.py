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
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.export.verify import Verification, at_least, require, verify_file


@pytest.mark.slow
def test_a_tampered_file_is_refused(files: Path, images: Tensor, tmp_path: Path) -> None:
    network = converted_network()
    model = onnx.load(files / "8.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "second_weight.scale")
    scale.raw_data = (4 * onnx.numpy_helper.to_array(scale)).tobytes()
    onnx.save(model, tmp_path / "tampered.onnx")
    verification = verify_file(tmp_path / "tampered.onnx", simulate(network), [images], output_step(network), threads=1)
    with pytest.raises(ExportError, match=r"is \d+\.\d quantization steps from the simulation"):
        require(verification)
    assert canonical_sha256(tmp_path / "tampered.onnx") != canonical_sha256(files / "8.onnx")


@pytest.mark.slow
def test_verification_counts_and_figures(files: Path, images: Tensor) -> None:
    network, run = converted_network(), OnnxClassifier(files / "8.onnx", threads=1)
    step = output_step(network)
    shifted = verify_file(files / "8.onnx", lambda batch: run(batch) + 3 * step, [images], step, threads=1)
    assert shifted.decided_agreement == shifted.agreement_optimized == 100
    assert shifted.max_logit_difference_steps == pytest.approx(3, abs=2)
    rolled = verify_file(files / "8.onnx", lambda batch: run(batch).roll(1, dims=1), [images], step, threads=1)
    assert rolled.decided_agreement == 0
    margins = torch.arange(200)[:, None] * torch.tensor([1.0, 0, 0, 0, 0])  # 0, 1, 2, ... steps: decided from 3 up
    assert verify_file(files / "8.onnx", lambda _: step * margins, [images], step, threads=1).num_decided == 197
    wide = verify_file(files / "8.onnx", lambda _: step * margins, [images], step, threads=1, margin_steps=99.5)
    assert wide.num_decided == 100
    undecided = verify_file(files / "8.onnx", lambda batch: 0 * run(batch), [images], step, threads=1)
    assert (undecided.num_decided, undecided.decided_agreement) == (0, 0)
    with pytest.raises(ExportError, match="on none of 200 images"):
        require(undecided)
    with pytest.raises(InputError, match="at least one image"):
        verify_file(files / "8.onnx", run, [], step)


def found(agreement: float = 100.0, **changes: float) -> Verification:
    """Return what 1,000 decided images gave, as many of which agree in both ways."""
    plain = Verification(1000, 1000, agreement, 95.0, 95.0, 9.0, decided_agreement_optimized=agreement)
    return replace(plain, **changes)


def test_as_many_disagreements_as_chance_allows_are_accepted() -> None:
    require(found(99.0))
    require(found(98.4))  # 16 where 10 are expected: 1 in 20
    for changes in ({"decided_agreement": 98.0}, {"decided_agreement_optimized": 98.0}):
        with pytest.raises(ExportError, match=r"98.00 % of 1000 decided images, where 99 % is required"):
            require(found(**changes))
    with pytest.raises(ExportError, match=r"98.50 % of 1000 decided images, where 99.5 %"):
        require(found(98.5), minimum=99.5)
    near = {"noise_steps": 3.0, "distance_literal_steps": 5.9, "distance_optimized_steps": 5.9}
    require(found(98.4, **near))
    for far in ({"distance_literal_steps": 6.1}, {"distance_optimized_steps": 6.1}, {"noise_steps": 0.0}):
        with pytest.raises(ExportError, match=r"98.40 % of 1000 .* logits differ by [56]\.\d quantization steps"):
            require(found(98.4, **near | far))  # chance, but of another file
    require(found(99.0, distance_literal_steps=4.0))
    require(found(99.0, noise_steps=8.0, distance_literal_steps=48.0))
    with pytest.raises(ExportError, match=r"is 4.1 quantization steps from the simulation, .* by 0.0"):
        require(found(100.0, distance_literal_steps=4.1))  # one class is far ahead, whatever the file computes


@pytest.mark.parametrize("way", ["literal", "optimized"])
def test_where_no_image_is_decided_a_file_may_be_as_far_as_the_noise(way: str) -> None:
    unstable = found(0.0, num_decided=0, noise_steps=10.0, distance_literal_steps=9.0, distance_optimized_steps=12.0)
    require(unstable)
    with pytest.raises(ExportError, match=r"is 21.0 quantization steps from the simulation, .* by 10.0"):
        require(replace(unstable, **{f"distance_{way}_steps": 21.0}))
    with pytest.raises(ExportError, match="on none of 1000 images"):
        require(replace(unstable, noise_steps=0.0))


@pytest.mark.parametrize(
    ("count", "trials", "rate", "expected"),
    [(0, 5, 0.3, 1.0), (1, 5, 0.3, 1 - 0.7**5), (5, 5, 0.3, 0.3**5), (1, 5, 0.0, 0.0), (0, 5, 0.0, 1.0)],
)
def test_the_binomial_tail(count: int, trials: int, rate: float, expected: float) -> None:
    assert at_least(count, trials, rate) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_binomial_tail_of_many_trials() -> None:
    assert at_least(5000, 10_000, 0.5) == pytest.approx(0.504, abs=1e-3)  # half, and half of the middle's 0.008


class Order:
    """Logits that depend on the memory order of the images, as sums of a deep network do."""

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, batch: Tensor) -> Tensor:
        logits = torch.stack([torch.arange(len(batch)) + 0.5, *[torch.zeros(len(batch))] * 4], dim=1)
        other = batch.is_contiguous(memory_format=torch.channels_last)
        return logits + self.size * torch.tensor([-1.0, 1, 1, 1, 1]) * other


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both ways of running a file give what the simulation gives of images in the usual order."""

    class Runner:
        def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
            pass

        def seen(self, batch: Tensor) -> Tensor:
            return batch

        def __call__(self, batch: Tensor) -> Tensor:
            return Order(0.0)(batch)

    monkeypatch.setattr("zsq.export.verify.OnnxClassifier", Runner)
    monkeypatch.setattr("zsq.export.verify.saturating_layers", lambda path: ())


def test_images_within_the_noise_are_not_decided(runner, images: Tensor) -> None:
    still = verify_file(Path("a.onnx"), Order(0.0), [images], 1.0)
    assert (still.margin_steps, still.noise_steps, still.instability) == (2.0, 0.0, 0.0)
    assert still.num_decided == 198  # 0.5, 1.5 are not
    noisy = verify_file(Path("a.onnx"), Order(2.0), [images], 1.0)
    assert noisy.noise_steps == pytest.approx(2.0)
    assert noisy.margin_steps == pytest.approx(12.0)
    assert noisy.num_decided == 200 - 12
    assert noisy.instability == 100 * 4 / 200  # those that differ by less than 4
    assert noisy.distance_literal_steps == noisy.distance_optimized_steps == 0


class Moved(Order):
    """Logits that lie elsewhere, whatever the order."""

    def __call__(self, batch: Tensor) -> Tensor:
        return Order(0.0)(batch) + self.size * torch.tensor([-1.0, 1, 1, 1, 1])


def test_where_the_order_explains_nothing_the_roundings_are_asked(runner, images: Tensor) -> None:
    asked = []

    def shaken(batch: Tensor) -> Tensor:
        asked.append(len(batch))
        return Moved(3.0)(batch)

    still = verify_file(Path("a.onnx"), Order(0.0), [images], 1.0, shaken=shaken)
    assert (asked, still.noise_steps) == ([], 0.0)
    with pytest.raises(ExportError, match=r"5\.0 quantization steps .* by 0\.0"):
        require(verify_file(Path("a.onnx"), Moved(5.0), [images], 1.0))
    explained = verify_file(Path("a.onnx"), Moved(5.0), [images], 1.0, shaken=shaken)
    assert asked == [len(images)]
    assert explained.noise_steps == pytest.approx(2.0)
    require(explained)
    with pytest.raises(ExportError, match=r"16\.0 quantization steps .* by 2\.0"):
        require(verify_file(Path("a.onnx"), Moved(16.0), [images], 1.0, shaken=Moved(14.0)))


def test_the_check_ends_when_enough_images_agree(runner, images: Tensor) -> None:
    found = verify_file(Path("a.onnx"), Order(0.0), images.split(20), 1.0, enough=50)
    assert (found.num_images, found.num_decided) == (60, 54)  # two of each batch of 20 are not
    wrong = verify_file(Path("a.onnx"), lambda batch: Order(0.0)(batch).roll(1, 1), images.split(20), 1.0, enough=50)
    assert wrong.num_images == 200
    assert (wrong.decided_agreement, wrong.decided_agreement_optimized) == (0, 0)


@pytest.mark.slow
def test_files_and_images_that_do_not_fit_are_named(files: Path, tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(InputError, match="no such file"):
        OnnxClassifier(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        OnnxClassifier(tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"images are \[200, 3, 8\]"):
        OnnxClassifier(files / "8.onnx")(images[..., 0])

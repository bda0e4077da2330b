"""What only a GPU can show; every test skips without one."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zsq
from zsq.cli.main import main
from zsq.comparison.compare import compare
from zsq.graph.moments import moments, observed_norm
from zsq.methods import METHODS, ZSCGAN, Adversarial, DeepInversion
from zsq.methods.generator_training import GeneratorSource
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import QAT
from zsq.quantization.bias_centring import centred_bias
from zsq.quantization.fake_quantize import HALF_STEP, UNCLIPPED, Clip, _FakeQuantize, fake_quantize, quantize_bias
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import Distiller
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, constrain
from zsq.quantization.training_view import RoundedWeights
from zsq.runtime.cuda_graphs import WARM_UP, Replays
from zsq.runtime.gpu import full_float32, kernels
from zsq.training.loop import Run
from zsq.training.optim import flatten_optimizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
    pytest.mark.slow,
]

SMALL = {"steps": 12, "iterations": 6, "batch_size": 8, "width": 8, "data": "digits:train", "limit": 200}
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("digits").to(CUDA)


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in full float32, so that two ways of computing agree to its last digits."""
    with full_float32():
        yield


@pytest.mark.parametrize("quantizer", ["ptq", "qat"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_file_on_a_gpu(name: str, quantizer: str, tmp_path: Path) -> None:
    if quantizer not in METHODS[name].quantizers:
        pytest.skip(f"{name} has no {quantizer}")
    if name == "biggan":
        pytest.skip("needs a checkpoint")
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    settings = [f"method.{key}={value}" for key, value in SMALL.items() if key in fields]
    settings += ["quantizer.num_samples=100"] + (["quantizer.steps=8"] if quantizer == "qat" else [])
    result = zsq.quantize(
        load_teacher("digits"),
        method=name,
        quantizer=quantizer,
        data="digits",
        device="cuda",
        out=tmp_path / "run",
        settings=settings,
        quiet=True,
    )
    assert result.record.runtime_agreement > 99
    assert result.record.quantized_top1 > 60


def source_of(teacher: Teacher, method: object, *, replayed: bool) -> GeneratorSource:
    source = method.source(teacher, Run(device=CUDA), 10)
    source.replays.on = replayed
    return source


def same_weights(one: torch.nn.Module, other: torch.nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "method", [ZSCGAN(width=8), ZSCGAN(width=8, generator="unet"), Adversarial(width=8, generators=2)]
)
def test_replayed_steps_learn_what_called_ones_do(method: object, teacher: Teacher, exact: None) -> None:
    called, replayed = (source_of(teacher, method, replayed=on) for on in (False, True))
    for step in range(3 * WARM_UP + 4):
        one, other = called.step(step), replayed.step(step)
        counted = 100 / called.batch_size + 0.01  # percent of one image, which last digits can move to another class
        for name, value in one.items():
            tolerance = counted if name == "label_recognition" else 2e-2
            torch.testing.assert_close(value, other[name], rtol=2e-2, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")
    assert all(recorded.graph is not None for recorded in replayed.replays._steps.values())
    assert len(replayed.replays._steps) == replayed.turns
    same_weights(called.generator, replayed.generator, 2e-2)


def distiller_of(teacher: Teacher, method: object, scales: str, *, replayed: bool) -> Distiller:
    source = source_of(teacher, method, replayed=replayed)
    settings = QAT(num_samples=64, scales=scales, bits="8", steps=1000)
    student = quantize_ptq(
        teacher.network, lambda: source.sample(64), settings, Run(device=CUDA), learnable=scales == "learnable"
    )
    distiller = Distiller(student, teacher.network, source, settings, CUDA)
    distiller.replays.on = replayed
    return distiller


@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
@pytest.mark.parametrize("method", [ZSCGAN(width=8), Adversarial(width=8)])
def test_replayed_distillation_is_the_called_one(method: object, scales: str, teacher: Teacher, exact: None) -> None:
    called, replayed = (distiller_of(teacher, method, scales, replayed=on) for on in (False, True))
    for step in range(2 * WARM_UP):
        copy_state(called, replayed)
        before = weights_of(called.student)
        one, other = called.step(step), replayed.step(step)
        assert one.keys() == other.keys()
        torch.testing.assert_close(one["kd"], other["kd"], rtol=5e-2, atol=5e-2)
        changes = [weights_of(distiller.student) - before for distiller in (called, replayed)]
        # last digits decide some roundings: on the processor, up to 0.15; a step that changes nothing has 1
        assert (changes[0] - changes[1]).norm() < 0.5 * changes[0].norm()
    assert all(recorded.graph is not None for recorded in replayed.replays._steps.values())


def copy_state(source: Distiller, target: Distiller) -> None:
    """Give one distiller the other's values, in the tensors that it has."""
    pairs = [(source.student, target.student), (source.source.generator, target.source.generator)]
    optimizers = [(source.optimizer, target.optimizer), (source.source.optimizer, target.source.optimizer)]
    with torch.no_grad():
        for one, other in pairs:
            for value, place in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
                place.copy_(value)
        for one, other in optimizers:
            for kept, held in zip(flatten_optimizer(one).values(), flatten_optimizer(other).values(), strict=True):
                held.copy_(kept)


def weights_of(student: torch.nn.Module) -> Tensor:
    """Return what is trained, in units of each tensor's own size."""
    trained = [p.detach() for p in student.parameters() if p.requires_grad]
    return torch.cat([(p / p.norm().clamp(min=1e-6)).flatten() for p in trained]).clone()


@pytest.mark.parametrize("scales", ["learnable", "moving-average"])
def test_no_step_waits_for_the_gpu(scales: str, teacher: Teacher) -> None:
    distiller = distiller_of(teacher, ZSCGAN(width=8), scales, replayed=False)
    inversion = DeepInversion(batch_size=8, steps=20, iterations=20).source(teacher, Run(device=CUDA))
    inversion.replays.on = False
    for step in range(2):
        distiller.step(step)
        inversion.step(step)
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):  # so it would be seen
            torch.ones(1, device=CUDA).item()
        distiller.step(2)
        distiller.source.step(3)
        inversion.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_recorded_is_called() -> None:
    replays, seen = Replays(CUDA), []

    def work(x: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        seen.append(float(x.sum()))  # waits
        return (x + 1,), {"loss": x.sum()}

    for value in range(WARM_UP + 3):
        (made,), _ = replays.call("step", work, torch.full((2,), float(value), device=CUDA))
        assert made.tolist() == [value + 1.0] * 2
    assert seen[-1] == 2 * (WARM_UP + 2)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not replays._steps["step"].recordable


def test_outputs_of_replays_are_the_callers_own() -> None:
    replays = Replays(CUDA)
    made = [
        replays.call(
            "s",
            lambda x: ((x * 2, x.long(), x + 1), {"a": x.sum(), "b": x.max()}),
            torch.full((2,), float(v), device=CUDA),
        )
        for v in range(WARM_UP + 4)
    ]
    assert replays._steps["s"].graph is not None
    assert [doubled[0].item() for (doubled, _, _), _ in made] == [2.0 * v for v in range(WARM_UP + 4)]
    assert [losses["a"].item() for _, losses in made] == [2.0 * v for v in range(WARM_UP + 4)]


@pytest.mark.parametrize("shape", [(64, 7), (8, 16, 9, 11)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_in_one_pass_are_the_exact_ones(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 20
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    here = x.float().to(CUDA).requires_grad_()
    x.requires_grad_()
    for one, other in zip(moments(here), moments(x), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-5, atol=1e-5)
    for values in (here, x):
        mean, var = moments(values)
        (mean.sum() + var.square().sum()).backward()
    torch.testing.assert_close(here.grad.double().cpu(), x.grad, rtol=1e-3, atol=1e-4)


def test_a_constant_channel_has_no_variance() -> None:
    assert moments(torch.full((4, 2, 3, 3), 5.0, device=CUDA))[1].tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("clip", [UNCLIPPED, (0.0, math.inf), (-0.2, 0.7)])
@pytest.mark.parametrize("bits", [(-128, 127), (-8, 7)])
@pytest.mark.parametrize("layout", ["planes", "channels_last", "slices"])
def test_the_fused_rounding_is_the_one_of_the_file(layout: str, bits: tuple[int, int], clip: Clip) -> None:
    assert kernels(torch.ones(1, device=CUDA)) is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 10, 33, 17, generator=generator) * 2
    x[0, 0, 0, :4] = torch.tensor([0.065, -0.065, 1e9, -1e9])
    upstream = torch.randn(x.shape, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device, copy=True).requires_grad_()
        scale = torch.tensor([0.13 if bits[1] == 7 else 0.013], device=device, requires_grad=True)
        zero = torch.tensor([-3.4], device=device, requires_grad=True)
        values = leaf.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else leaf
        if layout == "slices":
            values = leaf[..., 1:]
        y = fake_quantize(values, scale, zero, *bits, 0.3, clip)
        y.backward(upstream[..., 1:].to(device) if layout == "slices" else upstream.to(device))
        found.append([t.detach().cpu() for t in (y, leaf.grad, scale.grad, zero.grad)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


SHAPES = [(12, 90, 3, 3), (12, 1, 3, 3), (12, 30, 3, 3), (7, 50), (8, 4, 5), (1, 3, 1, 1)]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_are_rounded_as_on_the_processor(
    layout: torch.memory_format, learnable: bool, per_channel: bool
) -> None:
    weights = [torch.randn(shape) for shape in SHAPES]
    weights = [w.contiguous(memory_format=layout) if w.dim() == 4 else w for w in weights]
    outputs = [torch.randn(len(w)) for w in weights[:-1]]  # the last one has no bias
    means = [torch.randn({1: 12, 30: 90, 4: 8}.get(w.shape[1], w.shape[1])) for w in weights[:-1]]
    found = []
    for device in ("cpu", "cuda"):
        leaves, centres = ([t.to(device, copy=True).requires_grad_() for t in some] for some in (weights, outputs))
        bits = [4, 8, 4, 6, 4, 4]
        quantizers = [
            WeightQuantizer(w, b, per_channel=per_channel, learnable=learnable).to(device).train()
            for w, b in zip(leaves, bits, strict=True)
        ]
        for quantizer in quantizers:
            quantizer.mode = "quantize"
            quantizer.scale.data *= 0.8
        inputs = [mean.to(device) for mean in means]
        if device == "cpu":
            rounded = [quantizer(w) for quantizer, w in zip(quantizers, leaves, strict=True)]
            biases = [centred_bias(*some) for some in zip(centres, rounded[:-1], inputs, strict=True)]
        else:
            fused = kernels(leaves[0])
            sizes = [*map(len, means), None]
            known = [
                fused.Layer(w.detach(), size, q.scale.numel(), q.quant_min, q.quant_max, q.factor)
                for w, q, size in zip(leaves, quantizers, sizes, strict=True)
            ]
            made = RoundedWeights(quantizers, fused, known)(leaves, centres, inputs)
            rounded, biases = made[: len(weights)], made[len(weights) :]
        upstream = torch.Generator().manual_seed(1)
        total = sum((y * torch.randn(y.shape, generator=upstream).to(device)).sum() for y in (*rounded, *biases))
        total.backward()
        kept = [q.scale for q in quantizers]
        grads = [t.grad for t in (*leaves, *centres, *(q.scale for q in quantizers)) if t.grad is not None]
        found.append([[t.detach().cpu() for t in some] for some in (rounded, kept, biases, grads)])
    for one, other in zip(*(some[0] + some[1] for some in found), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(some[2] + some[3] for some in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_biases_are_rounded_as_on_the_processor(shared: bool) -> None:
    bias, scale = torch.randn(700) * 1e3, torch.rand(1 if shared else 700) * 0.1
    scale[0] = scale[0] if shared else 0
    activation = torch.tensor([0.013])
    here = bias.to(CUDA).requires_grad_()
    rounded = quantize_bias(here, activation.to(CUDA), scale.to(CUDA))
    torch.testing.assert_close(rounded.cpu(), quantize_bias(bias, activation, scale), rtol=1e-7, atol=0)
    rounded.sum().backward()
    assert here.grad.eq(1).all()


def test_ends_see_what_is_not_a_number() -> None:
    fused = kernels(torch.ones(1, device=CUDA))
    x = torch.randn(5, 3, 40, 41, device=CUDA).contiguous(memory_format=torch.channels_last)
    lows, highs = fused.ends(x)
    assert [lows.min(), highs.max()] == [x.min(), x.max()]
    x[0, 0, 0, 0] = torch.nan
    assert all(ends.isnan().any() for ends in fused.ends(x))


@pytest.mark.parametrize("clip", [UNCLIPPED, (0.0, 6.0)])
@pytest.mark.parametrize("size", [50, 5_000_000])
@pytest.mark.parametrize("reach", [0.0, -3.0])
def test_ranges_follow_as_on_the_processor(reach: float, size: int, clip: Clip) -> None:
    found = []
    for device in ("cpu", "cuda"):
        quantizer = ActivationQuantizer(4, learnable=False, averaging=0.1).to(device).train()
        quantizer.mode, quantizer.reach = "quantize", reach
        quantizer.low_factor.fill_(0.9)
        for step in range(4):
            x = torch.randn(size, generator=torch.Generator().manual_seed(step)) + step - 1
            y = quantizer(x.to(device), clip)
        found.append(
            [t.detach().cpu() for t in (quantizer.low, quantizer.high, quantizer.scale, quantizer.zero_point, y[:50])]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 7), (8, 16, 9, 11), (4, 6, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_observed_norms_are_those_of_the_processor(
    shape: tuple[int, ...], layout: torch.memory_format, kind: torch.dtype
) -> None:
    x = (torch.randn(shape) * 3 + 2).to(kind)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    view = (1, shape[1], *[1] * (len(shape) - 2))
    scale, shift, upstream = torch.randn(view), torch.randn(view), torch.randn(shape).to(kind)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device, copy=True).requires_grad_()
        y, (mean, var) = observed_norm(leaf, scale.to(device), shift.to(device))
        ((y * upstream.to(device)).sum() + mean.sin().sum() + var.log().sum()).backward()
        found.append([t.detach().cpu().float() for t in (y, mean, var, leaf.grad)])
    tolerance = 1e-4 if kind == torch.float32 else 5e-2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_scales_stay_positive(teacher: Teacher) -> None:
    student = distiller_of(teacher, ZSCGAN(width=8), "learnable", replayed=False).student
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
                module.scale.fill_(-1)
                module.zero_point.fill_(300)
    constrain(student)
    for module in student.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            assert (module.scale > 0).all()
            assert (module.zero_point <= module.quant_max).all()


def test_not_a_number_is_not_rounded_away() -> None:
    one = torch.ones(1, device=CUDA)
    x = torch.tensor([torch.nan, 1.2], device=CUDA)
    for y in (fake_quantize(x, one, one, -8, 7), _FakeQuantize.apply(x, one, one, -8, 7, 1.0, UNCLIPPED)):
        assert y[0].isnan()
        assert y[1] == 1
    assert HALF_STEP > 0.5


def test_a_batch_that_does_not_fit_goes_through_in_halves(teacher: Teacher, said: list[str]) -> None:
    source = ZSCGAN(batch_size=65536, width=16).source(teacher, Run(device=CUDA), 0)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 3 * 2**30) / total))
    try:
        Run(device=CUDA).train("fit", source, WARM_UP + 5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert source.parts > 1
    assert "goes through in halves" in said[0]


class StoppedError(Exception):
    pass


class StopAt10:
    def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        if phase == "fit" and done >= 10:
            raise StoppedError


@pytest.mark.parametrize("quantizer", ["ptq", "qat"])
def test_a_stopped_run_continues_on_a_gpu(quantizer: str, tmp_path: Path) -> None:
    settings = ["method.steps=20", "method.batch_size=8", "method.width=8", "quantizer.num_samples=64"]
    settings += ["quantizer.steps=8"] if quantizer == "qat" else []

    def run(**arguments: object) -> zsq.Result:
        teacher = load_teacher("digits")
        return zsq.quantize(
            teacher,
            quantizer=quantizer,
            device="cuda",
            out=tmp_path / "run",
            checkpoint_every=5,
            settings=settings,
            **arguments,
        )

    with pytest.raises(StoppedError):
        run(observer=StopAt10())
    assert (tmp_path / "run" / "checkpoints" / "fit.safetensors").exists()
    assert run(resume=True, quiet=True).record.runtime_agreement > 99


def test_the_command_line_takes_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", "digits", "--device", "cuda", "--bits", "8", "--out", str(tmp_path / "run")]
    main([*arguments, "--set", "method.steps=10", "--set", "quantizer.num_samples=64", "--data", "digits"])
    assert (tmp_path / "run" / "model.onnx").exists()
    main(["doctor"])
    assert torch.cuda.get_device_name() in capsys.readouterr().out


def test_a_comparison_runs_on_a_gpu(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'title = "small"\nseeds = [0]\n[[teachers]]\nmodel = "digits"\ndata = "digits"\n'
        '[[methods]]\nname = "zscgan"\nsteps = 10\nbatch_size = 8\n[[methods]]\nname = "noise"\n'
        '[[quantizers]]\nname = "ptq"\nbits = ["8", "4"]\nnum_samples = 64\n'
        '[[quantizers]]\nname = "qat"\nbits = ["8"]\nsteps = 6\nnum_samples = 64\n'
    )
    compare(recipe, out=tmp_path / "out", device="cuda")
    assert "zscgan" in (tmp_path / "out" / "table.md").read_text()

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import Branchy, ConvHead, Plain, graph, images, quantized, stream_of

from zsq.errors import InputError
from zsq.graph.fold import fold
from zsq.quantization import PTQ
from zsq.quantization.bias_correction import first_images
from zsq.quantization.implied_statistics import implied_statistics, pixels_of
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import calibrate, quantize_ptq
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, quantizers
from zsq.training.loop import Run


def grids(student: Student) -> list[Tensor]:
    return [t.detach() for q in quantizers(student) for t in (q.scale, q.zero_point)]


def activations(student: Student) -> list[ActivationQuantizer]:
    return [q for q in quantizers(student) if isinstance(q, ActivationQuantizer)]


RULES = ["minmax", "moving-average", "percentile", "mse"]


@pytest.mark.parametrize("rule", RULES)
def test_calibrating_twice_gives_the_same_bits(rule: str) -> None:
    first, second = (quantized(graph(Branchy), PTQ(bits="6", range_rule=rule)).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_minmax_spans_what_was_seen_over_all_batches() -> None:
    x = images(64)
    x[3, 0, 0, 0], x[60, 1, 2, 2] = -9.0, 11.0
    student = quantize_ptq(graph(Plain), stream_of(x), PTQ(range_rule="minmax"), Run())
    grid = activations(student)[0]
    assert (grid.low.item(), grid.high.item()) == (-9.0, 11.0)
    assert grid.scale.item() == pytest.approx(20 / 255, rel=0.01)
    together = quantize_ptq(graph(Plain), stream_of(x, 64), PTQ(range_rule="minmax"), Run())
    for one, other in zip(grids(student), grids(together), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_moving_average_damps_what_one_batch_has() -> None:
    x = images(64)
    x[60, 1, 2, 2] = 50.0
    student = quantize_ptq(graph(Plain), stream_of(x), PTQ(range_rule="moving-average"), Run())
    first, *_, last = x.split(16)
    high = activations(student)[0].high.item()
    assert first.max().item() * 0.9 < high < 6
    assert high > last.median().item()
    again = quantize_ptq(graph(Plain), stream_of(x), PTQ(range_rule="moving-average"), Run())
    assert activations(again)[0].high.item() == high


@pytest.mark.parametrize(
    ("bits", "sigmas"), [("8", 6.0), ("W4A8", 6.0), ("7", 4.5), ("6", 3.0), ("W8A4", 1.5), ("3", 0.0)]
)
def test_auto_is_mse_with_ranges_that_batch_norm_implies(bits: str, sigmas: float) -> None:
    assert PTQ(bits=bits).resolved_range_rule == "mse"
    assert PTQ(bits=bits, range_rule="percentile").resolved_range_rule == "percentile"
    assert PTQ(bits=bits, range_rule="mse").resolved_range_sigmas == 0
    assert PTQ(bits=bits, range_sigmas=2).resolved_range_sigmas == 2
    settings = PTQ(bits=bits), PTQ(bits=bits, range_rule="mse", range_sigmas=sigmas)
    auto, named = (quantized(graph(ConvHead), each) for each in settings)
    assert all(torch.equal(a, b) for a, b in zip(grids(auto), grids(named), strict=True))


def ends(student: Student) -> Tensor:
    """Return the ends of every grid of activations but the input's, [quantizers, 2]."""
    grids = activations(student)[1:]
    return torch.stack([(q.scale * (torch.tensor([q.quant_min, q.quant_max]) - q.zero_point)).detach() for q in grids])


@pytest.mark.parametrize("bits", ["8", "6", "4"])
def test_logits_span_what_batch_norm_implies_at_every_width(bits: str) -> None:
    network = graph(ConvHead)
    x = 0.01 * images(64)  # such images reach small logits only
    wide, narrow = (
        ends(quantize_ptq(network, stream_of(x), PTQ(bits=bits, bias_correction=False, **kw), Run()))
        for kw in ({}, {"range_sigmas": 0.0})
    )
    assert (wide[-1] - narrow[-1]).abs().max() > 1


class Unbounded(ConvHead):
    """Values that grow with the image's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.head(self.norm(self.conv(x)).relu())
        return logits.view(x.size(0), -1)


def test_ranges_span_what_batch_norm_says_and_what_images_show() -> None:
    network = graph(Unbounded)
    folded, record = fold(network)

    def found(x: Tensor, sigmas: float) -> Tensor:
        settings = PTQ(range_rule="minmax", range_sigmas=sigmas, bias_correction=False, logit_headroom=1.0)
        return ends(quantize_ptq(network, stream_of(x), settings, Run()))

    settings = PTQ(bias_correction=False, logit_headroom=1.0)
    for size in (0.1, 1.0, 20.0):
        x = size * images(64)
        statistics = implied_statistics(folded, record, pixels_of(x[:16]), 2.0, Run())
        implied = ends(quantize_ptq(network, stream_of(x), settings, Run(), statistics=statistics))
        shown, both = found(x, 0), found(x, 2)
        wide = implied_statistics(folded, record, pixels_of(x[:16]), 2.0, Run(), output_sigmas=6.0)
        logits = ends(quantize_ptq(network, stream_of(x), settings, Run(), statistics=wide))
        assert torch.equal(logits[:-2], implied[:-2])
        implied[-2:] = logits[-2:]  # the last layer and the logits span six deviations, whatever is chosen
        step = (both[:, 1] - both[:, 0]) / 255
        for edge, widest in ((0, torch.minimum), (1, torch.maximum)):
            assert ((both[:, edge] - widest(shown[:, edge], implied[:, edge])).abs() <= 1.5 * step).all()
        assert (both - shown).abs().max() > 1 if size < 1 else True  # such images do not reach what batch norm says
        assert (both - implied).abs().max() > 1 if size > 1 else True  # and such images reach more


@pytest.mark.parametrize("make", [Plain, Branchy])
def test_a_network_with_few_batch_norms_is_calibrated_by_images_alone(make: Callable) -> None:
    with_them, without = (
        quantized(graph(make), PTQ(range_rule="mse", range_sigmas=sigmas, bias_correction=False)) for sigmas in (6, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(grids(with_them), grids(without), strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [Plain, ConvHead])
def test_logits_have_headroom_and_are_never_cut_off(make: Callable, rule: str) -> None:
    x = images(32)
    x[5] *= 4  # the largest logits are rare
    network = graph(make)
    with torch.no_grad():
        logits = network(x)
    for headroom in (1.0, 1.5):
        settings = PTQ(range_rule=rule, logit_headroom=headroom, bias_correction=False)
        student = quantize_ptq(network, stream_of(x, 32), settings, Run())
        grid = student.network.get_submodule(next(iter(student.ends)))
        low, high = (grid.scale * (edge - grid.zero_point) for edge in (grid.quant_min, grid.quant_max))
        slack = 1 + 1e-5
        assert low <= min(0.0, logits.min().item()) * headroom / slack
        assert high >= max(0.0, logits.max().item()) * headroom / slack
        width = max(0.0, logits.max().item()) - min(0.0, logits.min().item())
        assert grid.scale.item() <= width * headroom / 255 * 1.02


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(InputError, match="calibration was given no image"):
        quantize_ptq(graph(Plain), lambda: iter(()), PTQ(), Run())


def test_images_that_are_not_finite_are_refused() -> None:
    x = images(8)
    x[2, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"calibration saw the range \[-?\d.*inf\]; the images are not finite"):
        quantize_ptq(graph(Plain), stream_of(x), PTQ(range_rule="minmax"), Run())


@pytest.mark.parametrize("rule", RULES)
def test_eight_bits_stay_close_to_float(rule: str) -> None:
    x = images(200, seed=3)
    for make in (Plain, Branchy, ConvHead):
        network = graph(make)
        student = quantized(network, PTQ(range_rule=rule), count=64)
        with torch.no_grad():
            logits, answers = network(x), student(x)
        noise = (answers - logits).square().mean() / logits.square().mean()
        assert 10 * torch.log10(1 / noise) > 25, make
        assert (answers.argmax(1) == logits.argmax(1)).float().mean() > 0.9


def test_more_bits_are_closer() -> None:
    network, x = graph(Branchy), images(200, seed=3)
    errors = []
    for bits in ("8", "6", "4", "2"):
        with torch.no_grad():
            errors.append((quantized(network, PTQ(bits=bits))(x) - network(x)).square().mean().item())
    assert errors == sorted(errors)
    assert errors[1] < errors[2] / 4


def test_weight_range_rule_reaches_the_weights() -> None:
    network = graph(Plain)
    spread, least = (quantized(network, PTQ(bits="4", weight_range_rule=rule)) for rule in ("minmax", "mse"))
    for one, other in zip(quantizers(spread), quantizers(least), strict=True):
        if isinstance(one, WeightQuantizer):
            assert (other.scale <= one.scale).all()
            assert (other.scale < one.scale).any()


def test_calibration_counts_and_leaves_quantizers_on_and_the_network_alone() -> None:
    network = graph(Plain)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    student = quantized(network, PTQ(), count=40)
    assert student.num_calibration_images == 40
    assert {q.mode for q in quantizers(student)} == {"quantize"}
    assert not student.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("make", [Plain, Branchy])
def test_ranges_are_those_of_the_float_network(make: Callable) -> None:
    """Nothing is rounded while ranges are taken, biases included: their grid is not known yet."""
    folded, x = fold(graph(make))[0], images(32)
    student = quantized(graph(make), PTQ(bits="2", range_rule="minmax", bias_correction=False))
    seen = {}

    class Ends(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            seen[n.name] = torch.stack(torch.aminmax(value)) if isinstance(value, Tensor) else None
            return value

    with torch.no_grad():
        Ends(folded).run(x)
    for node in student.network.graph.nodes:
        if node.op == "call_module" and node.target.startswith("activation_"):
            grid = student.network.get_submodule(node.target)
            torch.testing.assert_close(torch.cat([grid.low, grid.high]), seen[node.args[0].name])


def test_the_stream_is_started_once_a_pass() -> None:
    for rule, correction, passes in (("minmax", False, 1), ("mse", False, 2), ("mse", True, 3)):
        starts = []
        x = images(32)

        def start(starts: list[int] = starts, x: Tensor = x) -> object:
            starts.append(1)
            return stream_of(x)()

        quantize_ptq(graph(Plain), start, PTQ(range_rule=rule, bias_correction=correction), Run())
        assert len(starts) == passes


def test_first_images_takes_no_more_than_it_needs() -> None:
    x = images(600)
    taken = []

    def batches() -> object:
        for batch in stream_of(x, 100)():
            taken.append(len(batch.images))
            yield batch

    assert torch.equal(first_images(batches(), torch.device("cpu")), x[:256])
    assert taken == [100] * 3
    assert torch.equal(first_images(stream_of(x[:7])(), torch.device("cpu")), x[:7])


def test_first_images_takes_fewer_large_ones() -> None:
    large = torch.randn(7, 1, 1024, 1024)
    assert torch.equal(first_images(stream_of(large, 3)(), torch.device("cpu")), large[:4])


def test_recalibration_starts_afresh_only_in_a_new_student() -> None:
    folded, _ = fold(graph(Plain))
    assert folded is not None
    student = quantized(graph(Plain), PTQ())
    narrow = activations(student)[0].scale.item()
    calibrate(student, stream_of(10 * images(16)), PTQ(), Run())
    assert activations(student)[0].scale.item() > 5 * narrow


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bits": "9"}, "widths from 2 to 8 work"),
        ({"num_samples": 0}, "quantizer.num_samples is 0; it must be at least 1"),
        ({"first_last_bits": 16}, "quantizer.first_last_bits is 16; widths from 2 to 8"),
        ({"logit_headroom": 0.5}, "quantizer.logit_headroom is 0.5; it must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        PTQ(**settings)

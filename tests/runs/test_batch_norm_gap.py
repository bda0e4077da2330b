"""Samples that cannot reach the statistics of batch norm put mean and std in doubt."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zsq
from zsq.quantization.layer_report import LayerReport
from zsq.runs.stages import warn_of_gap

WARNING = (
    "WARNING: the samples' statistics are 1.2 nats a channel away from those stored in the first batch norm; below 0.5 "
    "is good. Are mean 0 and std 1 those of training (--mean, --std)? If so, a longer --budget closes the gap."
)


def layer(gap: float | None) -> LayerReport:
    return LayerReport(
        name="w", weight_bits=8, values=1, batch_norm_gap=gap, weight_use=1, activation_use=None, sqnr=None, damage=1
    )


def job(method: Any) -> Any:
    spec = SimpleNamespace(mean=(0.0,), std=(1.0,))
    return SimpleNamespace(teacher=SimpleNamespace(spec=spec), settings=SimpleNamespace(method=method))


@pytest.mark.parametrize(
    ("gaps", "method", "warned"),
    [
        ([None, 1.2, 0.1], zsq.ZSCGAN(), [WARNING]),
        ([0.89, 7.0], zsq.ZSCGAN(), []),  # the first one sees what mean and std do; later ones need a long fit
        ([1.2], zsq.ZSCGAN(bns_weight=0), []),
        ([1.2], zsq.Noise(), []),
        ([None], zsq.ZSCGAN(), []),
        ([], zsq.ZSCGAN(), []),
    ],
)
def test_the_first_batch_norm_decides(
    said: list[str], gaps: list[float | None], method: Any, warned: list[str]
) -> None:
    warn_of_gap(job(method), [layer(gap) for gap in gaps])
    assert said == warned


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_a_fit_tells_right_statistics_from_none(tmp_path: Path, said: list[str], right: bool) -> None:
    known = {} if right else {"mean": (0.0,), "std": (1.0,)}
    settings = {"method.steps": 60, "quantizer.num_samples": 100}
    zsq.quantize(zsq.load_teacher("digits", **known), out=tmp_path / "run", settings=settings)
    assert any("Are mean 0 and std 1 those of training" in line for line in said) != right
    assert any("Are mean" in line for line in said) != right

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from zsq.checked import (
    AtLeastOne,
    BatchSize,
    Checked,
    Count,
    CountOrZero,
    Factor,
    Momentum,
    Positive,
    PositiveShare,
    Share,
    Text,
    Width,
)
from zsq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Checked):
    section: ClassVar[str] = "method"
    name: ClassVar[str] = "toy"

    count: Count = 1
    steps: CountOrZero = 0
    batch_size: BatchSize | None = None
    widths: dict[str, Width] | None = None
    text: Text = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(Base):
    factor: Factor = 0.0
    rate: Positive = 1.0
    headroom: AtLeastOne = 1.0
    momentum: Momentum = 0.0
    share: Share | None = None
    truncation: PositiveShare = 1.0
    kind: Literal["one", "two"] = "one"
    on: bool = True

    def check(self) -> None:
        if self.factor + self.headroom > 100:
            raise InputError("method.factor and method.headroom are too large.")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"count": 0}, "method.count is 0; it must be at least 1."),
        ({"steps": -1}, "method.steps is -1; it must be at least 0."),
        ({"steps": "-1"}, "method.steps is -1; it must be at least 0."),
        ({"batch_size": 1}, "method.batch_size is 1; batch statistics need at least 2 images."),
        ({"widths": {"a.b": 9}}, "method.widths.a.b is 9; widths from 2 to 8 work."),
        ({"factor": -0.5}, "method.factor is -0.5; it must be at least 0."),
        ({"rate": 0.0}, "method.rate is 0.0; it must be above 0."),
        ({"headroom": 0.5}, "method.headroom is 0.5; it must be at least 1."),
        ({"momentum": 1}, "method.momentum is 1; it must lie in [0, 1)."),
        ({"share": 1.5}, "method.share is 1.5; it must lie in [0, 1]."),
        ({"truncation": 0}, "method.truncation is 0; it must lie in (0, 1]."),
        ({"rate": float("nan")}, "method.rate is nan; a finite number is expected."),
        ({"rate": "-inf"}, "method.rate is -inf; a finite number is expected."),
        ({"share": "nan"}, "method.share is nan; a finite number is expected."),
        ({"kind": "three"}, "method.kind is 'three': Input should be 'one' or 'two'."),
        ({"steps": 2.5}, "method.steps is 2.5: Input should be a valid integer, got a number with a fractional part."),
        ({"factor": 60, "headroom": 60}, "method.factor and method.headroom are too large."),
    ],
)
def test_values_that_do_not_fit_are_quoted(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        Toy(**values)
    assert str(caught.value) == text
    with pytest.raises(InputError):
        replace(Toy(), **values)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 1, "steps": 0, "batch_size": 2, "widths": {"a": 2, "b": 8}},
        {"factor": 0.0, "rate": 1e-12, "headroom": 1.0, "momentum": 0.0, "share": 0.0, "truncation": 1.0},
        {"share": 1.0, "batch_size": None, "widths": None},
    ],
)
def test_the_ends_of_ranges_are_taken(values: dict[str, Any]) -> None:
    toy = Toy(**values)
    assert {name: getattr(toy, name) for name in values} == values


def test_values_are_converted_to_their_types() -> None:
    toy = Toy(steps="3", rate=1, on="false", text=Path("a/b"), widths={"a": "4"})
    assert asdict(toy) == asdict(Toy(steps=3, rate=1.0, on=False, text="a/b", widths={"a": 4}))
    assert type(toy.rate) is float
    assert Toy(text=4).text == "4"


def test_they_are_dataclasses_as_others_are() -> None:
    toy = Toy(steps=3)
    assert [field.name for field in fields(toy)][:5] == ["count", "steps", "batch_size", "widths", "text"]
    assert pickle.loads(pickle.dumps(toy)) == copy.deepcopy(toy) == replace(toy) == toy
    assert hash(toy) == hash(Toy(steps=3))
    assert not hasattr(toy, "__dict__")
    with pytest.raises(FrozenInstanceError):
        toy.steps = 4  # type: ignore[misc]

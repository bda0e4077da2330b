import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zsq.errors import InputError, NumericsError
from zsq.runtime.files import load_tensors, replacing, save_tensors
from zsq.runtime.random_streams import stream
from zsq.training.checkpoints import Checkpoints
from zsq.training.loop import LOG_EVERY, Run
from zsq.training.optim import cosine, flatten_optimizer, learning_rates, rate_on, restore_optimizer, set_learning_rate
from zsq.training.state import part, under


class Toy:
    """A learner whose every step depends on all before it, on Adam's moments and on the step's random stream."""

    def __init__(self, seed: int = 0, *, stop_at: int | None = None, bad_at: int | None = None) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.Adam([self.weight], lr=0.1, fused=True)
        self.seed, self.stop_at, self.bad_at = seed, stop_at, bad_at
        self.taken: list[int] = []

    def step(self, step: int) -> dict[str, Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.taken.append(step)
        target = torch.randn(3, generator=stream(self.seed, "toy", step))
        loss = (self.weight - target).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        set_learning_rate(self.optimizer, cosine(1.0, step, 40))
        self.optimizer.step()
        shown = loss.detach() * (math.nan if step == self.bad_at else 1)
        return {"fine": loss.detach(), "distance": shown}

    def rates(self) -> dict[str, float]:
        return learning_rates(self.optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()} | under("optimizer", flatten_optimizer(self.optimizer))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])
        restore_optimizer(self.optimizer, part("optimizer", state))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(generator: torch.Generator) -> list[float]:
    return torch.randn(4, generator=generator).tolist()


def test_stream_is_a_pure_function():
    first = numbers(stream(0, "fit", 7))
    torch.manual_seed(99)
    assert numbers(stream(0, "fit", 7)) == first


@pytest.mark.parametrize("other", [(1, "fit", 7), (0, "sample", 7), (0, "fit", 8), (0, "fit/7", 7), (70, "fit", 0)])
def test_streams_differ_by_seed_name_and_step(other):
    assert numbers(stream(*other)) != numbers(stream(0, "fit", 7))


def test_stream_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    numbers(stream(3, "fit", 1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),
        (25, 0.1 * (1 + math.sqrt(0.5))),  # a quarter of the way; linear would give 0.15
        (50, 0.1),
        (75, 0.1 * (1 - math.sqrt(0.5))),
        (100, 0.0),
        (130, 0.0),  # stays there
    ],
)
def test_cosine_is_the_closed_form(step, rate):
    assert cosine(0.2, step, 100) == pytest.approx(rate, abs=1e-12)


def test_cosine_of_no_steps_does_not_divide_by_zero():
    assert cosine(0.2, 0, 0) == 0.2


def test_set_learning_rate_scales_the_initial_rate_of_each_group():
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 2.0}])
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05), pytest.approx(0.2)]


def test_replacing_leaves_no_file_when_the_block_fails(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "new" / "file.txt") as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert list((tmp_path / "new").iterdir()) == []


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_swaps_the_file_in_at_the_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_come_back_with_names_kinds_and_metadata(tmp_path):
    stored = {
        "a.b": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "n": torch.tensor(3, dtype=torch.int64),
        "half": torch.ones(2, dtype=torch.float16, requires_grad=True),
    }
    save_tensors(tmp_path / "x.safetensors", stored, {"step": "4"})
    found, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"step": "4"}
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    base = torch.arange(4.0)
    save_tensors(tmp_path / "x.safetensors", {"whole": base, "half": base[:2]})
    assert load_tensors(tmp_path / "x.safetensors")[0]["half"].tolist() == [0, 1]


@pytest.mark.parametrize("keep", [0, 5, 40, -3])
def test_a_truncated_file_is_an_input_error_that_names_it(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_tensors(path, {"a": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_tensors(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.999), fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1),  # stateless
    ],
)
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, make):
    def run(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            noise = torch.randn(4, 2, 3, 3, generator=stream(0, "optimizer", step))
            ((weights[0] * noise).sum().square() + weights[1].square().sum()).backward()
            optimizer.step()

    def fresh() -> list[nn.Parameter]:
        wide = torch.ones(4, 2, 3, 3).to(memory_format=torch.channels_last)
        return [nn.Parameter(wide), nn.Parameter(torch.ones(5))]

    whole = fresh()
    run(whole, make(whole), range(8))
    first = fresh()
    optimizer = make(first)
    run(first, optimizer, range(5))
    save_tensors(tmp_path / "o.safetensors", flatten_optimizer(optimizer))
    second = [nn.Parameter(weight.detach().clone()) for weight in first]
    restored = make(second)
    restore_optimizer(restored, load_tensors(tmp_path / "o.safetensors")[0])
    run(second, restored, range(5, 8))
    for expected, found in zip(whole, second, strict=True):
        assert torch.equal(expected, found)


def test_part_undoes_under_and_leaves_similar_names_alone():
    tensors = {"a": torch.ones(1), "b.c": torch.zeros(1)}
    mixed = under("source", tensors) | under("source2", {"a": torch.full((1,), 7.0)})
    assert part("source", mixed) == tensors


@pytest.mark.parametrize(("every", "stop"), [(1, 17), (4, 17), (4, 16), (7, 3), (30, 29)])
def test_a_run_resumes_from_its_checkpoint_exactly(tmp_path, every, stop):
    whole = Toy()
    Run(tmp_path / "whole", checkpoint_steps=every).train("fit", whole, 40)
    broken = Toy(stop_at=stop)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "broken", checkpoint_steps=every).train("fit", broken, 40)
    resumed = Toy()
    Run(tmp_path / "broken", checkpoint_steps=every).train("fit", resumed, 40)
    assert resumed.taken == list(range(stop - stop % every, 40))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    if every < LOG_EVERY:  # elsewhere a resumed run reads its losses at other steps
        assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def test_a_kill_in_the_middle_of_a_line_leaves_no_doubled_or_cut_line(tmp_path):
    Run(tmp_path, checkpoint_steps=5).train("fit", Toy(), 20)
    whole = metrics(tmp_path)
    state, _ = load_tensors(tmp_path / "checkpoints" / "fit.safetensors")
    assert state
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, checkpoint_steps=5).train("distill", Toy(stop_at=13), 20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "distill", "step": 12, "distance": 0.1}\n{"phase": "distill", "st')
    Run(tmp_path, checkpoint_steps=5).train("distill", Toy(), 20)
    found = metrics(tmp_path)
    assert found[: len(whole)] == whole
    assert [(line["phase"], line["step"]) for line in found[len(whole) :]] == [("distill", n) for n in (5, 10, 15, 20)]
    assert [line["distance"] for line in found[len(whole) :]] == [line["distance"] for line in whole]


def test_a_finished_phase_is_not_run_again(tmp_path):
    Run(tmp_path).train("fit", Toy(), 12)
    again = Toy()
    Run(tmp_path).train("fit", again, 12)
    assert again.taken == []
    assert [line["step"] for line in metrics(tmp_path)] == [10, 12]


def test_a_metrics_line_names_phase_step_and_every_loss(tmp_path):
    Run(tmp_path).train("fit", Toy(), 3)
    (line,) = metrics(tmp_path)
    assert (line["phase"], line["step"]) == ("fit", 3)
    assert line["fine"] == line["distance"] > 0


@pytest.mark.parametrize("bad_at", [0, 4, 9, 10, 24])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_term_and_step(tmp_path, bad_at):
    learner = Toy(bad_at=bad_at)
    with pytest.raises(NumericsError, match=rf"fit: loss 'distance' is nan at step {bad_at} of 25"):
        Run(tmp_path, checkpoint_steps=5).train("fit", learner, 25)
    assert len(learner.taken) <= bad_at + LOG_EVERY
    path = tmp_path / "checkpoints" / "fit.safetensors"
    assert path.exists() == (bad_at >= 5)  # no state after the bad step is kept
    if path.exists():
        assert int(load_tensors(path)[1]["step"]) <= bad_at


@pytest.mark.parametrize("damage", ["cut", "other tensors", "no step"])
def test_a_damaged_checkpoint_is_an_input_error_that_names_it(tmp_path, damage):
    Run(tmp_path, checkpoint_steps=5).train("fit", Toy(), 10)
    path = tmp_path / "checkpoints" / "fit.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "other tensors":
        save_tensors(path, {"weight": torch.ones(4)}, {"step": "5"})
    else:
        save_tensors(path, load_tensors(path)[0])
    with pytest.raises(InputError, match=r"fit\.safetensors"):
        Run(tmp_path).train("fit", Toy(), 10)


@pytest.mark.parametrize("every", [0, -1])
def test_a_checkpoint_interval_below_one_is_refused(every):
    with pytest.raises(InputError, match=f"checkpoint-every is {every}"):
        Run(checkpoint_steps=every)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learner = Toy()
    Run().train("fit", learner, 3)
    assert learner.taken == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_each_counts_what_is_done():
    seen = []

    class Recorder:
        def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
            seen.append((phase, done, total, values))

    assert list(Run(observer=Recorder()).each("calibrate", ["ab", "c"], 3, len)) == ["ab", "c"]
    assert seen == [("calibrate", 0, 3, {}), ("calibrate", 2, 3, {}), ("calibrate", 3, 3, {})]


def test_progress_shows_the_latest_losses():
    seen = []

    class Recorder:
        def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
            seen.append((phase, done, total, sorted(values)))

    Run(observer=Recorder()).train("fit", Toy(), 12)
    assert seen == [("fit", 10, 12, ["distance", "fine"]), ("fit", 12, 12, ["distance", "fine"])]


class Signalled(Toy):
    """Sends its own process a signal in the middle of a step."""

    def __init__(self, number: int, at: int, times: int = 1) -> None:
        super().__init__()
        self.number, self.at, self.times = number, at, times

    def step(self, step: int) -> dict[str, Tensor]:
        for _ in range(self.times if step == self.at else 0):
            signal.raise_signal(self.number)
        return super().step(step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_after_the_step_and_its_checkpoint(tmp_path, number):
    class EndedError(Exception):
        pass

    def end(received: int, frame: object) -> None:
        raise EndedError(received)

    before = signal.signal(number, end)
    try:
        learner = Signalled(number, at=4)
        with pytest.raises(EndedError):
            Run(tmp_path).train("fit", learner, 40)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert learner.taken == [0, 1, 2, 3, 4]
    assert load_tensors(tmp_path / "checkpoints" / "fit.safetensors")[1]["step"] == "5"
    assert [line["step"] for line in metrics(tmp_path)] == [5]
    resumed, whole = Toy(), Toy()
    Run(tmp_path).train("fit", resumed, 40)
    Run().train("fit", whole, 40)
    assert resumed.taken[0] == 5
    assert torch.equal(resumed.weight, whole.weight)


def test_a_second_interrupt_takes_effect_at_once(tmp_path):
    learner = Signalled(signal.SIGINT, at=4, times=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path).train("fit", learner, 40)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert learner.taken == [0, 1, 2, 3]
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_takes_long_is_written_less_often():
    def due(seconds_ago: float, cost: float) -> bool:
        saved_at = time.monotonic() - seconds_ago
        return Checkpoints(None, "fit", None, saved_at=saved_at, seconds=cost).due(1, logged=True)

    assert due(40, cost=0.1)
    assert not due(40, cost=2.0)  # 2 % of the time: every 100 seconds
    assert due(101, cost=2.0)
    assert not due(20, cost=0.1)


def test_tensors_that_share_memory_or_lie_within_others_are_stored_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "same": base, "row": base[1], "turned": base.t(), "none": torch.empty(0)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": "1"})
    found, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == {"step": "1"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_signal_while_losses_are_read_saves_too(tmp_path):
    class Pressed:
        def update(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
            if done == 20:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path, observer=Pressed()).train("fit", Toy(), 1000)
    finally:
        signal.signal(signal.SIGINT, before)
    assert load_tensors(tmp_path / "checkpoints" / "fit.safetensors")[1]["step"] == "20"


def test_a_rate_that_is_a_tensor_is_set_in_place() -> None:
    """A GPU replays kernels that read it."""
    weight, rate = torch.nn.Parameter(torch.ones(2)), torch.tensor(0.5)
    optimizer = torch.optim.SGD([{"params": [weight], "lr": rate}])
    for factor in (0.5, 1.0, 0.1):
        set_learning_rate(optimizer, factor)
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.5 * factor)
    assert isinstance(rate_on(torch.device("cpu"), 0.5), float)

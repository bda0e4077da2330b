"""Two processes that share a run against one that does it alone: gloo on the CPU, the bundled digits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import zsq
from zsq.cli import launcher
from zsq.cli.launcher import LOST, run_workers, watch_starter
from zsq.errors import InputError, LostProcessError, NumericsError
from zsq.export.content_hash import canonical_sha256
from zsq.graph.moments import moments
from zsq.methods import ZSCGAN, Adversarial, DeepInversion, Method, Noise, Real, Spectral, ZeroQ
from zsq.models.teacher import load_teacher
from zsq.quantization import QAT
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import distill
from zsq.runs import budget
from zsq.runs.budget import plan
from zsq.runs.pipeline import HASHED
from zsq.runs.settings import resolve
from zsq.runtime import distributed
from zsq.runtime.files import load_tensors
from zsq.training.loop import Run
from zsq.training.losses import intermediate_loss

COUNT = 9
"""Images of a batch: the shares of two processes are of four and of five."""

METHODS: dict[str, Method] = {
    "zscgan": ZSCGAN(steps=4, batch_size=COUNT, width=8),
    "adversarial": Adversarial(steps=3, batch_size=COUNT, width=8, generators=2),
    "fresh adversarial": Adversarial(steps=0, batch_size=COUNT, width=8),
    "zeroq": ZeroQ(steps=6, iterations=3, batch_size=COUNT),
    "deepinversion": DeepInversion(steps=4, iterations=2, batch_size=COUNT, competition_weight=0.2),
    "spectral": Spectral(steps=4, iterations=2, batch_size=COUNT),
    "noise": Noise(batch_size=COUNT, distribution="uniform"),
    "real": Real(data="digits:train", limit=200, batch_size=COUNT, augment="crop-flip"),
}

DISTILLED = {
    "learnable": ("real", QAT(steps=4, num_samples=40, learning_rate=1e-3, kd_weight=1.0)),
    "moving-average": ("real", QAT(steps=4, num_samples=40, scales="moving-average", kd_weight=1.0)),
    "with its generator": ("zscgan", QAT(steps=4, num_samples=40, learning_rate=1e-3)),
    # 4 bits, so that the divergence is well above the rounding of float32
    "against the student": ("fresh adversarial", QAT(steps=2, num_samples=40, bits="4")),
    "layers": ("real", QAT(steps=3, num_samples=40, kd_weight=0.5, intermediate_weight=0.3)),
}


ROUNDED = ("kd", "agreement")
"""Losses of a student. Where a generator makes its images, these differ in their last digits between one process and
two, and some values fall on the other side of a rounding: changing a generator's weights by 3e-7 of themselves moved
the loss by up to 8e-4 of itself, in one process. Elsewhere the images are the same, bit for bit."""


def pixels(*means: float) -> Tensor:
    """Return seven images of three channels that have these means."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, 2, 2, generator=generator) + torch.tensor(means).view(1, 3, 1, 1)


FAR = (0.0, 30.0, -500.0)
"""Means so far from 0 that a difference of mean squares would lose digits."""

NEAR = (0.0, 1.0, -2.0)


def weighted(x: Tensor) -> Tensor:
    """Return a loss of the moments of [N, 3, 2, 2] that no symmetry makes right by accident."""
    mean, var = moments(x)
    weights = torch.tensor([1.0, -2.0, 0.5])
    return (weights * mean).sum() + (weights.flip(0) * var.square()).sum()


def of_shares() -> dict[str, Tensor]:
    """Compute moments, a gathered batch, ranges and the layers' distance, with gradients with respect to the whole."""
    found: dict[str, Tensor] = {}
    with distributed.together():
        for name, loss in {
            "moments": weighted,
            "logits": lambda x: distributed.whole(x.flatten(1), 7).logsumexp(0).square().sum(),
            "normalised": lambda x: (
                distributed.whole((x * moments(x)[1].view(1, 3, 1, 1)).flatten(1), 7).square().sum()
            ),
            "layers": lambda x: intermediate_loss([x], [distributed.share(pixels(*NEAR)).square()]),
        }.items():
            x = pixels(*NEAR).requires_grad_()
            value = loss(distributed.share(x))
            value.backward()
            distributed.reduce_gradients([x])
            assert x.grad is not None
            found |= {name: value.detach(), f"{name}.gradient": x.grad}
        found["mean"], found["var"] = moments(distributed.share(pixels(*FAR)))
        low, high = torch.aminmax(distributed.share(pixels(*FAR)))
        found["low"], found["high"] = distributed.widest(low.view(1), high.view(1))
    return found


def work(folder: Path) -> None:
    """Train by every method and distil, one line of losses a step; keep what this process saw."""
    teacher = load_teacher("digits")
    mine: dict[str, Tensor] = of_shares()
    for name, method in METHODS.items():
        run = Run(folder / name, seed=1, checkpoint_steps=1)
        source = method.fit(teacher, run, distill_steps=4).source
        with distributed.together():
            batch = source.batch(0, None)
        mine |= {f"{name}.images": batch.images, f"{name}.labels": batch.labels}
    for name, (method, settings) in DISTILLED.items():
        run = Run(folder / name, seed=1, checkpoint_steps=1)
        surrogate = METHODS[method].fit(teacher, run, distill_steps=settings.steps)
        student = quantize_ptq(
            teacher.network,
            lambda source=surrogate.source: source.sample(40),
            settings,
            run,
            learnable=settings.scales == "learnable",
        )
        distill(student, teacher.network, surrogate.source, settings, run)
    torch.save(mine, folder / f"process{os.environ.get('RANK', 'alone')}.pt")


def refusals(folder: Path) -> None:
    """Meet faults that all processes or only one of them runs into, and measure a schedule."""
    said = []
    teacher = load_teacher("digits")
    for method in (ZSCGAN(steps=1, batch_size=3, width=4), ZSCGAN(steps=30, width=4, learning_rate=1e30)):
        try:
            method.fit(teacher, Run(folder / "broken"))
        except (InputError, NumericsError) as error:
            said.append(str(error))

    def fail() -> None:
        raise InputError("the first process cannot")

    try:
        distributed.on_main(fail)
    except InputError as error:
        said.append(str(error))
    budget.time = SimpleNamespace(perf_counter=lambda: 10 * time.perf_counter())  # it measures for seconds by the clock
    chosen = ("method.batch_size=8", "method.width=4", "quantizer.num_samples=20")
    wanted = resolve(quantizer="qat", assignments=chosen)
    planned = plan(wanted, teacher, Run(), 600.0, num_eval_images=0, fitted=False)  # measured together, decided by one
    steps = planned.settings.method.steps, planned.settings.distill_steps
    torch.save((said, distributed.on_main(lambda: os.environ["RANK"]), steps), folder / f"said{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: their work, what they refuse and plan, and a run."""
    folder = tmp_path_factory.mktemp("two")
    assert run_workers([sys.executable, "-W", "error", __file__, str(folder)], 2) == 0
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    work(folder)
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seen(folder: Path, name: str) -> dict[str, Tensor]:
    return torch.load(folder / f"process{name}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zscgan", "adversarial", "zeroq", "deepinversion", "spectral", *DISTILLED])
def test_two_processes_have_the_losses_of_one(two, alone, name):
    one, both = metrics(alone / name), metrics(two / name)
    assert len(one) > 1
    assert [(line["phase"], line["step"]) for line in both] == [(line["phase"], line["step"]) for line in one]
    for expected, found in zip(one, both, strict=True):
        assert found.pop("phase") == expected.pop("phase")
        if name == "with its generator" and "kd" in expected:
            assert found["kd"] == pytest.approx(expected["kd"], rel=5e-3)
            for line in (found, expected):
                for rounded in ROUNDED:
                    del line[rounded]
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zscgan", "adversarial", "zeroq", "deepinversion", "spectral", *DISTILLED])
def test_two_processes_learn_what_one_does(two, alone, name):
    for path in sorted((alone / name / "checkpoints").iterdir()):
        expected, found = load_tensors(path)[0], load_tensors(two / name / "checkpoints" / path.name)[0]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if name == "with its generator" and not key.startswith(("source.", "generator.")):
                continue  # see ROUNDED
            if key.rpartition(".")[2] not in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    found[key], value, rtol=1e-3, atol=1e-3, msg=lambda text, k=key: f"{k}: {text}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_samples_of_the_processes_are_disjoint_and_make_up_the_batch(two, alone, name):
    shares = [seen(two, rank)[f"{name}.images"] for rank in ("0", "1")]
    assert [len(images) for images in shares] == [4, 5]
    expected = seen(alone, "alone")
    torch.testing.assert_close(torch.cat(shares), expected[f"{name}.images"], rtol=1e-3, atol=1e-3)
    rows = [{image.numpy().tobytes() for image in images} for images in shares]
    twice = COUNT - len(
        {image.numpy().tobytes() for image in expected[f"{name}.images"]}
    )  # pools draw with replacement
    assert len(rows[0] & rows[1]) <= twice
    assert twice == 0 or name in ("zeroq", "deepinversion", "spectral", "real")
    for rank in ("0", "1"):  # every process knows all labels
        assert torch.equal(seen(two, rank)[f"{name}.labels"], expected[f"{name}.labels"])


@pytest.mark.slow
def test_moments_over_processes_are_those_of_the_batch(two):
    x = pixels(*FAR).double()
    for rank in ("0", "1"):
        found = seen(two, rank)
        torch.testing.assert_close(found["mean"], x.mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["var"], x.var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)
        assert (found["low"], found["high"]) == (x.min(), x.max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moments", "logits", "normalised", "layers"])
def test_gradients_over_processes_are_those_of_the_batch(two, alone, name):
    expected = seen(alone, "alone")
    for rank in ("0", "1"):
        found = seen(two, rank)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)
        gradient = expected[f"{name}.gradient"]
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found[f"{name}.gradient"], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max())


def test_pooled_moments_of_one_process_are_its_own():
    mean, var = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    with distributed.together():
        assert distributed.pooled(mean, var, 5) == (mean, var)
        assert distributed.share(mean) is mean
        assert distributed.whole(mean, 2) is mean
        assert distributed.size() == 1


@pytest.mark.parametrize(("shares", "sizes"), [(1, [9]), (2, [4, 5]), (3, [3, 3, 3]), (4, [2, 2, 2, 3])])
def test_shares_are_disjoint_cover_the_batch_and_differ_by_one_at_most(monkeypatch, shares, sizes):
    rows = torch.arange(COUNT)
    monkeypatch.setattr(distributed, "processes", lambda: shares)
    found = []
    for rank in range(shares):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert distributed.share(rows) is rows  # outside of training, each works as if alone
        with distributed.together():
            found.append(distributed.share(rows))
    assert torch.equal(torch.cat(found), rows)
    assert sorted(map(len, found)) == sizes


def test_a_batch_of_fewer_than_two_images_a_process_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: 5)
    text = r"a batch of 9 images .* 5 processes.*batch_size': 10"
    with distributed.together(), pytest.raises(InputError, match=text):
        distributed.share(torch.arange(9))


@pytest.mark.slow
def test_faults_and_schedules_reach_every_process(two):
    (said, first, steps), (other, second, same) = (torch.load(two / f"said{rank}.pt") for rank in (0, 1))
    assert said == other
    assert steps == same
    assert min(steps) > 10
    assert first == second == "0"
    assert "a batch of 3 images is too small for 2 processes" in said[0]
    assert "of 30; a lower learning rate" in said[1]
    assert said[2] == "the first process cannot"


def test_a_process_that_is_lost_is_one_line(monkeypatch):
    def broken(*arguments: object) -> None:
        raise RuntimeError("Connection closed by peer [::1]\nframe #0: deep down")

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(LostProcessError, match=r"lost touch .*Connection closed by peer \[::1\]\)\.$"):
        distributed.total(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--devices", "-2"], "devices is -2; it must be at least 1"),
        (["--devices", "2", "--device", "cuda"], "CUDA device"),
    ],
)
def test_a_number_of_devices_that_cannot_be_is_refused(tmp_path, capsys, arguments, text):
    from zsq.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "digits", "--out", str(tmp_path / "run"), *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert text in error
    assert error.count("\n") == 1


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    distributed.check_devices(3, "cuda")
    distributed.check_devices(64, "cpu")
    with pytest.raises(InputError, match="devices is 4 and PyTorch sees 3 CUDA devices here"):
        distributed.check_devices(4, "cuda")


def test_devices_beside_torchrun_must_agree(monkeypatch, tmp_path, capsys):
    from zsq.cli.main import main

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        main(["synthesize", "digits", "--out", str(tmp_path), "--devices", "3"])
    assert "--devices is 3 and torchrun started 2 processes here; leave --devices out." in capsys.readouterr().err


def script(first: str, others: str) -> list[str]:
    """Return a command that does one thing in the first process and another in the rest."""
    text = f"import os, signal, sys, time\nif os.environ['RANK'] == '0':\n {first}\nelse:\n {others}"
    return [sys.executable, "-S", "-c", text]


WAIT = "time.sleep(60)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "others", "code", "said"),
    [
        ("pass", "print('unseen', file=sys.stderr)", 0, ""),
        (WAIT, "sys.exit('note\\nError: no such file')", 1, "Error: process 1: no such file\n"),
        (WAIT, "os.kill(os.getpid(), signal.SIGKILL)", 1, "Error: process 1 was killed by signal 9"),
        (
            WAIT,
            "print('why', file=sys.stderr, flush=True); os.abort()",
            1,
            "Error: process 1 was killed by signal 6 (why)",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", WAIT, 1, "Error: process 0 was killed by signal 9"),
        (f"sys.exit({LOST})", "time.sleep(0.2); sys.exit('Error: the cause')", 1, "Error: process 1: the cause\n"),
        ("time.sleep(0.1); sys.exit(1)", "sys.exit('Error: as the first')", 1, ""),  # the first one says it itself
        ("sys.exit(130)", f"sys.exit({LOST})", 130, ""),
    ],
)
def test_a_failing_process_ends_the_run_with_one_line(monkeypatch, capfd, first, others, code, said):
    monkeypatch.setattr(launcher._end, "__defaults__", (0.6,))  # in the place of GRACE
    begin = time.monotonic()
    assert run_workers(script(first, others), 2) == code
    assert time.monotonic() - begin < 30
    error = capfd.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == bool(said)


LOAD = f"""
import importlib.util as u
s = u.spec_from_file_location('w', {str(launcher.__file__)!r})
w = u.module_from_spec(s)
s.loader.exec_module(w)
"""
"""Imports the launcher as `w` without the rest of zsq, which takes seconds."""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    worker = f"{LOAD}import os, time\nw.watch_starter()\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\ntime.sleep(60)"
    starter = f"{LOAD}import sys\nw.run_workers([sys.executable, '-c', {worker!r}], 2)"
    process = subprocess.Popen([sys.executable, "-c", starter])
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    process.kill()
    process.wait()
    until(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()))
    assert len(list(tmp_path.iterdir())) == 2


def until(done: object) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_nobody_watches_where_nobody_started_it(monkeypatch):
    monkeypatch.delenv(launcher.SUPERVISED, raising=False)
    monkeypatch.setattr(os, "read", lambda *arguments: pytest.fail("stdin was read"))
    watch_starter()
    assert launcher.SUPERVISED not in os.environ


KILLED = {
    "settings": (
        "method.steps=5",
        "method.batch_size=9",
        "method.width=8",
        "quantizer.num_samples=40",
        "quantizer.steps=4",
    ),
    "quantizer": "qat",
    "bits": "4",
}


def broken_run(folder: Path, phase: str, step: int, whom: str) -> None:
    """Quantize, and when a step is done, kill every process of the run or the second one alone."""
    watch_starter()

    class Watch:
        def update(self, now: str, done: int, total: int, values: dict[str, float]) -> None:
            del total, values
            if (now, done) == (phase, step):
                if whom == "all":
                    os.killpg(0, signal.SIGKILL)
                os.kill(int((folder.parent / "second").read_text()), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        (folder.parent / "second").write_text(str(os.getpid()))
    resume = (folder / "settings.toml").exists()
    with contextlib.suppress(LostProcessError):
        zsq.quantize(
            load_teacher("digits"),
            out=folder,
            observer=Watch(),
            checkpoint_every=1,
            resume=resume,
            device="cpu",
            quiet=True,
            **KILLED,
        )
    sys.exit(LOST)


def whole_run(folder: Path) -> None:
    """Quantize without an interruption."""
    zsq.quantize(load_teacher("digits"), out=folder, checkpoint_every=1, device="cpu", quiet=True, **KILLED)


def zsq_command(folder: Path, *more: str) -> list[str]:
    settings = [part for text in KILLED["settings"] for part in ("--set", text)]
    command = [sys.executable, "-W", "error", "-m", "zsq", "quantize", "digits"]
    run = ["--out", str(folder), "--quantizer", "qat", "--bits", "4", "--checkpoint-every", "1", "--device", "cpu"]
    return [*command, *run, *settings, "--devices", "2", "--json", *more]


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_as_if_nothing_had_happened(two, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    driver = f"{LOAD}import sys\nsys.exit(w.run_workers([sys.executable, *sys.argv[1:]], 2))"

    def broken(*moment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", driver, __file__, str(tmp_path / "killed"), *moment]
        return subprocess.run(
            command, start_new_session=True, check=False, env=environment, capture_output=True, text=True
        )

    def steps() -> list[tuple[str, int]]:
        return [(line["phase"], line["step"]) for line in metrics(tmp_path / "killed")]

    assert broken("fit", "3", "all").returncode == -signal.SIGKILL
    assert steps()[-1] in (("fit", 2), ("fit", 3))
    ended = broken("distill", "2", "second")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "Error: process 1 was killed by signal 9, and the run with it; --resume continues." in ended.stderr
    assert steps()[-1][0] == "distill"
    done = subprocess.run(
        zsq_command(tmp_path / "killed", "--resume"), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits"] == "4"  # one process speaks
    written = [name for name in HASHED if (two / "whole" / name).exists()]
    hashes = [{n: canonical_sha256(run / n) for n in written} for run in (tmp_path / "killed", two / "whole")]
    assert hashes[0] == hashes[1]
    assert steps() == [("fit", n) for n in range(1, 6)] + [("distill", n) for n in range(1, 5)]
    assert "processes = 2" in (two / "whole" / "settings.toml").read_text()
    assert not list((tmp_path / "killed").rglob("*.part"))


def test_one_process_is_the_first_and_asks_nobody():
    assert distributed.processes() == 1
    assert distributed.is_main()
    assert distributed.on_main(lambda: 3) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        work(Path(sys.argv[1]))
        refusals(Path(sys.argv[1]))
        whole_run(Path(sys.argv[1]) / "whole")
    else:
        broken_run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])

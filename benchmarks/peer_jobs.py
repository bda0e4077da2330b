"""The single jobs of peers.py, each in a process of its own: making images, and quantizing with them.

python benchmarks/peer_jobs.py JOB.json    reads what to do, and writes JOB.json with the result
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from floatfile import quantize_by_onnxruntime, write_float
from genie import Genie

from zsq.data.datasets import DataSet, open_dataset
from zsq.evaluation.accuracy import Evaluation, evaluate
from zsq.export.onnx import write_onnx
from zsq.export.onnx_runtime import OnnxClassifier
from zsq.methods import ZSCGAN, Noise, Real, ZeroQ
from zsq.methods.image_optimization import Inversion
from zsq.methods.pool import PoolSource, Stateless
from zsq.models.teacher import Teacher, load_teacher
from zsq.quantization import PTQ, QAT
from zsq.quantization.convert import convert
from zsq.quantization.ptq import quantize_ptq
from zsq.quantization.qat import distill
from zsq.runs.settings import resolve
from zsq.training.learner import Learner
from zsq.training.loop import Run
from zsq.types import Batch, SampleSource

METHODS: dict[str, Any] = {"zscgan": ZSCGAN, "zeroq": ZeroQ, "genie": Genie}
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Shares of the synthesis after which its images are kept, to see when they became good enough."""
QUICK = Path(__file__).parents[1] / "recipes" / "quick.toml"
MEASURED_STEPS = 4
RATE_IMAGES = 256


def peak_mebibytes() -> int:
    """Return the largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def kept_steps(steps: int, unit: int) -> list[int]:
    """Return after which steps images are kept: shares of all steps, at the ends of `unit` steps, the last always.

    >>> kept_steps(800, 1), kept_steps(1000, 500), kept_steps(5, 10)
    ([100, 200, 400, 800], [500, 1000], [5])
    """
    wanted = (round(share * steps / unit) * unit for share in SHARES)
    return sorted({step for step in wanted if 0 < step < steps} | {steps})


class Clock(Run):
    """A run that counts the seconds of its steps alone, and calls back after some of them."""

    def __init__(self, keep: Callable[[Learner, int, float], None], unit: int) -> None:
        super().__init__()
        self.keep, self.unit, self.times = keep, unit, list[float]()

    def train(
        self,
        phase: str,
        learner: Learner,
        steps: int,
        until: Callable[[int], bool] | None = None,
        shown: SampleSource | None = None,
    ) -> None:
        """Run the steps."""
        del until, shown
        wanted = kept_steps(steps, self.unit)
        for step in range(steps):
            start = time.perf_counter()
            learner.step(step)
            self.times.append(time.perf_counter() - start)
            if step + 1 in wanted:
                self.keep(learner, step + 1, sum(self.times))


def method_of(name: str, seconds: float, teacher: Teacher) -> Any:
    """Return the method at its own settings, with as many steps as fit into the time."""
    trial = Clock(lambda learner, step, spent: None, 1)
    METHODS[name](steps=MEASURED_STEPS).fit(teacher, trial)
    return METHODS[name](steps=max(1, int(seconds / statistics.median(trial.times))))


def drawn(source: Any, count: int) -> np.ndarray:
    """Return up to `count` images as the network takes them, float32 [n, C, H, W]."""
    return torch.cat([batch.images.float().cpu() for batch in source.sample(count)]).numpy()


def synthesise(job: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Fit a method within a time and keep images of several moments."""
    begin = time.perf_counter()
    method = method_of(job["source"], job["seconds"], teacher)
    unit = -(-method.steps // method.batches) if isinstance(method, Inversion) else 1
    kept: list[dict[str, Any]] = []

    def keep(learner: Any, step: int, seconds: float) -> None:
        path = Path(job["folder"]) / f"images-{job['source']}-{step}.npy"
        images = drawn(learner, job["images"])
        np.save(path, images)
        kept.append({"step": step, "seconds": round(seconds, 2), "images": len(images), "path": str(path)})

    run = Clock(keep, unit)
    source = method.fit(teacher, run).source
    peak = peak_mebibytes()
    rate = None
    if not isinstance(method, Inversion):  # else each further image costs what the first did
        start = time.perf_counter()
        rate = round(len(drawn(source, RATE_IMAGES)) / (time.perf_counter() - start), 1)
    settings = {"steps": method.steps, "batch_size": source.batch_size}
    facts = {"synthesis_seconds": round(sum(run.times), 2), "synthesis_peak_MiB": peak, "images_per_second": rate}
    return {**settings, **facts, "kept": kept, "job_seconds": round(time.perf_counter() - begin, 2)}


def given(job: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Keep images that cost nothing: noise, or real ones."""
    method: Any = Noise() if job["source"] == "noise" else Real(data=job["train"])
    images = drawn(method.fit(teacher, Run()).source, job["images"])
    path = Path(job["folder"]) / f"images-{job['source']}.npy"
    np.save(path, images)
    kept = [{"step": 0, "seconds": 0.0, "images": len(images), "path": str(path)}]
    return {"synthesis_seconds": 0.0, "images_per_second": None, "kept": kept}


def synthesise_by_mct(job: dict[str, Any]) -> dict[str, Any]:
    """Let MCT make its images, in its own environment."""
    path = Path(job["folder"]) / "images-mct.npy"
    asked = {"weights": job["weights"], "images": job["images"], "iterations": job["iterations"]}
    asked |= {"threads": job["threads"], "out": path}
    flags = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    command = [job["python"], str(Path(__file__).with_name("mct_images.py")), *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    kept = [{"step": facts["steps"], "seconds": facts["seconds"], "images": facts["images"], "path": str(path)}]
    return {
        "steps": facts["steps"],
        "batch_size": facts["images"],
        "synthesis_seconds": facts["seconds"],
        "synthesis_peak_MiB": facts["peak_MiB"],
        "images_per_second": None,
        "mct": facts["model-compression-toolkit"],
        "kept": kept,
    }


def batches_of(path: str, size: int = 64) -> Iterator[Batch]:
    """Stream stored images."""
    for images in torch.from_numpy(np.load(path)).split(size):
        yield Batch(images, torch.zeros(len(images), dtype=torch.int64))


def measured(teacher: Teacher, file: Path, test: DataSet) -> Evaluation:
    """Return a file's accuracy, and its agreement with the float network."""
    return evaluate(OnnxClassifier(file, threads=torch.get_num_threads()), test, teacher=teacher.network)


def by_calibration(teacher: Teacher, path: str, bits: str, file: Path, test: DataSet) -> Evaluation:
    """Quantize with stored images, write the file, and measure it."""
    student = quantize_ptq(teacher.network, lambda: batches_of(path), PTQ(bits=bits, num_samples=10**6), Run())
    write_onnx(convert(student), teacher.spec, file)
    return measured(teacher, file, test)


def quantize_by_zsq(job: dict[str, Any], teacher: Teacher, test: DataSet) -> dict[str, Any]:
    """Quantize to all widths, and find out when the images were good enough for the target."""
    kept, file = job["kept"], Path(job["folder"]) / "zsq.onnx"
    start = time.perf_counter()
    found = {bits: by_calibration(teacher, kept[-1]["path"], bits, file, test) for bits in job["bits"]}
    top1 = {bits: round(evaluation.top1 or 0, 2) for bits, evaluation in found.items()}
    result: dict[str, Any] = {
        "top1": top1,
        "agreement": {bits: round(evaluation.teacher_agreement or 0, 2) for bits, evaluation in found.items()},
        "job_seconds": round(time.perf_counter() - start, 2),
        "peak_MiB": peak_mebibytes(),
        "seconds_to_target": None,
    }
    bits, least = job["target"]
    for moment in kept:
        is_last = moment is kept[-1] and bits in top1
        reached = top1[bits] if is_last else by_calibration(teacher, moment["path"], bits, file, test).top1
        assert reached is not None
        moment["top1"] = round(reached, 2)
        if reached >= least:
            result["seconds_to_target"] = moment["seconds"]
            break
    return result | {"curve": [{k: v for k, v in moment.items() if k != "path"} for moment in kept]}


class Stored(Stateless, PoolSource):
    """Images of a file, for distillation; whatever made them, the student sees them in the same way."""

    data_free, true_labels, asks_labels = True, False, False

    def __init__(self, path: str) -> None:
        super().__init__(Run(), 64)
        self.stored = torch.from_numpy(np.load(path))
        self.labels = torch.zeros(len(self.stored), dtype=torch.int64)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """See `PoolSource.images`."""
        return self.stored[rows]


def distil_by_zsq(job: dict[str, Any], teacher: Teacher, test: DataSet) -> dict[str, Any]:
    """Distil at the target's width with the images of each kept moment: what more time for making them would bring."""
    bits, _ = job["target"]
    settings, file = QAT(bits=bits, steps=job["distill_steps"]), Path(job["folder"]) / "zsq-qat.onnx"
    curve = []
    for moment in job["kept"]:
        start, source = time.perf_counter(), Stored(moment["path"])
        images = partial(source.sample, len(source.labels))
        student = quantize_ptq(teacher.network, images, settings, Run(), learnable=True)
        distill(student, teacher.network, source, settings, Run())
        spent = round(time.perf_counter() - start, 2)
        write_onnx(convert(student), teacher.spec, file)
        top1 = round(evaluate(OnnxClassifier(file, threads=torch.get_num_threads()), test).top1 or 0, 2)
        known = {key: value for key, value in moment.items() if key != "path"}
        curve.append({**known, "distill_seconds": spent, "top1": top1})
    last = curve[-1]
    seconds = {"job_seconds": last["distill_seconds"], "peak_MiB": peak_mebibytes()}
    return {"top1": {bits: last["top1"]}, "curve": curve, **seconds}


def run_by_zsq(job: dict[str, Any], teacher: Teacher, test: DataSet) -> dict[str, Any]:
    """Do what `zsq quantize --recipe recipes/quick.toml` does: the generator goes on learning while it teaches."""
    bits, _ = job["target"]
    settings, run = resolve(recipe=QUICK, bits=bits), Run()
    assert isinstance(settings.quantizer, QAT)
    file = Path(job["folder"]) / "zsq-live.onnx"
    start = time.perf_counter()
    surrogate = settings.method.fit(teacher, run, distill_steps=settings.distill_steps)
    fitted = round(time.perf_counter() - start, 2)
    images = partial(surrogate.source.sample, settings.quantizer.num_samples)
    student = quantize_ptq(surrogate.network, images, settings.quantizer, run, learnable=True)
    distill(student, teacher.network, surrogate.source, settings.quantizer, run)
    spent = round(time.perf_counter() - start - fitted, 2)
    write_onnx(convert(student), teacher.spec, file)
    top1 = round(evaluate(OnnxClassifier(file, threads=torch.get_num_threads()), test).top1 or 0, 2)
    moment = {"step": settings.method.steps, "seconds": fitted, "distill_seconds": spent, "top1": top1}
    seconds = {"synthesis_seconds": fitted, "job_seconds": spent, "peak_MiB": peak_mebibytes()}
    return {"top1": {bits: top1}, "curve": [moment], **seconds}


def run_default(job: dict[str, Any], teacher: Teacher, test: DataSet) -> dict[str, Any]:
    """Do what `zsq quantize NET --bits 8` does, files and check included."""
    out = Path(job["folder"]) / "zsq-default"
    asked = {"weights": job["weights"], "bits": "8", "out": out} | ({"resize": job["resize"]} if job["resize"] else {})
    flags = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "zsq", "quantize", job["model"], *flags, "--overwrite"], check=True)
    spent = time.perf_counter() - start
    found = measured(teacher, out / "model.onnx", test)
    fit = json.loads((out / "result.json").read_text())["seconds_by_phase"]["fit"]
    return {
        "top1": {"8": round(found.top1 or 0, 2)},
        "agreement": {"8": round(found.teacher_agreement or 0, 2)},
        "synthesis_seconds": round(fit, 2),
        "images": "fresh",
        "job_seconds": round(spent - fit, 2),
        "peak_MiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


def quantize_by_peer(job: dict[str, Any], test: DataSet) -> dict[str, Any]:
    """Quantize to INT8 by another tool's own static quantization, and measure its file."""
    folder = Path(job["folder"])
    source, file = folder / "float.onnx", folder / f"{job['tool']}.onnx"
    images = np.load(job["kept"][-1]["path"])
    start = time.perf_counter()
    if job["tool"] == "nncf":
        if reason := quantize_by_nncf(source, images, file):
            return {"skipped": reason}
    else:
        singles = (image[None] for image in images)
        quantize_by_onnxruntime(source, singles, file, unsigned=job["tool"] == "onnxruntime-uint8")
    seconds = round(time.perf_counter() - start, 2)
    top1 = evaluate(OnnxClassifier(file, threads=torch.get_num_threads()), test).top1
    return {"top1": {"8": round(top1 or 0, 2)}, "job_seconds": seconds, "peak_MiB": peak_mebibytes()}


def quantize_by_nncf(source: Path, images: np.ndarray, path: Path) -> str:
    """Quantize a float file by NNCF at its defaults; return why not, where it cannot be done."""
    os.environ["NNCF_CI"] = "1"  # it sends no usage statistics then
    try:
        import nncf
    except ImportError as error:
        return f"pip install nncf: {error}"
    feeds = [{"images": image[None]} for image in images]
    try:
        model = nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds))
    except (RuntimeError, ValueError, nncf.ValidationError) as error:
        return f"nncf {nncf.__version__}: {str(error).strip().splitlines()[0]}"
    onnx.save(model, str(path))
    return ""


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job."""
    torch.set_num_threads(job["threads"])
    teacher = load_teacher(job["model"], weights=job["weights"], resize=job["resize"])
    if job["kind"] == "images":
        if job["source"] == "mct":
            return synthesise_by_mct(job)
        return synthesise(job, teacher) if job["source"] in METHODS else given(job, teacher)
    if job["kind"] == "float":
        write_float(teacher, Path(job["folder"]) / "float.onnx")
        return {}
    test = open_dataset(job["test"], teacher.spec, limit=job["test_images"])
    own = {"zsq": quantize_by_zsq, "zsq-qat": distil_by_zsq, "zsq-live": run_by_zsq, "zsq-default": run_default}
    if job["tool"] in own:
        return own[job["tool"]](job, teacher, test)
    return quantize_by_peer(job, test)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".done").write_text(json.dumps(work(json.loads(path.read_text()))))

"""What agreement of float and integer network on fresh samples says of their agreement on real images.

    python benchmarks/agreement.py NETWORK --weights FILE --data SET --fits DIR [DIR ...]

NETWORK is as for `zsq quantize`, and each DIR holds a fitted generator: a run, or `fits/.../seed0` of a comparison.
Each is calibrated to several widths; the simulation stands for the file, which computes the same. Appends a line a
generator to benchmarks/results/agreement.jsonl.
"""

import argparse
from pathlib import Path

import torch
from records import append
from timing import hardware

from zsq import PTQ, load_teacher
from zsq.data.datasets import open_dataset
from zsq.evaluation.accuracy import Predict, evaluate_many
from zsq.quantization.ptq import quantize_ptq
from zsq.runs.fitted import FittedRun
from zsq.runs.stages import AGREEMENT_IMAGES, FreshSamples
from zsq.training.loop import Run

WIDTHS = ("8", "6", "5", "4", "3", "2")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("network")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--fits", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    teacher = load_teacher(options.network, weights=options.weights)
    data = open_dataset(options.data, teacher.spec, limit=options.limit)
    for folder in options.fits:
        fitted = FittedRun.open(folder, teacher)
        surrogate = fitted.method.fit(teacher, Run(seed=0), fitted=fitted.state)
        rows = []
        for width in WIDTHS:
            settings = PTQ(bits=width)
            images = lambda count=settings.num_samples, source=surrogate.source: source.sample(count)  # noqa: E731
            student = quantize_ptq(surrogate.network, images, settings, Run())
            networks: dict[str, Predict] = {"float": teacher.network, "student": student.eval()}
            on_samples = evaluate_many(
                networks, FreshSamples(surrogate.source, AGREEMENT_IMAGES), teacher=teacher.network
            )
            on_data = evaluate_many(networks, data, teacher=teacher.network)
            row = {
                "bits": width,
                "samples": on_samples["student"].teacher_agreement,
                "recognised": on_samples["float"].top1,
                "real": on_data["student"].teacher_agreement,
                "top1": on_data["student"].top1,
                "float_top1": on_data["float"].top1,
            }
            rows.append(row)
            print(folder, row, flush=True)
        facts = {"network": teacher.name, "method": fitted.method.name, "fit": "/".join(folder.parts[-2:])}
        append("agreement", {**hardware(torch.device("cpu")), **facts, "images": data.num_images, "widths": rows})


if __name__ == "__main__":
    main()

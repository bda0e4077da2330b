"""The whole of zsq on the bundled digits network: one generator, three widths, two quantizers, one table.

    python examples/demo.py [--out runs/demo]

Noise and real images take the generator's place in calibration, for comparison; every figure is the ONNX file's.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

import zsq
from zsq.reports.text_tables import percent, table
from zsq.runs.console import say_line

FIT_STEPS, DISTILL_STEPS = 2000, 400


def quantize(
    teacher: zsq.Teacher,
    out: Path,
    quantizer: str,
    bits: str,
    method: str,
    first: Path | None,
) -> zsq.Result:
    """Run one cell of the table; cells of zscgan share the generator of the first."""
    settings = ["quantizer.num_samples=1000"]
    settings += [f"quantizer.steps={DISTILL_STEPS}"] if quantizer == "qat" else []
    if method == "real":
        settings.append("method.data=digits:train")
    elif method == "zscgan" and first is None:
        settings.append(f"method.steps={FIT_STEPS}")
    return zsq.quantize(
        teacher,
        out=out,
        bits=bits,
        method=method,
        quantizer=quantizer,
        settings=tuple(settings),
        from_run=first if method == "zscgan" else None,
        data="digits",
        overwrite=True,
    )


def main() -> None:
    """Fill the table and print it."""
    torch.set_num_threads(1)  # a second one brings so small a network nothing, and waits where a core is busy
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    out = parser.parse_args().out
    begin = time.perf_counter()
    teacher = zsq.load_teacher("digits")
    first: Path | None = None
    rows = []
    for quantizer in ("ptq", "qat"):
        for bits in ("8", "6", "4"):
            found = {}
            for method in ("zscgan", "noise", "real") if quantizer == "ptq" else ("zscgan",):
                folder = out / f"{quantizer}{bits}-{method}"
                say_line(f"\n== INT{bits}, {quantizer}, {method}: {folder}")
                found[method] = quantize(teacher, folder, quantizer, bits, method, first).record
                first = first or folder
            ours = found["zscgan"]
            rows.append(
                [
                    f"INT{bits} {'DF-PTQ' if quantizer == 'ptq' else 'DF-QAT'}",
                    f"{ours.float_top1:.2f}",
                    *(percent(found[m].quantized_top1 if m in found else None) for m in ("zscgan", "noise", "real")),
                    f"{ours.artifacts['model.onnx'].bytes / 1024:.0f}",
                    f"{ours.seconds:.0f}",
                ]
            )
    columns = ("digits, 899 test images", "float", "zscgan", "noise", "real", "KiB", "s")
    console = Console()
    console.print(table("Top-1 in % of model.onnx, by what stood in for the training data", columns, rows))
    console.print(f"Runs: {out} (model.onnx, report.html, result.json in each). {time.perf_counter() - begin:.0f} s.")
    console.print(f"Next: zsq quantize YOUR_NETWORK ... (zsq quantize --help); open {first}/report.html in a browser.")


if __name__ == "__main__":
    main()

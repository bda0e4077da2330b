"""Let atheris look for bytes that a reader does not expect: coverage-guided, from a whole file.

    python benchmarks/fuzz.py a.npz RUN --seconds 120      # RUN: the folder of a finished run of digits

READER is a file name of `benchmarks/trials.py`, such as a.png, metadata.csv, a.npz, a.pth, generator.safetensors,
model.onnx, settings.toml or result.json. A fault that is not one of zsq's own ends the search, and its bytes are
written to crash-...: they belong into tests/faults/test_hostile.py. Needs atheris, which zsq does not bring. Files that
compiled libraries read (safetensors, onnx, images) are searched without knowing their coverage.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path

INSTRUMENTED = ["zsq.data", "zsq.models.weights", "zsq.runs", "zipfile", "csv", "tomllib"]


def main() -> None:
    """Search until the time is up; the process then ends by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader")
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):  # the first import of these modules
        trials = importlib.import_module("trials")
        zsq_error = importlib.import_module("zsq.errors").ZsqError
    folder = Path(tempfile.mkdtemp(prefix="zsq-fuzz-"))
    seeds, corpus = trials.seeds_of(asked.run), folder / "corpus"
    for path, content in ((folder / "files" / "a.png", seeds["a.png"]), (corpus / "seed", seeds[asked.reader])):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    path = folder / "files" / asked.reader

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(zsq_error), contextlib.redirect_stderr(io.StringIO()):
            trials.READERS[path.suffix](path)

    bounds = [f"-max_total_time={asked.seconds}", "-rss_limit_mb=3000", "-timeout=30", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *bounds, str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

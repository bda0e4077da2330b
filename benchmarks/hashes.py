"""List the canonical hashes of the files of finished runs: equal lists mean equal files.

    zsq compare recipes/demo.toml --out runs/demo
    python benchmarks/hashes.py runs/demo --out benchmarks/results/hashes-demo.json

Each run's record holds the hashes. They depend on the versions of the libraries and on the processor, so that only
lists made on one machine are compared.
"""

import argparse
import json
from pathlib import Path


def hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Return the sha256 of each artifact by run and name."""
    found = {}
    for path in sorted(folder.rglob("result.json")):
        artifacts = json.loads(path.read_text())["artifacts"]
        found[str(path.parent.relative_to(folder))] = {name: artifacts[name]["sha256"] for name in sorted(artifacts)}
    return found


def main() -> None:
    """Print the hashes, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON file to write; unset, standard output")
    asked = parser.parse_args()
    found = hashes(asked.folder)
    versions = [json.loads(path.read_text())["versions"] for path in asked.folder.rglob("result.json")]
    text = json.dumps({"versions": versions[0] if versions else {}, "runs": found}, indent=1) + "\n"
    if asked.out is None:
        print(text, end="")
    else:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()

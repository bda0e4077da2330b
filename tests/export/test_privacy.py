"""Nothing leaves the machine: a run in a network namespace of its own looks up no host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAP = Path(__file__).parents[1] / "lookups.py"
MOUNT = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
RUN = """
import sys, time
import numpy as np
from zsq.export.onnx_runtime import OnnxClassifier
OnnxClassifier(sys.argv[1], threads=1)(np.zeros((1, 3, 8, 8), np.float32))
time.sleep(12)  # the runtime reports eight seconds after its start
"""


def looked_up(folder: Path, *command: str) -> str:
    """Return what is printed by a command in namespaces where lookups are noted."""
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    trapped = ["unshare", "-Urnm", "bash", "-c", MOUNT, str(folder / "resolv.conf"), sys.executable, str(TRAP)]
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([*trapped, *command], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_file_that_runs_looks_up_no_host(files: Path, tmp_path: Path) -> None:
    ask = (
        "import socket; print(socket.getaddrinfo.__name__)\ntry: socket.getaddrinfo('a.example', 80)\nexcept OSError: 0"
    )
    try:
        assert looked_up(tmp_path, sys.executable, "-c", ask) == "looked up: a.example"
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs unshare with user, network and mount namespaces: {error}")
    assert looked_up(tmp_path, sys.executable, "-c", RUN, str(files / "8.onnx")) == "looked up:"


@pytest.mark.slow
def test_a_choice_of_the_user_stays() -> None:
    code = "import zsq.export.verify, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for chosen, expected in ((None, "1"), ("0", "0")):
        environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        environment |= {} if chosen is None else {"ORT_DISABLE_TELEMETRY": chosen}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == expected

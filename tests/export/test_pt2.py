import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converted import converted_network, simulate
from torch import Tensor


@pytest.mark.slow
def test_pt2_gives_the_same_logits_in_a_fresh_process(files: Path, images: Tensor, tmp_path: Path) -> None:
    expected = simulate(converted_network())(images)
    torch.save((images, expected), tmp_path / "expected.pt")
    program = (
        "import sys, torch, torch.ao.quantization.fx._decomposed\n"
        "images, expected = torch.load(sys.argv[2])\n"
        "(logits,) = torch.export.load(sys.argv[1]).module()(images)\n"
        "assert torch.equal(logits, expected)\n"
    )
    command = [sys.executable, "-c", program, str(files / "8.pt2"), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

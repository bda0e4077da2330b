from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from zsq.errors import InputError
from zsq.export.content_hash import canonical_sha256


@pytest.mark.slow
def test_canonical_hash_sees_content_only(files: Path, tmp_path: Path) -> None:
    model = onnx.load(files / "8.onnx")
    model.producer_version, model.graph.node[0].doc_string = "elsewhere", "/somewhere"
    onnx.save(model, tmp_path / "noted.onnx")
    assert canonical_sha256(tmp_path / "noted.onnx") == canonical_sha256(files / "8.onnx")
    weights = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.tensor(1.0)}
    save_file(weights, tmp_path / "one.safetensors", metadata={"date": "today"})
    save_file(dict(reversed(weights.items())), tmp_path / "two.safetensors")
    save_file(weights | {"a": torch.tensor(2.0)}, tmp_path / "other.safetensors")
    one, two, other = (canonical_sha256(tmp_path / f"{name}.safetensors") for name in ("one", "two", "other"))
    assert one == two != other
    with pytest.raises(InputError, match=r"cannot hash '\.txt' files"):
        canonical_sha256(tmp_path / "notes.txt")

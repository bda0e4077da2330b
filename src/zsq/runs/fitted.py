"""A finished fit that another run reuses."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zsq.errors import InputError
from zsq.methods import Method
from zsq.models.teacher import Teacher
from zsq.runs.settings import resolve
from zsq.runs.settings_file import SETTINGS, of_version, shape_of, stored_spec
from zsq.runtime.checksums import file_sha256
from zsq.runtime.files import load_tensors

GENERATOR = "generator.safetensors"


@dataclass(frozen=True, slots=True)
class FittedRun:
    """What a run's folder holds of its fit."""

    folder: Path
    method: Method
    state: dict[str, Tensor]
    sha256: str
    """Of the file, so that a resumed run can tell whether it is the one that it was started with."""

    @classmethod
    def open(cls, folder: Path, teacher: Teacher) -> "FittedRun":
        """Read the generator of a run.

        Raises:
            InputError: the folder holds no generator, a damaged one, or one of another teacher.
        """
        path = folder / GENERATOR
        if not path.is_file():
            raise InputError(f"{folder} holds no {GENERATOR}; --from takes a folder whose run fitted one.")
        state, meta = load_tensors(path)
        if meta.get("weights_sha256") != teacher.weights_sha256:
            raise InputError(
                f"{path} was fitted to other weights (sha256 {meta.get('weights_sha256', 'unknown')[:12]}) "
                f"than those of '{teacher.name}' ({teacher.weights_sha256[:12]})."
            )
        with of_version(folder / SETTINGS):
            was, method = stored_spec(folder / SETTINGS), resolve(recipe=folder / SETTINGS).method
        if shape_of(was) != shape_of(teacher.spec):
            raise InputError(
                f"{path} was fitted to images of {shape_of(was)}; '{teacher.name}' takes {shape_of(teacher.spec)}."
            )
        return cls(folder, method, state, file_sha256(path))

"""The record of a run: what `result.json` holds, written and read by one type."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zsq.errors import InputError
from zsq.evaluation.accuracy import Evaluation
from zsq.evaluation.measures import Measure
from zsq.export.profile import Profile
from zsq.export.verify import Verification
from zsq.quantization.coverage import Coverage
from zsq.quantization.layer_report import LayerReport
from zsq.runs.settings_file import SETTINGS
from zsq.runtime.checksums import changed, file_sha256, sealed_values, unsealed_values
from zsq.runtime.files import replacing
from zsq.targets import target_of

SCHEMA = 1
"""Number of this form. Files without one are of zsq 0.1, whose fields are the same."""

RECORD = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file of the run."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its canonical content: equal for equal networks, whenever and wherever they were written."""
    file_sha256: str = field(default="", compare=False)
    """Of its bytes, by which damage is seen before the file is used; empty in older records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAgreement:
    """How often the file and the float network name the same class for samples that calibrated nothing."""

    num_images: int
    """Samples that both classified."""
    num_classes: int
    """Classes that the float network sees in them; 0 where it gives something else than one vector of logits."""
    teacher_agreement: float | None
    """Percent of them; None where they show too few classes to tell anything."""
    measures: tuple[Measure, ...] = ()
    """Agreement in the measures of each output, where the network gives something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds for one image on one thread, medians; measured once and briefly, so that other load shows."""

    file: float
    """Of the file in its target's runtime here."""
    float_file: float | None = None
    """Of the float network as an ONNX file, its batch norms folded; None where that was not measured."""
    float_bytes: int | None = None
    """Size of that file."""
    float_runtime: str = ""
    """Where it ran: `openvino` for files that run there, else `onnxruntime`."""
    note: str = ""
    """Why it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run was, made and measured; percentages from 0 to 100, times in seconds."""

    schema: int = SCHEMA
    """Number of the record's form."""
    model: str
    """The network as it was named."""
    weights: str
    """`bundled`, the file's name, `zoo`, `factory`, `random` or `memory`."""
    weights_sha256: str
    """Hash over the network's state, whatever file it came from."""
    method: str
    """What stood in for the training data."""
    data_free: bool
    """Whether no real image was used."""
    quantizer: str
    """`ptq` or `qat`."""
    bits: str
    """Widths of weights and activations, such as `4`, `W4A8` or `mixed W4.12A8`."""
    target: str = "onnxruntime"
    """Runtime that the file is for."""
    activation_scope: str
    """`all` activations, or those in front of `layers` alone."""
    range_rule: str
    """How activation ranges were chosen; `batch-norm` where they came from statistics."""
    kd_weight: float | None = None
    """Weight of the teacher's answers against the labels in distillation; None without distillation."""
    seed: int
    """Of every random draw."""
    data: str | None = None
    """Images on which accuracy was measured; None where there were none."""
    verification: Verification
    """The file against the simulation."""
    coverage: Coverage | None = None
    """What is quantized, and what stays float, by name; None in older records."""
    num_eval_images: int = 0
    """Images on which accuracy was measured."""
    evaluation: dict[str, Evaluation] = field(default_factory=dict)
    """Accuracy of the `float` network, the `quantized` file and the `simulated` network; empty without data."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """The run's files by name."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tables `method` and `quantizer` as in settings.toml."""
    versions: dict[str, str] = field(default_factory=dict)
    """What results depend on."""
    samples: SampleAgreement | None = None
    """Agreement on fresh samples; None where the method makes no images."""
    label_recognition: float | None = None
    """Percent of the samples in which the float network sees the label they were made for; None without labels."""
    num_calibration_images: int = 0
    """Images from which ranges were chosen."""
    distillation_undone: bool = False
    """Whether distillation took the student away from the teacher, so that the file is what calibration gave."""
    layers: tuple[LayerReport, ...] = ()
    """What rounding does to each layer, on a few samples."""
    latency: Latency | None = None
    """How long the file takes for one image, on the machine of the run."""
    profile: Profile | None = None
    """What the target's runtime does with the file: its kernels, in integers or in float."""
    seconds: float = 0.0
    """Wall-clock time of the run."""
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """Wall-clock time by phase."""

    @property
    def file(self) -> str:
        """Name of the target's file."""
        return target_of(self.target).file

    @property
    def float_top1(self) -> float | None:
        """Top-1 of the float network in percent; None without data."""
        return self._top1("float")

    @property
    def quantized_top1(self) -> float | None:
        """Top-1 of the file in percent; None without data."""
        return self._top1("quantized")

    @property
    def simulated_top1(self) -> float | None:
        """Top-1 of the simulation in percent; None without data."""
        return self._top1("simulated")

    @property
    def teacher_agreement(self) -> float | None:
        """Percent of the images on which the file and the float network name the same class; None without data."""
        return self.evaluation["quantized"].teacher_agreement if self.evaluation else None

    @property
    def runtime_agreement(self) -> float:
        """Percent of the images on which the file, run literally, and the simulation name the same class."""
        return self.verification.agreement_literal

    def _top1(self, name: str) -> float | None:
        return self.evaluation[name].top1 if name in self.evaluation else None

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `result.json`: all fields, and what follows from them."""
        content = {name: getattr(self, name) for name in self.__slots__}
        content["verification"] = asdict(self.verification)
        content["coverage"] = None if self.coverage is None else self.coverage.as_dict()
        content["evaluation"] = {name: value.as_dict() for name, value in self.evaluation.items()}
        content["artifacts"] = {name: asdict(value) for name, value in self.artifacts.items()}
        content["layers"] = [asdict(layer) for layer in self.layers]
        content["latency"] = None if self.latency is None else asdict(self.latency)
        content["profile"] = None if self.profile is None else asdict(self.profile)
        content["samples"] = None if self.samples is None else asdict(self.samples)
        derived = ("float_top1", "quantized_top1", "simulated_top1", "teacher_agreement", "runtime_agreement")
        return content | {name: getattr(self, name) for name in derived}

    def write(self, folder: Path) -> None:
        """Write `result.json` to a run's folder."""
        with replacing(folder / RECORD) as temporary:
            temporary.write_text(json.dumps(sealed_values(self.as_dict()), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read the record of a run's folder; what this version does not know is left aside.

        Raises:
            InputError: the folder holds no finished run, or the file is damaged or of a newer zsq.
        """
        path = folder / RECORD
        if not path.is_file():
            raise InputError(f"{folder} holds no result.json; the run has not finished: --resume continues it.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no record.")
        content = unsealed_values(content)
        if content is None:
            raise InputError(changed(path, "restore it, or quantize again with --overwrite"))
        schema = content.setdefault("schema", 0)
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(f"{path} is of a newer zsq (schema {schema}; this one reads up to {SCHEMA}); update zsq.")
        try:
            return _RECORD.validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{path} is not a record that zsq has written: {place}: {first['msg']}.") from error


def verified(path: Path) -> Path:
    """Return a file of a finished run's folder, checked against the record beside it; others as they are.

    Raises:
        InputError: it is not the file that the run has written, or the record is damaged.
    """
    folder = path.parent
    if not path.is_file() or not (folder / RECORD).is_file():
        return path
    try:
        known = Record.read(folder).artifacts.get(path.name)
    except InputError:
        if (folder / SETTINGS).is_file():
            raise
        return path  # some other program's result.json
    if known is not None and known.file_sha256 and known.file_sha256 != file_sha256(path):
        raise InputError(changed(path, f"{folder / RECORD} has the checksum; restore it, or quantize again"))
    return path


_RECORD = TypeAdapter(Record)

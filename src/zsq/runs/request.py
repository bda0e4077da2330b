"""What is asked of a run: one frozen object that command line, recipe, run folder and Python fill and pass on whole."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from torch import nn
from tyro.conf import OmitArgPrefixes, Positional, Suppress, UseAppendAction, arg

from zsq.errors import InputError
from zsq.methods import Method
from zsq.models.network import Network
from zsq.models.options import option, text
from zsq.models.teacher import Teacher, load, teacher_from_module
from zsq.quantization import PTQ
from zsq.runs.docstrings import field_texts
from zsq.runs.interrupt import told_how_to_resume
from zsq.runs.stored_network import StoredNetwork
from zsq.runtime.observer import Observer
from zsq.types import ImageSpec

Asked = TypeVar("Asked")
Parameters = ParamSpec("Parameters")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedNetwork(Network):
    """A network to quantize, or that of another run."""

    model: Annotated[Positional[str], arg(help_behavior_hint="")] = ""
    """digits, shapes_mobilenet, pytorchcv:NAME, timm:NAME, torchvision:NAME, FILE.py:FACTORY or MODULE:FACTORY.
    Unset, that of --resume, --from or --recipe."""


@dataclass(frozen=True, slots=True)
class Request:
    """What every run is asked: the network, what stands in for its training data, how long it may take, and where."""

    network: Annotated[
        Network | Teacher | nn.Module | str | None, OmitArgPrefixes, arg(name="", constructor=AskedNetwork)
    ] = None
    """A `Teacher` (see `load_teacher`), a module in memory with its `spec`, a `Network`, or a name such as `digits`;
    None takes that of the run that is resumed, built on (`from_run`) or repeated (`recipe`)."""
    spec: Suppress[ImageSpec | None] = None
    """What a module in memory takes and gives."""
    _: KW_ONLY
    out: Annotated[str | Path | None, text("DIR", Path), option("DIR")] = None
    """Folder of what is written; unset without MODEL, one beside that of --from or --recipe."""
    method: Annotated[str | Method | None, text("NAME"), option("NAME")] = None
    """What stands in for the training data; see `zsq methods`. Default zscgan."""
    recipe: Annotated[str | Path | None, text("FILE", Path), option("FILE")] = None
    """TOML file of settings; a run's settings.toml, without MODEL, repeats the run."""
    budget: Annotated[str | float | None, text("TIME"), option("TIME")] = None
    """Wall-clock time to fill, such as 90s, 5m or 1h; 10m without recipe and chosen steps."""
    settings: Annotated[
        tuple[str, ...] | Mapping[str, Any],
        UseAppendAction,
        arg(name="set", metavar="SECTION.NAME=VALUE", constructor=tuple[str, ...]),
    ] = ()
    """A setting, such as method.steps=500 or quantizer.range_rule=minmax; may be repeated. `zsq methods` lists them."""
    from_run: Annotated[str | Path | None, text("DIR", Path), option("DIR", name="from")] = None
    """Use the generator that another run has fitted, and without MODEL its network and images."""
    seed: Annotated[int | None, option("N")] = None
    """Of every random draw; unset, that of the recipe or of the run that is resumed, else 0."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    log: Annotated[Literal["csv", "tensorboard"] | None, option("csv|tensorboard")] = None
    """Write losses, learning rates and pictures of samples for another tool while the run goes on."""
    resume: bool = False
    """Continue what --out holds; in place of MODEL, --resume DIR."""
    overwrite: bool = False
    """Discard what --out holds."""
    observer: Suppress[Observer | None] = None
    """Is told how far the work is; None shows it on stderr."""
    quiet: bool = False
    """Show no progress, notices or warnings; the logger `zsq` has them all the same."""

    def __post_init__(self) -> None:
        assignments(self.settings)

    @property
    def folder(self) -> Path:
        """`out`."""
        assert self.out is not None
        return Path(self.out)

    @property
    def recipe_path(self) -> Path | None:
        """`recipe`."""
        return None if self.recipe is None else Path(self.recipe)

    @property
    def assignments(self) -> tuple[str, ...]:
        """`settings`, each as `method.steps=500`."""
        return assignments(self.settings)

    @property
    def made(self) -> str:
        """What is made, for the name of its folder."""
        return "again"

    def teacher(self) -> Teacher:
        """Return the float network.

        Raises:
            InputError: it cannot be loaded, or is a module without its `spec`.
        """
        network = self.network
        if isinstance(network, str):
            network = Network(model=network)
        if isinstance(network, StoredNetwork):
            return network.load()
        if isinstance(network, Network):
            return load(network)
        if isinstance(network, Teacher):
            return network
        assert network is not None
        if self.spec is None:
            raise InputError("a module in memory needs its ImageSpec: zsq.quantize(module, spec, ...).")
        return teacher_from_module(network, self.spec)


def assignments(settings: tuple[str, ...] | Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as assignments; a mapping of `method.steps` to 500 is as good.

    Raises:
        InputError: it is one text, whose letters would be taken for assignments.
    """
    if isinstance(settings, str):
        raise InputError(f"settings is the text '{settings}'; give a tuple of them: settings=('{settings}',).")
    if isinstance(settings, Mapping):
        return tuple(f"{name}={value}" for name, value in settings.items())
    return tuple(settings)


def takes(
    kind: Callable[Parameters, Asked],
) -> Callable[[Callable[[Asked], Outcome]], Callable[Parameters, Outcome]]:
    """Let a function of a request take what makes one: its signature is that of `kind`, its help names the fields.

    `quantize = takes(QuantizeRequest)(quantize_request)`: the name goes without the suffix.
    """

    def decorate(work: Callable[[Asked], Outcome]) -> Callable[Parameters, Outcome]:
        @functools.wraps(work)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Outcome:
            request = kind(*args, **kwargs)
            with told_how_to_resume(getattr(request, "out", None), call.__name__):
                return work(request)

        signature = inspect.signature(kind)
        returned = inspect.signature(work).return_annotation
        call.__name__ = call.__qualname__ = work.__name__.removesuffix("_request")
        parameters = [p.replace(annotation=_plain(p.annotation)) for p in signature.parameters.values()]
        call.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": returned}
        assert isinstance(kind, type)
        texts = field_texts(kind)
        lines = [f"    {name}: {texts[name]}" for name in signature.parameters]
        summary, blank, rest = inspect.cleandoc(work.__doc__ or "").partition("\n\n")
        call.__doc__ = "\n".join([summary, "", "Args:", *lines]) + blank + rest
        return call

    return decorate


def _plain(annotation: Any) -> Any:
    """Return a type without what the command line needs to know of it."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


@dataclass(frozen=True, slots=True)
class QuantizeRequest(Request):
    """What `quantize` is asked."""

    _: KW_ONLY
    quantizer: Annotated[str | PTQ | None, text("NAME"), option("NAME")] = None
    """ptq (calibration only) or qat (distillation as well). Default ptq."""
    bits: Annotated[str | int | None, text("N|WnAn"), option("N|WnAn")] = None
    """8, 6, 4, any width from 2 to 8, W4A8, or a file such as `zsq allocate` writes. Default 8."""
    target: Annotated[str | None, text("NAME"), option("NAME")] = None
    """Runtime that the file is for: onnxruntime (default), openvino, litert, executorch or
    tensorrt."""
    pixels: Annotated[Literal["nchw", "nhwc"] | None, option("nchw|nhwc")] = None
    """Let the file take uint8 pixels in this layout instead of normalized floats."""
    batch: Annotated[str | int | None, text("N|dynamic"), option("N|dynamic")] = None
    """Images that the file takes at once. Default dynamic: any number."""
    data: Annotated[str | os.PathLike[str] | None, text("SET"), option("SET")] = None
    """Images on which teacher and result are evaluated: digits, FILE.npz or a folder; without labels, agreement is."""
    class_names: Annotated[str | Path | tuple[str, ...] | None, text("FILE", Path), option("FILE")] = None
    """File with the name of one class a line, in the network's order: which class a folder of --data is."""
    decode: Annotated[str | None, option("FILE.py:FUNCTION")] = None
    """What reads boxes from the outputs, or MODULE:FUNCTION; see `zsq evaluate`. The .npz of --data holds `boxes`."""
    checkpoint_every: Annotated[int | None, option("N")] = None
    """Steps between checkpoints; unset, every 30 seconds, or in 2 % of the time."""


@dataclass(frozen=True, slots=True)
class SynthesizeRequest(Request):
    """What `synthesize` is asked."""

    _: KW_ONLY
    count: int = 1000
    """Number of images."""
    class_names: Annotated[str | Path | tuple[str, ...] | None, text("FILE", Path), option("FILE")] = None
    """File with the name of one class a line, in the network's order, to be written beside the images."""

    @property
    def made(self) -> str:
        """What is made, for the name of its folder."""
        return "images"


def parse_widths(value: str) -> tuple[int, ...]:
    """Read `2,4,8`.

    Raises:
        InputError: it is something else.
    """
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise InputError(f"--widths is '{value}'; whole numbers separated by commas are expected.") from None


@dataclass(frozen=True, slots=True)
class AllocateRequest(Request):
    """What `allocate` is asked."""

    _: KW_ONLY
    average: Annotated[float | None, option("BITS")] = None
    """Most bits a weight, on average over all weights."""
    size: Annotated[str | int | None, text("BYTES"), option("BYTES")] = None
    """Instead: most bytes of all weights, packed, such as 100KB or 64KiB. The files themselves store one a byte."""
    widths: Annotated[tuple[int, ...], text("A,B,C", parse_widths), option("A,B,C")] = (2, 4, 8)
    """Widths to choose from, from 2 to 8."""
    activation: int = 8
    """Width of the activations; it is written down, sensitivities are of weights alone."""
    num_images: Annotated[int, arg(name="images")] = 256
    """Images on which sensitivities are measured."""

    @property
    def made(self) -> str:
        """What is made, for the name of its folder."""
        return "bits"

"""What a run takes from the folder that it continues, builds on or repeats, so that nobody says it again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from zsq.errors import InputError
from zsq.models.network import Network
from zsq.runs.fitted import GENERATOR
from zsq.runs.recipe_file import read_toml
from zsq.runs.request import Request
from zsq.runs.settings_file import SETTINGS
from zsq.runs.stored_network import is_run, located, started_in, stored_network
from zsq.runtime.checksums import file_sha256

Asked = TypeVar("Asked", bound=Request)

NAMING = ("method", "quantizer", "bits", "target")
"""What is asked anew of another run's network and names the folder of the new run."""


def completed(request: Asked) -> Asked:
    """Return a request with all that the folder of --resume, --from or --recipe knows and nobody has said.

    A request that names its network is left alone.

    Raises:
        InputError: nothing says which network it is or where to write; or the folder's network cannot be had.
    """
    network = request.network
    name = network.model if isinstance(network, Network) else network
    if isinstance(name, str) and name and is_run(Path(name)):
        raise InputError(
            f"'{name}' is the folder of a run: --resume {name} continues it, --from {name} builds on its generator, "
            f"--recipe {Path(name) / SETTINGS} repeats it."
        )
    if reason := lacking(request):
        raise InputError(reason)
    if is_named(network):
        return request
    settings = source(request)
    assert settings is not None
    content = read_toml(settings)
    said, sealed = network if isinstance(network, Network) else None, settings != request.recipe_path
    changed: dict[str, Any] = {"network": stored_network(settings, said, sealed=sealed)}
    if request.out is None:
        changed["out"] = _beside(request, settings.parent)
    if request.from_run is None:
        changed["from_run"] = _generator(content, settings.parent)
    return replace(request, **changed, **_images(request, content))


def resumed(request: Asked) -> Asked:
    """Return a request whose folder stands in place of MODEL, as in `--resume DIR`, as one of that folder."""
    network = request.network
    if not request.resume or request.out is not None or not isinstance(network, Network):
        return request
    return replace(request, network=replace(network, model=""), out=network.model or None)


def lacking(request: Request) -> str:
    """Say what is missing of a request; empty if nothing is."""
    named, settings = is_named(request.network), source(request)
    if request.resume and request.out is not None and not named and settings is None:
        return f"{request.out} holds no run to continue."
    if not named and settings is None:
        return (
            "which network? Give MODEL (zsq models lists them), or another run: --resume DIR, --from DIR, or --recipe "
            "DIR/settings.toml."
        )
    return "where to? Give --out DIR." if request.out is None and (named or request.resume) else ""


def is_named(network: Any) -> bool:
    """Whether a request says which network it is about."""
    if isinstance(network, Network):
        return bool(network.model)
    return network is not None and not (isinstance(network, str) and not network)


def source(request: Request) -> Path | None:
    """Return the settings.toml from which a request takes what it does not say.

    Raises:
        InputError: --from or --recipe names what is no run, or no file.
    """
    if request.resume and request.out is not None and is_run(request.folder):
        return request.folder / SETTINGS
    if request.from_run is not None:
        return Path(request.from_run) / SETTINGS
    recipe = request.recipe_path
    return recipe if recipe is not None and {"teacher", "run"} <= read_toml(recipe).keys() else None


def _beside(request: Request, folder: Path) -> Path:
    """Return a folder beside that of the run that is built on or repeated, named for what is asked anew."""
    said = [value for name in NAMING if isinstance(value := getattr(request, name, None), str | int)]
    parts = [Path(str(value)).stem for value in said] or [request.made]
    named = folder if folder.name else folder.resolve()
    return named.with_name("-".join([named.name, *parts]))


def _images(request: Request, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images on which a run was evaluated, the names of its classes and what reads its boxes, where a
    request takes them."""
    facts = content.get("run", {})
    found: dict[str, Any] = {}
    if getattr(request, "data", "") is None and isinstance(data := facts.get("data"), str):
        found["data"] = located(started_in(content), data)
    if getattr(request, "class_names", "") is None and (names := facts.get("class_names")):
        found["class_names"] = tuple(names)
    if getattr(request, "decode", "") is None and isinstance(decode := facts.get("decode"), str):
        found["decode"] = located(started_in(content), decode)
    return found


def _generator(content: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the folder whose generator a run has taken over, or its own with the same; None where it fitted one."""
    facts = content.get("run", {})
    if (wanted := facts.get("generator_sha256")) is None:
        return None
    places = [Path(located(started_in(content), str(facts.get("from", "")))), folder]
    files = ((place, place / GENERATOR) for place in places)
    return next((place for place, file in files if file.is_file() and file_sha256(file) == wanted), None)

"""The network of a run's folder: which it is, where its weights lay, and whether they are still the same."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zsq.errors import InputError
from zsq.models.network import Network
from zsq.models.programs import PROGRAM
from zsq.models.teacher import Teacher, load
from zsq.runs.recipe_file import read_toml
from zsq.runs.settings_file import SETTINGS, stored_spec

IN_MEMORY = "memory"
"""Where the weights of a network come from that was given as a module."""

OWN = ("bundled", "zoo", "factory", "program")
"""Where weights come from that the network brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNetwork(Network):
    """A network as a run's folder tells it, which must have the weights of that run."""

    settings: Path
    """The run's settings.toml."""
    sha256: str
    """Of its weights."""

    def load(self) -> Teacher:
        """Return it.

        Raises:
            InputError: it is gone, or has other weights than the run was made with.
        """
        place = self.model.rpartition(":")[0] or self.model
        if place.endswith((".py", PROGRAM)) and not Path(place).is_file():
            raise InputError(f"{self.settings} is of network {self.model}, and {place} is gone; name it as MODEL.")
        if not _is_there(self.weights):
            raise InputError(
                f"{self.settings} is of the weights {self.weights} (sha256 {self.sha256[:12]}), which are gone; say "
                "where they are now: --weights FILE."
            )
        teacher = load(self)
        if teacher.weights_sha256 != self.sha256:
            of = f"'{self.model}'" if self.weights is None else self.weights
            raise InputError(
                f"{of} has other weights (sha256 {teacher.weights_sha256[:12]}) than the run of {self.settings} "
                f"({self.sha256[:12]}); give those with --weights FILE, or name the network as MODEL for another run."
            )
        return teacher


def _is_there(weights: str | None) -> bool:
    """Whether weights that are a file of the user's, or an entry of one, are where they are said to be."""
    if weights in (None, "random"):
        return True
    path = Path(str(weights))
    return path.is_file() or (":" in path.name and path.with_name(path.name.rpartition(":")[0]).is_file())


def is_run(folder: Path) -> bool:
    """Whether a folder holds the settings of a run."""
    return (folder / SETTINGS).is_file()


def stored_network(settings: Path, said: Network | None = None, *, sealed: bool = True) -> StoredNetwork:
    """Return the network of a run.

    Args:
        settings: the run's settings.toml.
        said: what is said of it anew, such as where its weights lie now.
        sealed: whether the file must be as the run wrote it; not where it serves as a recipe.

    Raises:
        InputError: the file names no network, or one that was a module in memory.
    """
    spec = stored_spec(settings, sealed=sealed)
    content = read_toml(settings)
    table, place = content["teacher"], started_in(content)
    if table.get("weights") == IN_MEMORY:
        raise InputError(
            f"{settings} is of '{table.get('model')}', a module in memory; in Python, give it with its ImageSpec."
        )
    known: dict[str, Any] = {
        "model": located(place, str(table.get("model"))),
        "weights": _weights(table, place),
        "input": spec.shape,
        "classes": spec.classes or None,
        "outputs": tuple(replace(output, shape=()) for output in spec.outputs) or None,
        "mean": spec.mean,
        "std": spec.std,
        "resize": "none" if spec.resize is None else spec.resize,
    }
    if said is not None:
        known |= {f.name: value for f in fields(Network) if (value := getattr(said, f.name)) not in (None, "")}
    return StoredNetwork(**known, settings=settings, sha256=str(table.get("weights_sha256")))


def _weights(table: Mapping[str, Any], place: Path | None) -> str | None:
    """Return where a network's weights lay, as `--weights` says it; None for its own."""
    named = table.get("weights")
    if named in (None, *OWN):
        return None
    return "random" if named == "random" else str(table.get("weights_file") or located(place, str(named)))


def started_in(content: Mapping[str, Any]) -> Path | None:
    """Return the folder in which a run was started, where its settings say so and it is another one than now."""
    found = content.get("run", {}).get("directory")
    return Path(found) if isinstance(found, str) and Path(found) != Path.cwd() else None


def located(place: Path | None, name: str) -> str:
    """Return a path as it is found from here: below the folder in which the run was started, where it lies there."""
    path, colon, rest = name.partition(":") if ".py:" in name else (name, "", "")
    return name if place is None or not (place / path).exists() else f"{place / path}{colon}{rest}"

"""What a run takes over from the one that it continues or repeats, and where it would differ from it."""

import logging
from pathlib import Path
from typing import Any

import torch

from zsq.errors import InputError
from zsq.models.teacher import Teacher
from zsq.runs.fitted import FittedRun
from zsq.runs.recipe_file import read_toml, run_tables
from zsq.runs.settings import Settings, resolve, to_tables
from zsq.runs.settings_file import SETTINGS, of_version, other_graph, read_settings, shape_of, stored_spec
from zsq.runtime import distributed
from zsq.runtime.versions import versions

logger = logging.getLogger(__name__)


def chosen_seed(seed: int | None, recipe: Path | None, folder: Path, *, resume: bool) -> int:
    """Return the seed that is asked for, else that of the run that is resumed or was written as the recipe, else 0."""
    if seed is not None:
        return seed
    stored = folder / SETTINGS
    path = stored if resume and stored.is_file() else recipe
    found = None if path is None else run_tables(path)["run"].get("seed")
    return found if isinstance(found, int) else 0


def warn_of_recipe(recipe: Path | None, teacher: Teacher, *, reuses: bool) -> None:
    """Warn where a run's settings.toml, taken as a recipe, cannot repeat that run."""
    content = {} if recipe is None else read_toml(recipe)
    was = content.get("teacher", {})
    if was.get("weights_sha256", teacher.weights_sha256) != teacher.weights_sha256:
        logger.warning(f"{recipe} is of a run of '{was.get('model')}' with other weights; its settings are taken.")
    elif "generator_sha256" in content.get("run", {}) and not reuses:
        logger.warning(f"the run of {recipe} took its generator from another run; --from DIR repeats that.")


def resumed_settings(
    folder: Path,
    wanted: Settings,
    teacher: Teacher,
    seed: int,
    fitted: FittedRun | None = None,
    device: str = "cpu",
) -> Settings:
    """Return the settings of the run that is resumed.

    Raises:
        InputError: what is asked for now differs from what that run was started with.
    """
    path = folder / SETTINGS
    content = read_settings(path)
    with of_version(path):
        stored = resolve(recipe=path)
    facts = content.get("run", {})
    differing = [
        *_differing_settings(stored, wanted),
        *_differing_network(content, folder, teacher),
        *([f"its seed is {facts.get('seed')}, not {seed}"] if facts.get("seed") != seed else []),
        *_differing_source(facts, fitted),
    ]
    if differing:
        raise InputError(f"{folder} holds a run that differs: {differing[0]}. --overwrite starts anew.")
    machine = {"device": device, "processes": distributed.processes(), "threads": torch.get_num_threads()}
    for name, now in (machine | versions()).items():
        if name in facts and facts[name] != now:
            logger.warning(f"the run was started with {name} {facts[name]}, now {now}; its files may differ in bits.")
    return stored


def _differing_settings(stored: Settings, wanted: Settings) -> list[str]:
    tables, asked = to_tables(stored), to_tables(wanted)
    found = []
    chosen = sorted(wanted.chosen, key=lambda name: (not name.endswith(".name"), name))
    for section, key in (name.split(".", 1) for name in chosen):
        if tables[section].get(key) != asked[section].get(key):
            found.append(f"{section}.{key} is {tables[section].get(key)} there, not {asked[section].get(key)}")
    return found


def _differing_network(content: dict[str, Any], folder: Path, teacher: Teacher) -> list[str]:
    was = content.get("teacher", {})
    if was.get("weights_sha256") != teacher.weights_sha256:
        return [f"its network '{was.get('model')}' had other weights"]
    spec = stored_spec(folder / SETTINGS)
    if shape_of(spec) != shape_of(teacher.spec):
        return [f"its images were {shape_of(spec)}, not {shape_of(teacher.spec)}"]
    if other_graph(content, teacher):
        return [f"its network '{was.get('model')}' had the same weights and computed something else with them"]
    return []


def _differing_source(facts: dict[str, Any], fitted: FittedRun | None) -> list[str]:
    if facts.get("generator_sha256") == (fitted.sha256 if fitted else None):
        return []
    began = "with --from another folder" if fitted else "with --from; give it again"
    return [f"it was started {began if 'generator_sha256' in facts else 'without --from'}"]

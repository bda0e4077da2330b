"""Recipes of comparisons: a TOML file in, the cells of a grid with checked settings out."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from zsq.errors import InputError, TeacherError, unknown_name
from zsq.methods import Real
from zsq.models.network import Network, parse_outputs
from zsq.models.teacher import Teacher, load
from zsq.quantization import PTQ, QUANTIZERS
from zsq.quantization.prepare import Bits
from zsq.runs.recipe_file import comparison_tables
from zsq.runs.settings import Settings, build, check_pair

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Names of rows and columns: they become parts of cell names and folders."""

FIGURE = "figure"
"""What stands in a cell's name in place of quantizer and bits where it draws samples."""

GAP = ("noise", "real")

MOST_CELLS = 10_000
"""Cells of a grid at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherEntry(Network):
    """A network to quantize, its images for evaluation, and real ones for the data-dependent baselines."""

    label: str = ""
    """Part of the cells' names; unset, the last part of `model`."""
    title: str = ""
    """What tables show; unset, the label."""
    source: str = ""
    """Where the file of `weights` comes from; said where it is missing."""
    data: str | None = None
    """Images on which accuracy is measured, or what suits other outputs; for classes of images, labelled ones."""
    measure: str | None = None
    """What is compared, such as `mean IoU` or `agreement` (with the float network); unset, what suits the outputs."""
    decode: str | None = None
    """What reads boxes from the outputs, FILE.py:FUNCTION or MODULE:FUNCTION; the .npz of `data` then holds `boxes`."""
    real: str | None = None
    """Images for the method of this name; those of other methods stand in `methods`."""
    bits: tuple[str, ...] | None = None
    """Widths at which it is quantized; unset, all of the quantizers'."""
    quantizer: dict[str, Any] = field(default_factory=dict)
    """Settings of the quantizers that hold for this network only."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of methods, by their labels, that hold for this network only."""

    def load(self, root: Path | None) -> Teacher:
        """Return the network; relative paths lie below `root` where they exist there."""
        weights = self.weights if self.weights in (None, "random") else below(root, str(self.weights))
        said = {name: getattr(self, name) for name in ("input", "classes", "outputs", "mean", "std", "resize")}
        if self.source and weights not in (None, "random") and not Path(str(weights).partition(":")[0]).exists():
            raise TeacherError(f"no such weights file: {weights}; {self.source}.")
        return load(Network(model=below(root, self.model), weights=weights, **said))


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """What stands in for the training data: a method with its settings."""

    name: str
    label: str = ""
    title: str = ""
    quantizer: dict[str, Any] = field(default_factory=dict)
    """Settings of the quantizer that hold in this method's cells only."""
    only: tuple[str, ...] | None = None
    """Labels of the quantizers that it is used with; unset, all."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerEntry:
    """A quantizer with its settings, at one or more widths."""

    name: str
    label: str = ""
    title: str = ""
    bits: tuple[str, ...] = ("8",)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A hypothesis: one column's accuracy is above another's, in each row of the table."""

    above: str
    """METHOD/QUANTIZER, by labels."""
    below: str
    label: str = ""
    margin: float = 0.0
    """Percentage points by which `above` may fall short: 0 claims more, a margin claims "not worse than"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Grids of samples with the names of their classes."""

    names: tuple[str, ...] | str | None = None
    """Names in label order, or a JSON file of them; unset, those that a bundled network knows, else numbers."""
    show: tuple[str | int, ...] = ()
    """Classes that are shown, by name or number; unset, up to ten spread evenly."""
    columns: int = 6
    """Classes beside each other."""
    rows: int = 1
    """Images of each class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A comparison: teachers x methods x quantizers x bits x seeds."""

    title: str
    teachers: tuple[TeacherEntry, ...]
    methods: tuple[MethodEntry, ...]
    quantizers: tuple[QuantizerEntry, ...] = ()
    seeds: tuple[int, ...] = (0,)
    layout: Literal["columns", "rows"] = "columns"
    """`columns`: one row a teacher and width, one column a method and quantizer; `rows`: one row a source of data."""
    gap: tuple[str, str] | None = None
    """Labels of the methods between whose accuracies a method closes a share; unset, noise and real if there."""
    claims: tuple[Claim, ...] = ()
    figure: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One place of the grid."""

    teacher: TeacherEntry
    method: MethodEntry
    quantizer: QuantizerEntry | None
    """None draws samples."""
    bits: str
    seed: int
    settings: Settings
    fit_settings: Settings
    """With the quantizer of the longest distillation among the cells that share the fit: schedules span both."""
    reason: str = ""
    """Why it cannot be run; empty if it can."""

    @property
    def name(self) -> str:
        """Such as `digits/zscgan/qat-4/seed0`."""
        kind = f"{self.quantizer.label}-{self.bits}" if self.quantizer else FIGURE
        return f"{self.teacher.label}/{self.method.label}/{kind}/seed{self.seed}"

    @property
    def fit_name(self) -> str:
        """Name of the fit, shared by all cells that differ in quantizer and bits only."""
        return f"{self.teacher.label}/{self.method.label}/seed{self.seed}"


def below(root: Path | None, name: str) -> str:
    """Return a path below `root` if something is there, else the name as it is.

    The part behind the colon of `FILE.py:FACTORY` is left alone.
    """
    if root is None:
        return name
    path, colon, rest = name.partition(":") if ".py:" in name else (name, "", "")
    return f"{root / path}{colon}{rest}" if (root / path).exists() else name


def read_recipe(path: Path) -> Recipe:
    """Read a recipe and check all of it but the files that it names.

    Raises:
        InputError: it is not TOML, or a key, name or value is wrong; the text quotes it and the nearest known one.
    """
    content = comparison_tables(path)
    try:
        recipe = _recipe(content)
        grid = cells(recipe)
        _check_labels(recipe)
        if not grid:
            raise InputError("no cell is left; networks and quantizers have no `bits` in common, or `only` takes all.")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return recipe


def cells(recipe: Recipe) -> list[Cell]:
    """Return the grid in the order in which it is run: the cells of one fit follow each other.

    Raises:
        InputError: a setting is wrong.
    """
    found: list[Cell] = []
    for teacher in recipe.teachers:
        for seed in recipe.seeds:
            for method in recipe.methods:
                found += _cells_of_fit(recipe, teacher, method, seed)
    return found


def _cells_of_fit(recipe: Recipe, teacher: TeacherEntry, method: MethodEntry, seed: int) -> Iterator[Cell]:
    given = {"data": teacher.real} if method.name == Real.name and teacher.real else {}
    wanted = given | method.settings | teacher.methods.get(method.label, {})
    fitted = build("method", method.name, wanted)
    found: list[tuple[QuantizerEntry | None, str, Settings, str]] = []
    for quantizer in recipe.quantizers:
        for bits in quantizer.bits if method.only is None or quantizer.label in method.only else ():
            if bits not in (teacher.bits or quantizer.bits):
                continue
            table = _table(quantizer, teacher.quantizer | method.quantizer, bits)
            settings = Settings(fitted, build("quantizer", quantizer.name, table))
            reason = ""
            try:
                check_pair(method.name, quantizer.name)
            except InputError as error:
                reason = str(error)
            found.append((quantizer, bits, settings, reason))
    if recipe.figure is not None:
        found.append((None, "", Settings(fitted, PTQ()), ""))
    usable = [settings for _, _, settings, reason in found if not reason] or [Settings(fitted, PTQ())]
    longest = max(usable, key=lambda settings: settings.distill_steps)
    for entry, bits, settings, reason in found:
        yield Cell(
            teacher=teacher,
            method=method,
            quantizer=entry,
            bits=bits,
            seed=seed,
            settings=settings,
            fit_settings=longest,
            reason=reason,
        )


def _table(quantizer: QuantizerEntry, overrides: Mapping[str, Any], bits: str) -> dict[str, Any]:
    """Return a cell's quantizer settings: what network and method say wins, where this quantizer has such a setting."""
    known = {f.name for kind in QUANTIZERS.values() for f in fields(kind)}
    for key in overrides:
        if key not in known:
            raise unknown_name("quantizer setting", f"quantizer.{key}", [f"quantizer.{k}" for k in known])
    own = {f.name for f in fields(QUANTIZERS[quantizer.name])} if quantizer.name in QUANTIZERS else known
    return {**quantizer.settings, **{k: v for k, v in overrides.items() if k in own}, "bits": bits}


_LISTS: dict[str, type] = {
    "teachers": TeacherEntry,
    "methods": MethodEntry,
    "quantizers": QuantizerEntry,
    "claims": Claim,
}
"""Lists of tables in a recipe, and what each table becomes."""


def _recipe(content: dict[str, Any]) -> Recipe:
    """Return a recipe whose entries have their labels and titles."""
    table = dict(content)
    for key in _LISTS:
        if key in table:
            table[key] = _entries(key, table[key])
    if "figure" in table:
        table["figure"] = _entry(Figure, table["figure"], "figure")
    recipe: Recipe = _entry(Recipe, table, "recipe")
    recipe = replace(
        recipe,
        teachers=_labelled(recipe.teachers, "teacher", lambda entry: re.split(r"[:/]", entry.model)[-1]),
        methods=_labelled(recipe.methods, "method", lambda entry: entry.name),
        quantizers=_labelled(recipe.quantizers, "quantizer", lambda entry: entry.name),
    )
    _check_complete(recipe)
    _check_size(recipe)
    _check_repeats(recipe)
    _check_evaluated(recipe)
    return recipe


def _entries(key: str, tables: Any) -> tuple[Any, ...]:
    if not isinstance(tables, list):
        raise InputError(f"'{key}' is no list of tables; write [[{key}]].")
    return tuple(_entry(_LISTS[key], table, key.removesuffix("s")) for table in tables)


def _check_complete(recipe: Recipe) -> None:
    """Check that a cell is left."""
    for key in ("teachers", "methods", "seeds"):
        if not getattr(recipe, key):
            raise InputError(f"the recipe has no {key}.")
    if not recipe.quantizers and recipe.figure is None:
        raise InputError("the recipe has neither [[quantizers]] nor a [figure], so that no cell is left.")


def _check_size(recipe: Recipe) -> None:
    """Check, before they are made, that there are not more cells than anybody runs."""
    columns = sum(len(quantizer.bits) for quantizer in recipe.quantizers) + (recipe.figure is not None)
    count = len(recipe.teachers) * len(recipe.methods) * len(recipe.seeds) * columns
    if count > MOST_CELLS:
        raise InputError(f"the grid has {count:,} cells; at most {MOST_CELLS:,} are run. Divide it into recipes.")


def _check_repeats(recipe: Recipe) -> None:
    """Check that no two cells have one name; labels are checked where they are filled in."""
    _check_once("seeds", recipe.seeds)
    for quantizer in recipe.quantizers:
        _check_once(f"bits of quantizer '{quantizer.label}'", quantizer.bits)


def _check_evaluated(recipe: Recipe) -> None:
    """Check that what is quantized can be evaluated."""
    for teacher in recipe.teachers if recipe.quantizers else ():
        if teacher.data is None:
            raise InputError(f"teacher '{teacher.label}' names no images for evaluation: data = SET.")


def _check_once(name: str, values: tuple[Any, ...]) -> None:
    """Check that no value stands twice: its cells would have one name."""
    if len(set(values)) < len(values):
        raise InputError(f"{name} are {list(values)}; each may stand once.")


def _entry(kind: type, table: Any, where: str) -> Any:
    """Return a dataclass made from a table; keys beyond its fields are settings where it has such a field."""
    if not isinstance(table, dict):
        raise InputError(f"'{where}' is {table!r}; a table is expected.")
    known = {f.name: f for f in fields(kind)}
    takes_settings = "settings" in known
    values, extra = {}, {}
    for key, value in table.items():
        if key in known and key != "settings":
            values[key] = _read(key, value)
        elif takes_settings:
            extra[key] = value
        else:
            raise unknown_name(f"{where} key", key, known)
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in values:
            raise InputError(f"a {where} without '{name}'; it needs one{_hint(name, extra)}.")
    if takes_settings:
        values["settings"] = extra
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {place} is {first['input']!r}: {first['msg']}.") from error


def _read(key: str, value: Any) -> Any:
    """Return a key's value in the words that the command line has for it."""
    if key == "bits" and isinstance(value, list):
        return [_width(width) for width in value]
    return parse_outputs(value) if key == "outputs" and isinstance(value, str) else value


def _width(value: Any) -> str:
    """Return a width in the one way that names cells: `08`, `int8` and `W8A8` are `8`; a file of widths stays."""
    try:
        return str(Bits.parse(value))
    except InputError:
        return str(value)


def _hint(name: str, extra: Mapping[str, Any]) -> str:
    return f" ({', '.join(map(repr, extra))} will not do)" if extra and name == "name" else ""


def _labelled(entries: tuple[Any, ...], kind: str, default: Any) -> tuple[Any, ...]:
    """Fill labels and titles in, and check that each label is usable and stands once."""
    named: list[Any] = []
    for entry in entries:
        label = entry.label or default(entry)
        if not LABEL.fullmatch(label):
            raise InputError(f"{kind} label '{label}'; letters, digits, dot, plus, minus and underscore work.")
        if label in [other.label for other in named]:
            raise InputError(f"two {kind}s are labelled '{label}'; give one of them another label.")
        named.append(replace(entry, label=label, title=entry.title or label))
    return tuple(named)


def _check_labels(recipe: Recipe) -> None:
    """Check that what refers to a row or column names one."""
    methods = [entry.label for entry in recipe.methods]
    quantizers = [entry.label for entry in recipe.quantizers]
    for teacher in recipe.teachers:
        _check_known(f"method of teacher '{teacher.label}'", teacher.methods, methods)
    _check_known("method of the gap", recipe.gap or (), methods)
    for method in recipe.methods:
        _check_known(f"quantizer of method '{method.label}'", method.only or (), quantizers)
    columns = [f"{method}/{quantizer}" for method in methods for quantizer in quantizers]
    for claim in recipe.claims:
        _check_known("column of a claim", (claim.above, claim.below), columns)
        if not math.isfinite(claim.margin) or claim.margin < 0:
            raise InputError(f"the margin of a claim is {claim.margin}; it is a number of points, 0 or more.")


def _check_known(kind: str, labels: Iterable[str], known: list[str]) -> None:
    for label in labels:
        if label not in known:
            raise unknown_name(kind, label, known)


def gap_of(recipe: Recipe) -> tuple[str, str] | None:
    """Return the labels of the methods that bound the gap, where the recipe has them."""
    labels = {entry.label for entry in recipe.methods}
    return recipe.gap or (GAP if labels.issuperset(GAP) else None)

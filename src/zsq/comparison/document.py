"""The page of a comparison in Markdown, and the files of its tables."""

from collections.abc import Iterator

from zsq.comparison.lines import Drawn, Skipped
from zsq.comparison.recipe import Recipe, cells
from zsq.comparison.result import Comparison
from zsq.comparison.statistics import Outcomes
from zsq.comparison.tables import claims_table, costs_table, differences_table, figures_table, gaps_table, main_table
from zsq.reports.text_tables import to_csv, to_latex, to_markdown
from zsq.runtime.files import replacing

CLAIMS_NOTE = (
    "Difference in points, image by image, each image's score averaged over the seeds that both have, with its "
    "95 % interval: it is about other test images, not about other seeds. `holds`: the interval lies above minus the "
    "margin; `contradicted`: below it; `open`: neither.\n"
)
DIFFERENCES_NOTE = (
    "Points, image by image on the same images, with the 95 % interval; of the same quantizer and bits.\n"
)
GAPS_NOTE = "Percent of the difference between the two methods; `no gap` where its 95 % interval reaches 0.\n"
COSTS_NOTE = (
    "Seconds of wall clock; a fit is paid once for all cells of a method and seed. `≥`: resumed after a stop.\n"
)


def document(comparison: Comparison) -> str:
    """Return all tables as Markdown, each with what its figures mean."""
    return "\n".join(_parts(comparison))


def _parts(comparison: Comparison) -> Iterator[str]:
    recipe, outcomes, lines = comparison.recipe, comparison.outcomes, comparison.lines
    yield f"# {recipe.title}\n"
    if recipe.quantizers:
        yield from (_explain(recipe, outcomes), to_markdown(main_table(outcomes)))
    if claims := claims_table(outcomes):
        yield from ("## Claims\n", CLAIMS_NOTE, to_markdown(claims))
    if differences := differences_table(outcomes):
        yield from ("## Differences\n", DIFFERENCES_NOTE, to_markdown(differences))
    if gaps := gaps_table(outcomes):
        yield from ("## Share of the gap that is closed\n", GAPS_NOTE, to_markdown(gaps))
    if outcomes.groups:
        yield from ("## Cost\n", COSTS_NOTE, to_markdown(costs_table(outcomes)))
    pictures = {name: line.outcome.figure for name, line in lines.items() if isinstance(line.outcome, Drawn)}
    if pictures:
        yield from ("## Samples\n", *(f"{name}:\n\n![{name}]({path})\n" for name, path in pictures.items()))
    skipped = {name: line.outcome.reason for name, line in lines.items() if isinstance(line.outcome, Skipped)}
    if skipped:
        yield from ("## Skipped\n", "".join(f"- `{name}`: {reason}\n" for name, reason in skipped.items()))
    count = len(cells(recipe))
    if missing := count - len(lines):
        yield f"{missing} of {count} cells have not been run.\n"


def scored(outcomes: Outcomes) -> str:
    """Say what the figures of the main table are."""
    measure = outcomes.measure
    what = f"{measure[:1].upper()}{measure[1:]}" if measure != "score" else "Each network's measure, in parentheses,"
    return f"{what} of the quantized files in percent"


def _explain(recipe: Recipe, outcomes: Outcomes) -> str:
    sets = ", ".join(dict.fromkeys(str(teacher.data) for teacher in recipe.teachers))
    seeds = ", ".join(map(str, recipe.seeds))
    over = f"mean ± standard deviation over seeds {seeds}" if len(recipe.seeds) > 1 else f"seed {seeds}"
    return (
        f"{scored(outcomes)}, each in its target's runtime, on {sets}; {over}. "
        "DF: data-free; DD: made with real images. Bold: the best data-free entry of a network and width.\n"
    )


def write_tables(comparison: Comparison) -> None:
    """Write the document, and where something is quantized the main table as CSV and LaTeX, and the figures."""
    outcomes, layout = comparison.outcomes, comparison.layout
    texts = {layout.document: document(comparison)}
    if comparison.recipe.quantizers:
        table = main_table(outcomes)
        texts[layout.table_csv] = to_csv(table)
        texts[layout.table_latex] = to_latex(table, comparison.recipe.title)
        texts[layout.figures_csv] = to_csv(figures_table(outcomes))
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text)

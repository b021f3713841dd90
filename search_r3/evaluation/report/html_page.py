"""The page itself: all sections through one template, in one file with its style and script, and plots as files.

Nothing in it comes from the network or the clock: the same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_r3.evaluation.report import quality_section, rollout_section, study_section, training_section
from search_r3.evaluation.report.comparison import SNIPPET
from search_r3.evaluation.report.load_results import Results, load_results
from search_r3.evaluation.report.page_elements import Examples, Fold, Missing, Section, Text
from search_r3.files import atomic_write_text

PAGE = "report.html"
README_WIDTH = 560
"""Pixels of a plot as a file, without its margin: legible where a README shows it as it is, or a little larger."""
MARGIN = 14


def write_report(
    results: str | Path = "results",
    page: str | Path | None = None,
    *,
    baseline: str | None = None,
    plots: str | Path | None = None,
    data_root: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the page and, if `plots` names a folder, chosen plots as SVG files; returns all paths, the page first.

    Args:
        results: the folder that holds `metrics/`, `runs/` and the rest.
        page: the HTML file; `report.html` in `results` if None.
        baseline, data_root, report: see `load_results`.

    Raises:
        InputError: see `load_results`; or a place cannot be written.
    """
    found = load_results(results, baseline, data_root, report)
    target = Path(page) if page is not None else Path(results) / PAGE
    atomic_write_text(target, render(found))
    written = [target]
    for name, plot in chosen_plots(found).items() if plots is not None else ():
        atomic_write_text(Path(str(plots)) / f"{name}.svg", standalone(plot))
        written.append(Path(str(plots)) / f"{name}.svg")
    return written


def sections(found: Results) -> list[Section]:
    """All sections in the order of the page; each is there, if only to say how to fill it."""
    return [
        quality_section.measured(found),
        quality_section.results(found),
        quality_section.reasoning(found),
        study_section.studies(found),
        quality_section.gains(found),
        rollout_section.rewards(found),
        training_section.training(found),
        training_section.environment(found),
        examples(found),
    ]


def render(found: Results) -> str:
    """The page's HTML."""
    return _templates().get_template("page.html.j2").render(sections=sections(found), summary=summary(found))


def summary(found: Results) -> str:
    """One sentence below the title."""
    systems = {record["system"] for record in found.records}
    datasets = {record["dataset"] for record in found.records}
    if not found.records:
        return "Nothing has been evaluated yet."
    summary = f"{len(systems)} systems on {len(datasets)} data sets and parts of them"
    summary += (
        f", {len(found.studies)} stud{'y' if len(found.studies) == 1 else 'ies'} of whether reasoning helps"
        * bool(found.studies)
    )
    return summary + ". Every metric is made from the run files, by the commands named here."


def examples(found: Results) -> Section:
    """Wins and losses with what was written and found; a study's where there is one."""
    section = Section("examples", "Wins and losses, side by side")
    shown: dict[tuple[str, str], Any] = {
        (name, model): of for name, one in found.by_dataset.items() for model, of in one.examples.items()
    }
    shown |= {(study["dataset"], study["system"]): study["examples"] for study in found.studies}
    shown = {key: of for key, of in shown.items() if of.get("best") or of.get("worst")}
    if not shown:
        section.blocks.append(
            Missing("No examples: they need runs with reasoning on and off.", quality_section.EVALUATE)
        )
        return section
    section.blocks.append(
        Text(
            "The queries whose nDCG@10 reasoning raised or lowered most, chosen by that number alone: what the model "
            "wrote, and the first three documents without and with it. ✓ marks a document judged relevant."
        )
    )
    for number, ((name, model), of) in enumerate(shown.items()):
        rows = [{**row, "won": won} for kind, won in (("best", True), ("worst", False)) for row in of.get(kind, ())]
        summary = f"{name}: {model}, {len(of.get('best', ()))} won and {len(of.get('worst', ()))} lost"
        section.blocks.append(Fold(summary, [Examples(rows)], opened=number == 0))
    return section


def chosen_plots(found: Results, width: int = README_WIDTH) -> dict[str, str]:
    """Plots worth a file of their own, by name: those that there are data for.

    "systems" and "reasoning" need runs, "controls", "budget", "latency" and "adaptive" a study (the first one),
    "rewards" rollouts of two models, "training" a kept run.
    """
    plots = {"systems": quality_section.bars_of(found, "full", width)}
    pairs = quality_section.pair_plots(found, width) if found.pairs else []
    plots |= {"reasoning": pairs[-1] if pairs else ""}
    if found.studies:
        study = found.studies[0]
        budgets = [*study_section.budget_plots(study, width), "", "", ""]
        plots |= {"controls": study_section.control_plot(study, width), "budget": budgets[0], "latency": budgets[2]}
        plots |= {"adaptive": study_section.adaptive_plot(study, width)}
    compared = [(name, record) for name, record in found.rollouts if "comparisons" in record]
    if compared:
        plots["rewards"] = (rollout_section.reward_plots(*compared[0], width) or [""])[0]
    if found.runs:
        plots["training"] = (training_section.run_plots(found.runs[-1], width, only=("dev", "reward")) or [""])[-1]
    return {name: plot for name, plot in plots.items() if plot}


def standalone(plot: str) -> str:
    """A plot as a file of its own: with its style, light or dark as its reader prefers, on a ground of its own."""
    style = _templates().get_template("plot.svg.css.j2").render()
    head, _, rest = plot.partition("</desc>")
    width, height = map(int, re.findall(r' (?:width|height)="(\d+)"', head))
    size = f'x="{-MARGIN}" y="{-MARGIN}" width="{width + 2 * MARGIN}" height="{height + 2 * MARGIN}"'
    ground = f'<rect class="ground" {size} rx="8"/>'
    box = f'viewBox="{-MARGIN} {-MARGIN} {width + 2 * MARGIN} {height + 2 * MARGIN}"'
    head = head.replace(f'viewBox="0 0 {width} {height}"', box)
    head = head.replace(f' width="{width}" height="{height}"', f' width="{width + 2 * MARGIN}"', 1)
    return f"{head}</desc>\n<style>\n{style}\n</style>\n{ground}{rest}\n"


def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("search_r3.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["slug"] = slug
    templates.filters["breakable"] = breakable
    templates.filters["drawn"] = drawn
    templates.filters["printable"] = printable
    templates.globals["snippet"] = SNIPPET
    return templates


def slug(text: str) -> str:
    """An id of letters, digits and hyphens."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in text)


def breakable(text: str) -> Any:
    """Escaped, with places to break a long name at."""
    from markupsafe import Markup, escape

    escaped = str(escape(text))
    return Markup(escaped.replace("-", "-<wbr>").replace(".", ".<wbr>").replace("/", "/<wbr>").replace("+", "+<wbr>"))


def drawn(plot: str) -> Any:
    """A plot of ours, which is markup already."""
    from markupsafe import Markup

    return Markup(plot)


def printable(text: str | None) -> str:
    """What a model wrote, its control characters shown as such."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text or "")

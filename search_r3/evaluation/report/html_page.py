"""The report's page: all sections rendered by one template into one file, and chosen plots as separate SVG files.

The page includes its style and script and uses neither the network nor the clock: the same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_r3.evaluation.examples import SNIPPET
from search_r3.evaluation.report import front_section, quality_section, rollout_section, study_section, training_section
from search_r3.evaluation.report.headline import FEW, ranking
from search_r3.evaluation.report.load_results import Results, load_results
from search_r3.evaluation.report.page_elements import Details, Examples, Placeholder, Section, Text
from search_r3.evaluation.report.system_names import short_models
from search_r3.files import atomic_write_text

PAGE = "report.html"
README_WIDTH = 560
"""Width in pixels of a plot written to a file, without its margin: legible in a README at this size or larger."""
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
        InputError: see `load_results`; or a file cannot be written.
    """
    loaded = load_results(results, baseline, data_root, report)
    target = Path(page) if page is not None else Path(results) / PAGE
    atomic_write_text(target, render(loaded))
    written = [target]
    for name, plot in chosen_plots(loaded).items() if plots is not None else ():
        atomic_write_text(Path(str(plots)) / f"{name}.svg", standalone(plot))
        written.append(Path(str(plots)) / f"{name}.svg")
    return written


def sections(results: Results) -> list[Section]:
    """All sections in the order of the page; a section without data says how to create it."""
    return [
        front_section.front(results),
        quality_section.results(results),
        quality_section.reasoning(results),
        study_section.studies(results),
        quality_section.gains(results),
        examples(results),
        rollout_section.rewards(results),
        training_section.training(results),
        training_section.environment(results),
        quality_section.measured(results),
    ]


def render(results: Results) -> str:
    """The page's HTML."""
    return _templates().get_template("page.html.j2").render(sections=sections(results), summary=summary(results))


def summary(results: Results) -> str:
    """The sentence below the title."""
    systems = {record["system"] for record in results.records}
    datasets = {record["dataset"] for record in results.records}
    if not results.records:
        return "Nothing has been evaluated yet."
    summary = f"{len(systems)} systems on {len(datasets)} data sets and parts of them"
    summary += (
        f", {len(results.studies)} stud{'y' if len(results.studies) == 1 else 'ies'} of whether reasoning helps"
        * bool(results.studies)
    )
    return summary + ". Every metric is computed from the run files, by the commands listed here."


def examples(results: Results) -> Section:
    """Wins and losses with reasoning traces and top documents; those of a study where the data set is not available.

    Data sets of FEW queries or more are shown, if there are any.
    """
    section = Section("examples", "Wins and losses, side by side")
    shown: dict[tuple[str, str], Any] = {(s["dataset"], s["system"]): s["examples"] for s in results.studies}
    shown |= {(name, model): rows for name, one in results.by_dataset.items() for model, rows in one.examples.items()}
    shown = {key: rows for key, rows in shown.items() if rows.get("best") or rows.get("worst")}
    counts = {one["dataset"]: one["num_queries"] for one in (*results.studies, *results.records)}
    shown = {key: rows for key, rows in shown.items() if counts[key[0]] >= FEW} or shown
    if not shown:
        section.blocks.append(
            Placeholder("No examples: they need runs with reasoning on and off.", quality_section.EVALUATE)
        )
        return section
    section.blocks.append(
        Text(
            "The queries whose nDCG@10 reasoning raised or lowered most, selected by that number alone, with the "
            "reasoning trace and the first three documents without and with it. ✓ marks documents judged relevant."
        )
    )
    models = short_models(model for _, model in shown)
    section.summary = "the queries that reasoning helped and harmed most"
    for (name, model), queries in shown.items():
        won, lost = queries.get("best", ()), queries.get("worst", ())
        rows = [*({**row, "won": True} for row in won), *({**row, "won": False} for row in lost)]
        summary = f"{name}: {models[model]}, {len(won)} won and {len(lost)} lost"
        section.blocks.append(Details(summary, [Examples(rows)]))
    return section


def chosen_plots(results: Results, width: int = README_WIDTH) -> dict[str, str]:
    """The plots that are written to files, by name, as far as there is data for them.

    "forest", "systems" and "reasoning" need runs; "controls", "budget", "latency" and "adaptive" a study (the first one
    is used); "rewards" rollouts of two models; "training" a kept run (its reward if logged, else its dev metrics).
    """
    plots = {"forest": front_section.forest(results, ranking(results), width)}
    plots |= {"systems": quality_section.systems_plot(results, "full", width)}
    pairs = quality_section.pair_plots(results, width) if results.pairs else []
    plots |= {"reasoning": pairs[-1] if pairs else ""}
    if results.studies:
        study = results.studies[0]
        budgets = [*study_section.budget_plots(study, width), "", "", ""]
        plots |= {"controls": study_section.control_plot(study, width), "budget": budgets[0], "latency": budgets[2]}
        plots |= {"adaptive": study_section.adaptive_plot(study, width)}
    compared = [(name, record) for name, record in results.rollouts if "comparisons" in record]
    if compared:
        plots["rewards"] = (rollout_section.reward_plots(*compared[0], width) or [""])[0]
    if results.runs:
        curves = (training_section.run_plots(results.runs[-1], width, only=(name,)) for name in ("reward", "dev"))
        plots["training"] = next((plot for found in curves for plot in found), "")
    return {name: plot for name, plot in plots.items() if plot}


def standalone(plot: str) -> str:
    """A plot as a separate SVG file: with its style, which follows light and dark mode, and its own background."""
    style = _templates().get_template("plot.svg.css.j2").render()
    head, _, rest = plot.partition("</desc>")
    width, height = map(int, re.findall(r' (?:width|height)="(\d+)"', head))
    size = f'x="{-MARGIN}" y="{-MARGIN}" width="{width + 2 * MARGIN}" height="{height + 2 * MARGIN}"'
    background = f'<rect class="ground" {size} rx="8"/>'
    box = f'viewBox="{-MARGIN} {-MARGIN} {width + 2 * MARGIN} {height + 2 * MARGIN}"'
    head = head.replace(f'viewBox="0 0 {width} {height}"', box)
    head = head.replace(f' width="{width}" height="{height}"', f' width="{width + 2 * MARGIN}"', 1)
    return f"{head}</desc>\n<style>\n{style}\n</style>\n{background}{rest}\n"


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
    """Escaped text in which long names can be broken at punctuation."""
    from markupsafe import Markup, escape

    escaped = str(escape(text))
    return Markup(escaped.replace("-", "-<wbr>").replace(".", ".<wbr>").replace("/", "/<wbr>").replace("+", "+<wbr>"))


def drawn(plot: str) -> Any:
    """Mark one of our own plots as safe markup."""
    from markupsafe import Markup

    return Markup(plot)


def printable(text: str | None) -> str:
    """A text with its unprintable characters replaced by �."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text or "")

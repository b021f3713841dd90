"""`search-r3 report`: one page with every result, its tests, plots and examples; and plots as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import DataRoot, Json, print_json, print_progress


def report(
    page: Annotated[
        Path | None, typer.Argument(help="The HTML file to write; report.html in OUTPUT by default.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The folder of results: runs/, metrics/, studies/, rollouts/, training/, benchmarks/.")
    ] = Path("results"),
    baseline: Annotated[
        str | None, typer.Option(help="The system that others are tested against; by default bm25, if it was measured.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Also write selected plots to this folder, as SVG files."),
    ] = None,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of all results: tables with tests, controls, curves, rewards, training, examples.

    The page is one self-contained file that can be mailed or published. Differences are tested for each query, from the
    run files, if the data sets are available. For missing parts, the page gives the command that creates them. The same
    results give the same bytes.

    \b
    Example:  search-r3 report --plots docs/images
    Before:   search-r3 evaluate --dataset scifact --system models/NAME
    Next:     open results/report.html
    """
    from search_r3.evaluation.report.html_page import write_report

    written = write_report(
        output,
        page,
        baseline=baseline,
        plots=plots,
        data_root=data,
        report=print_progress,
    )
    if as_json:
        print_json({"page": str(written[0]), "plots": [str(path) for path in written[1:]]})
    else:
        print("\n".join(map(str, written)))

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
        str | None, typer.Option(help="The system that others are tested against; by default bm25 where it is there.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Also write chosen plots here as SVG files, light or dark as the reader's page.")
    ] = None,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of all results: tables with tests, controls, curves, rewards, training, examples.

    The page is one file that loads nothing; it can be mailed or published as it is. Differences are tested query by
    query from the run files wherever the data sets are here. Missing parts name the command that makes them. The
    same results give the same bytes.

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

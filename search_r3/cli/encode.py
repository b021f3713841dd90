"""`search-r3 encode`: answers a file of requests, as OpenAI's batch API does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search_r3.cli.options import (
    AUTO,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Json,
    Model,
    expand_home,
    load,
    load_reranker,
    print_json,
    silence_transformers,
)
from search_r3.optional import optional_imports
from search_r3.progress import progress_bar

if TYPE_CHECKING:
    from search_r3.server.service import Loaded

EXIT_FAILED = 1
"""Exit code if a request was answered with an error."""
DAY = 86_400.0


def encode(
    file: Annotated[
        Path,
        typer.Argument(readable=False, callback=expand_home, help="JSONL file of requests in OpenAI's batch format."),
    ],
    into: Annotated[
        Path,
        typer.Option(
            readable=False,
            callback=expand_home,
            help="The new file: JSONL in OpenAI's format, or Parquet (only embeddings) if it ends in .parquet.",
        ),
    ],
    model: Model = None,
    reranker: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A sentence-transformers CrossEncoder for requests to /v1/rerank."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens that are read of one text, up to the model's context (512 by default)."),
    ] = None,
    budget: Budget = 32,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Embed the texts of a file of requests, without a server.

    A line is {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": ..., "input": ...}}, with
    any field that `search-r3 serve` takes; /v1/rerank is possible too. The answers come in the order of the requests.
    Run the same command again to resume an interrupted run. Exit code 1 means that some requests were
    answered with an error, which is in their lines.

    \b
    Example:  search-r3 encode requests.jsonl --into embeddings.parquet
    Next:     search-r3 serve, for requests that come one by one
    """
    silence_transformers()
    with optional_imports("server", "answering requests"):
        from search_r3.server.batch_file import CONCURRENT, answer_batch, read_ids
        from search_r3.server.server_config import ServerConfig
        from search_r3.server.service import Loaded
    from search_r3.model.resolve import default_model

    config = ServerConfig(
        max_tokens=max_tokens,
        queue=2 * CONCURRENT,
        timeout=DAY,
        reasoning_tokens=budget,
        max_reasoning_tokens=max(budget, 256),
    )

    def start() -> Loaded:
        return Loaded.of(load(model or default_model(), device, dtype, engine), None, load_reranker(reranker, device))

    ids = read_ids(file)
    with progress_bar("requests", len(ids)) as advance:
        report = answer_batch(file, into, start, config, advance, ids)
    if as_json:
        print_json({"file": str(into), **vars(report)})
    else:
        resumed = f", {report.resumed:,} of them by an earlier run" if report.resumed else ""
        failed = f"; {report.failed:,} have an error, see their lines" if report.failed else ""
        print(f"{into}: {report.requests:,} requests{resumed}{failed}")
    if report.failed:
        raise typer.Exit(EXIT_FAILED)

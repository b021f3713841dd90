"""The command `data read`, which finds the passages that stage 1 reads with each query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import (
    BatchSize,
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MaxLength,
    TrainingPairs,
    print_counted,
    print_json,
    silence_transformers,
)


def data_read(
    pairs: TrainingPairs,
    output: Annotated[Path, typer.Argument(help="The JSONL file to write: the same pairs, with passages.")],
    by: Annotated[
        str, typer.Option(help="bm25, all-minilm-l6-v2, st:NAME (sentence-transformers), or a SearchR3 model.")
    ] = "bm25",
    passages: Annotated[int, typer.Option(min=1, help="Hits kept for each query, best first.")] = 8,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="A data set whose documents are searched too, for the queries of that set. Repeatable."),
    ] = None,
    data: DataRoot = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Search with every query in the corpus of its own source, so that training can read the first hits with it.

    The corpus consists of the documents that answer queries of the same data set or package, and of those of --corpus.
    Training needs more passages than it shows, as it leaves out some that answer the query. If interrupted, the same
    command resumes.

    \b
    Example:  search-r3 data read pairs.jsonl read.jsonl --by search-r3-smollm2-135m-sft --corpus scifact
    Before:   search-r3 data build RECIPE pairs.jsonl
    Next:     search-r3 train sft CONFIG, with OUTPUT under `pairs` and `reading_ratio` above 0
    """
    silence_transformers()
    from search_r3.data.mining.first_hits import add_first_hits
    from search_r3.data.mining.scorers import open_scorer

    scorer = open_scorer(by, device=device, dtype=dtype.value, batch_size=batch_size, max_length=max_length)
    manifest = add_first_hits(
        pairs, output, scorer, passages, corpora=corpus or (), data_root=data, report=print_counted
    )
    if as_json:
        print_json(manifest)
        return
    print(f"{output}: {manifest['passages']:,} passages for {manifest['pairs']:,} pairs")
    print(f"  an answer is among those of {manifest['pairs_with_an_answer']:,} pairs")
    print(f"  {manifest['pairs_with_none']:,} pairs have none")

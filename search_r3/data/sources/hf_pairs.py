"""Pairs from a Hugging Face data set: a name of the hub, or local Parquet or JSON Lines files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from search_r3.data.io.hf_datasets import commit_of, local_files, open_splits
from search_r3.data.sources.data_source import BuiltPairs
from search_r3.data.sources.pair_files import check_license, collect_pairs, default_name
from search_r3.data.sources.records import Records
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown


def hf_pairs(
    path: str,
    *,
    license: str,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    query: str = "query",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    rows: int | None = None,
    streaming: bool = False,
    name: str | None = None,
    damaged: str = "refuse",
) -> BuiltPairs:
    """The pairs of a Hugging Face data set, in order and without duplicates.

    Args:
        path: a data set of the hub ("owner/name"), a local .parquet or .jsonl file, or a folder of such files.
        license: for the manifest.
        split: the split to read; "test" is refused for a name of the hub. A local file is one split, "train".
        subset: the data set's subset (configuration), if it has several.
        revision: commit, branch or tag of a data set of the hub; give a commit for builds that can be repeated.
        query, positive: names of the columns.
        negatives: names of columns with a negative each, or with a list of them.
        rows: read only the first rows; `limit` instead chooses among all of them.
        streaming: read a data set of the hub without keeping a copy of it; use it with `rows`. Local files always are.
        name: the source's name in the pairs ("datasets:NAME"); by default the last part of the path without suffixes.
        damaged: "refuse" or "skip" rows without a pair.

    Raises:
        MissingSource: there is no such data set, or no network.
        InputError: the package `datasets` is missing, a column or split is unknown, or a row has no pair and `damaged`
            is "refuse".
    """
    check_license(license)
    files = local_files(path)
    if split == "test" and not files:
        raise InputError('the split "test" is for evaluation only; use another split for training')
    opened = open_splits(path, subset, revision=revision, streaming=streaming, purpose="kind: datasets")
    refuse_unknown([split], tuple(opened), path, what="split")
    records = Records(damaged, Path(), html_allowed=True)
    pairs = collect_pairs(
        _numbered(islice(opened[split], rows), (query, positive, *negatives), path),
        source=f"datasets:{name or default_name(path)}",
        query=query,
        positive=positive,
        negatives=negatives,
        records=records,
        place=lambda number: f"{path}, row {number}",
    )
    origin: dict[str, Any] = {"license": license}
    if not files:
        origin["commit"] = commit_of(path, revision)
    return records.built(pairs, origin)


def _numbered(rows: Iterator[dict[str, Any]], needed: Sequence[str], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        if number == 1:
            refuse_unknown(needed, tuple(row), path, what="column")
        yield number, row

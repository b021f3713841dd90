"""Making the workers' rows visible in one Lance commit, which also removes the rows they replace.

lance-ray writes the files, on any machine and again if a task is repeated. Only files that a finished task reported (as
JSON) are committed, so a repeated task leaves no second copy of a row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata
from lance_ray.datasink import LanceDatasink
from lance_ray.fragment import write_fragment

from search_r3.errors import InputError
from search_r3.index.backends.lance.lance_table import TABLE
from search_r3.index.backends.lance.table_columns import in_parts, quoted
from search_r3.index.storage.location import Location, options_of

FILE_BYTES = 512_000_000
"""Approximate size of vectors and text in one file; rows are collected up to it before a file is written."""
TEXT_BYTES = 4_000
"""Estimated size of a row without its vector: text of at most 320 words, hashes, metadata."""
CHANGED = "{} was changed by another writer meanwhile; nothing was committed; run it again"


def rows_per_file(dimension: int) -> int:
    """The number of rows in a file of about FILE_BYTES."""
    return max(1_000, FILE_BYTES // (4 * dimension + TEXT_BYTES))


class Fragments(LanceDatasink):
    """A Ray Data sink: tasks write files, which are collected in `fragments` without being committed."""

    def __init__(self, location: Location, schema: pa.Schema, file_rows: int) -> None:
        super().__init__(
            table_uri(location),
            schema=schema,
            mode="append",
            min_rows_per_file=file_rows,
            max_rows_per_file=file_rows,
            storage_options=options_of(location),
        )
        self.fragments: list[FragmentMetadata] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[str]:
        """In a task: write the rows of `blocks`; returns the files' metadata as JSON."""
        written = write_fragment(
            blocks,
            self.uri,
            schema=self.schema,
            max_rows_per_file=self.max_rows_per_file,
            storage_options=self.storage_options,
            retry_params=self._retry_params,
        )
        return [json.dumps(fragment.to_json()) for fragment, _ in written]

    def on_write_complete(self, write_result: Any) -> None:
        """On the driver, after all tasks: collect the files' metadata."""
        self.fragments = [FragmentMetadata.from_json(kept) for part in write_result.write_returns for kept in part]


def table_uri(location: Location) -> str:
    """The URI of the table of the index at `location`."""
    return f"{location}/{TABLE}.lance"


def check_fragments(location: Location, fragments: Iterable[Any], expected: int) -> None:
    """Check that no rows are missing or duplicated, and that the files are where the index is.

    Raises:
        InputError: the files have a different number of rows, or a file is not in the index's folder.
    """
    fragments = list(fragments)
    written = sum(fragment.physical_rows for fragment in fragments)
    if written != expected:
        raise InputError(
            f"the workers wrote {written:,} rows, expected {expected:,}; nothing was committed; run it again"
        )
    if isinstance(location, Path):
        data = Path(table_uri(location), "data")
        lost = [file.path for fragment in fragments for file in fragment.files if not (data / file.path).is_file()]
        if lost:
            raise InputError(
                f"{len(lost)} files that workers wrote are not in {location}: the machines do not share that folder; "
                "give a shared folder, or s3://BUCKET/NAME; nothing was committed"
            )


def commit_fragments(location: Location, fragments: list[Any], replaced: list[str], since: int) -> None:
    """Add `fragments` and remove the rows whose ids are in `replaced`, in one commit.

    Args:
        since: the table's version that the corpus was compared with. Compactions since then do no harm.

    Raises:
        InputError: another writer changed rows since then.
    """
    dataset = lance.dataset(table_uri(location), storage_options=options_of(location))
    if any(not _harmless(dataset, version) for version in range(since + 1, dataset.version + 1)):
        raise InputError(CHANGED.format(location))
    removed, updated = _without(dataset, replaced)
    change: Any = lance.LanceOperation.Append(fragments)
    if removed or updated:
        change = lance.LanceOperation.Update(
            removed_fragment_ids=removed, updated_fragments=updated, new_fragments=fragments
        )
    elif not fragments:
        return
    try:
        lance.LanceDataset.commit(
            table_uri(location), change, read_version=dataset.version, storage_options=options_of(location)
        )
    except OSError as error:
        if "conflict" not in str(error).lower():
            raise
        raise InputError(CHANGED.format(location)) from error


def _harmless(dataset: Any, version: int) -> bool:
    """Whether the commit that made `version` changed no rows."""
    try:
        made = dataset.read_transaction(version)
    except (OSError, ValueError, RuntimeError):  # it was removed already, so what it did is unknown
        return False
    return made is not None and type(made.operation).__name__ in {"Rewrite", "CreateIndex", "UpdateConfig"}


def _without(dataset: Any, ids: list[str]) -> tuple[list[int], list[Any]]:
    """Remove rows by their `ids`: the numbers of the fragments that become empty, and the new state of others."""
    ids_of: dict[int, list[str]] = defaultdict(list)
    for some in in_parts(ids):
        rows = dataset.scanner(columns=["id"], filter=f"id IN ({quoted(some)})", with_row_address=True).to_table()
        for identifier, address in zip(rows["id"].to_pylist(), rows["_rowaddr"].to_pylist(), strict=True):
            ids_of[address >> 32].append(identifier)  # an address is a fragment's number and a position in it
    removed, updated = [], []
    for fragment in dataset.get_fragments():
        if fragment.fragment_id in ids_of:
            left = fragment.delete(f"id IN ({quoted(ids_of[fragment.fragment_id])})")
            if left is None:
                removed.append(fragment.fragment_id)
            else:
                updated.append(left)
    return removed, updated

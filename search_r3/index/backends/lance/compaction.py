"""Keeping an index small while it is written: files are compacted by size, new rows indexed, old versions removed.

A small write adds small files and rewrites none. Small files are merged when they pass a threshold, in tiers as in a
log-structured merge tree (O'Neil et al. 1996): a row is rewritten only a few times over its life, and large files are
left alone. This uses Lance's own operations (pylance), as LanceDB's `optimize` has no thresholds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.index.backends.lance.durable import flush
from search_r3.index.backends.lance.full_text import ensure_full_text
from search_r3.index.backends.lance.lance_table import COMPLETE, FOLLOW_WRITES, TABLE, ensure_lookups
from search_r3.index.storage.location import Location, options_of

TIERS = (32, 1024, 32_768, 1_048_576)  # rows; the last is Lance's own size of a fragment
MANY = 32  # fragments below a tier; more than that are merged
DELETED = 0.2  # of a fragment's rows; with more deleted rows it is rewritten without them
UNINDEXED_TEXT = 64  # rows; each costs every text search about 0.1 ms per 150 words
UNINDEXED, UNINDEXED_SHARE = 1024, 0.01  # rows, or share of all rows, that other indexes may lag behind
SEGMENTS = 8  # of the full-text index; from then on they are merged
EVERY = 32  # commits between two cleanups of old versions
KEEP_VERSIONS = timedelta(minutes=2)  # after being replaced; readers follow within FOLLOW_WRITES
MOST_VERSIONS = 64  # kept, not counting those so recent that readers may still use them
AT_LEAST = 3 * FOLLOW_WRITES
EVERYTHING = 1_000_000  # segments of an index: all of them


def open_dataset(location: Location) -> Any:
    """The table of the index at `location` as a Lance dataset, at its latest version."""
    import lance

    return lance.dataset(f"{location}/{TABLE}.lance", storage_options=options_of(location))


@dataclass(frozen=True)
class CompactionResult:
    """Whether anything was due, and whether an outdated full-text index was rebuilt."""

    changed: bool = False
    full_text_rebuilt: bool = False


def compact(table: Any, location: Location, *, everything: bool = False) -> CompactionResult:
    """Merge small files and index new rows, where that is due.

    Args:
        table: the open LanceDB table; afterwards it is at the latest version.
        location: where its index is.
        everything: compact and index everything, whatever the thresholds say.
    """
    before = table.version
    rebuilt = ensure_full_text(table)
    ensure_lookups(table)
    dataset = open_dataset(location)
    if everything:
        _compact_and_index_all(dataset)
    else:
        _compact_due(dataset)
        _index_due(dataset)
    table.checkout_latest()
    return CompactionResult(table.version != before, rebuilt)


def cleanup_is_due(table: Any) -> bool:
    """Whether EVERY commits were made since old versions were last removed."""
    mark = table.tags.list().get(COMPLETE)
    return mark is None or table.version - mark["version"] >= EVERY


def cleanup_old_versions(location: Location, keep: timedelta | None = None) -> None:
    """Remove versions that no reader needs any more, with their files. Tagged versions stay.

    A version's age counts from when it was replaced. In a folder, whose lock excludes other writers, files that a
    killed process left behind are removed too.

    Args:
        keep: versions replaced within this time stay (KEEP_VERSIONS by default), but at most MOST_VERSIONS of them
            unless they were replaced within the last six seconds; with 0 only the latest version stays.
    """
    keep = KEEP_VERSIONS if keep is None else keep
    dataset = open_dataset(location)
    made = [(int(version["version"]), version["timestamp"].timestamp()) for version in dataset.versions()]
    now = time.time()
    gone = []
    for number, (version, _) in enumerate(made[:-1]):
        age = now - made[number + 1][1]
        crowded = number < len(made) - MOST_VERSIONS and age >= min(keep, AT_LEAST).total_seconds()
        if age >= keep.total_seconds() or crowded:
            gone.append(version)
    if gone:
        flush(location, now)  # the remaining versions must be on disk before the ones they replaced are removed
        dataset.cleanup_old_versions(
            versions=gone, delete_unverified=isinstance(location, Path), error_if_tagged_old_versions=False
        )


def count_files(table: Any) -> int:
    """The number of files of rows (Lance's fragments)."""
    return int(table.stats()["fragment_stats"]["num_fragments"])


def bytes_on_disk(location: Location) -> int:
    """Bytes of all files of a local index; 0 for one on object storage."""
    return (
        sum(file.stat().st_size for file in location.rglob("*") if file.is_file()) if isinstance(location, Path) else 0
    )


def live_bytes(location: Location) -> int:
    """Bytes of the files that the latest version needs, as far as Lance knows them (not its deletion files)."""
    dataset = open_dataset(location)
    files = [file for fragment in dataset.get_fragments() for file in fragment.metadata.files]
    return sum(file.file_size_bytes or 0 for file in files) + sum(
        index.total_size_bytes or 0 for index in dataset.describe_indices()
    )


def _compact_due(dataset: Any) -> None:
    """Merge small fragments of each tier that has too many, and rewrite fragments with many deleted rows."""
    for tier in TIERS:
        if sum(fragment.physical_rows < tier for fragment in dataset.get_fragments()) > MANY:
            # Only neighbors are merged; those separated by larger fragments are merged in a higher tier.
            dataset.optimize.compact_files(target_rows_per_fragment=tier, materialize_deletions=False)
            dataset.checkout_latest()
    fragments = dataset.get_fragments()
    thinned = {f.fragment_id for f in fragments if f.num_deletions > max(TIERS[0], DELETED * f.physical_rows)}
    if thinned:
        others = [f.fragment_id for f in fragments if f.fragment_id not in thinned]
        dataset.optimize.compact_files(
            target_rows_per_fragment=TIERS[-1], materialize_deletions_threshold=DELETED, excluded_fragment_ids=others
        )


def _index_due(dataset: Any) -> None:
    """Index new rows where there are enough of them to slow down searches."""
    rows = _rows_of_fragments(dataset)
    for index in dataset.describe_indices():
        segments = _segments(index)
        behind = sum(rows.values()) - sum(rows.get(number, 0) for numbers in segments for number in numbers)
        if index.index_type != "Inverted":
            if behind >= max(UNINDEXED, UNINDEXED_SHARE * sum(rows.values())):
                dataset.optimize.optimize_indices(index_names=[index.name])
        elif behind >= UNINDEXED_TEXT:
            sizes = [sum(rows.get(number, 0) for number in numbers) for numbers in segments]
            merged = merged_with(sizes, behind) if len(sizes) >= SEGMENTS else 0
            dataset.optimize.optimize_indices(index_names=[index.name], num_indices_to_merge=merged)


def _compact_and_index_all(dataset: Any) -> None:
    """One segment of every index, and fragments of the largest tier without deleted rows."""
    options = {"target_rows_per_fragment": TIERS[-1], "materialize_deletions_threshold": 0.0}
    indexes = dataset.describe_indices()
    if not any(_segments(index) for index in indexes):  # a new table: rows indexed before would be rewritten
        dataset.optimize.compact_files(**options)
    rows = _rows_of_fragments(dataset)
    for index in indexes:
        segments = _segments(index)
        if len(segments) > 1 or set(rows) - {number for numbers in segments for number in numbers}:
            dataset.optimize.optimize_indices(index_names=[index.name], num_indices_to_merge=EVERYTHING)
    dataset.optimize.compact_files(**options)  # afterwards, as only fragments of the same segment are merged


def _rows_of_fragments(dataset: Any) -> dict[int, int]:
    dataset.checkout_latest()
    return {fragment.fragment_id: fragment.physical_rows for fragment in dataset.get_fragments()}


def _segments(index: Any) -> list[list[int]]:
    """The fragment numbers of each non-empty segment of an index, oldest segment first."""
    segments = [[int(number) for number in segment.fragment_ids] for segment in index.segments]
    return [numbers for numbers in segments if numbers]


def merged_with(sizes: Sequence[int], new: int) -> int:
    """How many of the newest segments are merged with `new` rows; `sizes` are their rows, oldest first.

    A segment is merged if it has at most twice as many rows as everything after it. So the sizes of the remaining
    segments at least halve from one to the next, and there are few of them.
    """
    total = new
    for count, size in enumerate(reversed(sizes)):
        if size > 2 * total and count:
            return count
        total += size
    return len(sizes)

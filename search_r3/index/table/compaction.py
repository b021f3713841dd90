"""Keeping an index small while it is written: files compacted by size, new rows indexed, old versions removed.

A small write adds small files and rewrites none. What has piled up is put together when it passes a threshold, in
tiers as in a log-structured merge tree (O'Neil et al. 1996), so that a row is rewritten a few times over its life and
large files are left alone. Lance's own operations do the work (pylance): LanceDB's `optimize` has no thresholds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.index.storage.location import Place, options_of
from search_r3.index.table.durable import flush
from search_r3.index.table.full_text import ensure_full_text
from search_r3.index.table.lance_table import COMPLETE, FOLLOW_WRITES, TABLE, ensure_lookups

TIERS = (32, 1024, 32_768, 1_048_576)  # rows; the last is Lance's own size of a fragment
MANY = 32  # fragments below a tier; more are put together
DELETED = 0.2  # of a fragment's rows; more, and the fragment is written again without them
UNINDEXED_TEXT = 64  # rows whose words are read at every search: about 0.1 ms each of 150 words
UNINDEXED, UNINDEXED_SHARE = 1024, 0.01  # rows, or share of all, that the other indexes may lag behind
SEGMENTS = 8  # of the full-text index; more are merged
EVERY = 32  # commits between two looks at old versions
KEEP_VERSIONS = timedelta(minutes=2)  # after another took its place; readers follow within FOLLOW_WRITES
MOST_VERSIONS = 64  # kept, however young, but for those that a reader may not have left yet
AT_LEAST = 3 * FOLLOW_WRITES
EVERYTHING = 1_000_000  # segments of an index: all that it has


def open_dataset(place: Place) -> Any:
    """The index's table in `place` as Lance's own dataset, at its latest version."""
    import lance

    return lance.dataset(f"{place}/{TABLE}.lance", storage_options=options_of(place))


@dataclass(frozen=True)
class Tidied:
    """Whether anything was due, and whether the full-text index was an outdated one, which was rebuilt."""

    changed: bool = False
    full_text_rebuilt: bool = False


def tidy(table: Any, place: Place, *, everything: bool = False) -> Tidied:
    """Compact the files and index the new rows that have piled up.

    Args:
        table: the open LanceDB table; it is at the latest version afterwards.
        place: where its index is.
        everything: one pass over all, whatever the thresholds say.
    """
    before = table.version
    rebuilt = ensure_full_text(table)
    ensure_lookups(table)
    dataset = open_dataset(place)
    if everything:
        _compact_and_index_all(dataset)
    else:
        _compact_due(dataset)
        _index_due(dataset)
    table.checkout_latest()
    return Tidied(table.version != before, rebuilt)


def forget_is_due(table: Any) -> bool:
    """Whether many commits were made since old versions were last removed."""
    held = table.tags.list().get(COMPLETE)
    return held is None or table.version - held["version"] >= EVERY


def forget_versions(place: Place, keep: timedelta | None = None) -> None:
    """Remove the versions that no reader needs any more, with their files; one with a tag stays.

    A version's age counts from when the next one took its place. In a folder, whose lock shuts out other writers, the
    files that a killed process left behind are removed too.

    Args:
        keep: versions replaced within this time stay, by default KEEP_VERSIONS, but only MOST_VERSIONS of them, unless
            they were replaced within the last six seconds; with 0 only the latest version stays.
    """
    keep = KEEP_VERSIONS if keep is None else keep
    dataset = open_dataset(place)
    made = [(int(held["version"]), held["timestamp"].timestamp()) for held in dataset.versions()]
    now = time.time()
    gone = []
    for number, (version, _) in enumerate(made[:-1]):
        age = now - made[number + 1][1]
        crowded = number < len(made) - MOST_VERSIONS and age >= min(keep, AT_LEAST).total_seconds()
        if age >= keep.total_seconds() or crowded:
            gone.append(version)
    if gone:
        flush(place, now)  # what stays, before what it replaces goes
        dataset.cleanup_old_versions(
            versions=gone, delete_unverified=isinstance(place, Path), error_if_tagged_old_versions=False
        )


def count_files(table: Any) -> int:
    """The number of files of rows (Lance's fragments)."""
    return int(table.stats()["fragment_stats"]["num_fragments"])


def live_bytes(place: Place) -> int:
    """Bytes of the files that the latest version needs, as far as Lance knows them: data, deletions' files excepted."""
    dataset = open_dataset(place)
    files = [file for fragment in dataset.get_fragments() for file in fragment.metadata.files]
    return sum(file.file_size_bytes or 0 for file in files) + sum(
        index.total_size_bytes or 0 for index in dataset.describe_indices()
    )


def _compact_due(dataset: Any) -> None:
    """Put small fragments together, tier by tier where there are too many, and rewrite those with many deleted rows."""
    for tier in TIERS:
        if sum(fragment.physical_rows < tier for fragment in dataset.get_fragments()) > MANY:
            # Only neighbors are put together; where others stand between, a higher tier takes those in.
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
    """Index the rows that are not indexed yet, where they are so many that searches are slower for it."""
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
    if not any(_segments(index) for index in indexes):  # a new table: what is indexed first is rewritten afterwards
        dataset.optimize.compact_files(**options)
    rows = _rows_of_fragments(dataset)
    for index in indexes:
        segments = _segments(index)
        if len(segments) > 1 or set(rows) - {number for numbers in segments for number in numbers}:
            dataset.optimize.optimize_indices(index_names=[index.name], num_indices_to_merge=EVERYTHING)
    dataset.optimize.compact_files(**options)  # after it: only fragments of one segment are put together


def _rows_of_fragments(dataset: Any) -> dict[int, int]:
    dataset.checkout_latest()
    return {fragment.fragment_id: fragment.physical_rows for fragment in dataset.get_fragments()}


def _segments(index: Any) -> list[list[int]]:
    """The numbers of the fragments in each segment of an index, in the order they were made; empty ones excepted."""
    found = [[int(number) for number in segment.fragment_ids] for segment in index.segments]
    return [numbers for numbers in found if numbers]


def merged_with(sizes: Sequence[int], new: int) -> int:
    """How many of the last segments, of `sizes` rows in the order they were made, are merged with `new` rows.

    Each that is at most twice what stands behind it, so that sizes fall by half at least and stay few.
    """
    total = new
    for count, size in enumerate(reversed(sizes)):
        if size > 2 * total and count:
            return count
        total += size
    return len(sizes)

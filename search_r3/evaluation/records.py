"""Reading result files back: metrics files, and whether a finished result can be reused."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset
from search_r3.errors import InputError
from search_r3.files import sha256_of

SMALL = ".small"
"""How the name of a fixed sub-corpus ends."""
MAX_LISTED = 20
"""Most ids that a record lists of anything."""


def read_record(path: Path) -> dict[str, Any]:
    """A metrics file. Raises InputError if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["dataset"], record["system"], record["measures"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a metrics file ({error}); delete it and evaluate again") from error
    return record


def finished_record(path: Path, settings: dict[str, Any], data_file: Path, checksum: str) -> dict[str, Any] | None:
    """The record in `path` if it can be reused, else None.

    Args:
        settings: the settings (as JSON gives them back) that the record must have been made with.
        data_file: the file next to the record that it describes, such as a run.
        checksum: the record's key for the SHA-256 of `data_file`; a file that was changed or damaged does not match.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        reusable = record["settings"] == settings and record[checksum] == sha256_of(data_file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if reusable else None


def ignored_ids(dataset: BeirDataset) -> dict[str, Any]:
    """What a record says about ignored documents with a query's own id; empty where they are not ignored."""
    if not dataset.ignore_identical_ids:
        return {}
    return {"ignore_identical_ids": True, "num_identical_ids": len(dataset.identical_ids())}


def unjudged_copies(dataset: BeirDataset, most: int = MAX_LISTED) -> dict[str, Any]:
    """What a record says about copies of relevant documents that are not judged for the same query, and so count as not
    relevant; empty where there are none. Case and white space make no difference between copies.

    Args:
        most: the number of copies that are listed.
    """
    same: dict[str, list[str]] = defaultdict(list)
    for document in dataset.corpus.values():
        same[" ".join(document.full_text.casefold().split())].append(document.id)
    copies_of = {one: group for text, group in same.items() if text and len(group) > 1 for one in group}
    found: dict[str, str] = {}
    queries = 0
    for judged in dataset.qrels.values():
        relevant = [one for one, grade in judged.items() if grade > 0 and one in copies_of]
        copies = {copy: one for one in relevant for copy in copies_of[one] if copy not in judged}
        queries += bool(copies)
        for copy, one in copies.items():
            found.setdefault(copy, one)
    if not found:
        return {}
    listed = [f"{copy} of {one}" for copy, one in list(found.items())[:most]]
    return {"num_unjudged_copies": len(found), "num_queries_with_unjudged_copies": queries, "unjudged_copies": listed}

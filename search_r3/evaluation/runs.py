"""TREC run files: six columns `qid Q0 did rank score system`, gzipped, the same bytes for the same run.

Scores are written as float32 with nine digits, enough to restore the exact number. Documents are in trec_eval's order
(score, then id, both descending), so rank and score never contradict each other, and any tool that sorts the file by
either column gets the same ranking.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.files import atomic_path, decode_text
from search_r3.metrics import Run, rank_documents


def write_run(path: str | Path, run: Run, system: str, k: int = 100) -> None:
    """Write the top k of every query to `path` (gzip), atomically; queries in the run's order.

    Raises:
        InputError: an id or the system's name is empty or contains white space, or a score is not finite.
    """
    _check_id("system name", system)
    lines: list[str] = []
    for qid, scores in run.items():
        _check_id("query id", qid)
        for rank, did in enumerate(rank_documents(scores, k), 1):
            _check_id("document id", did)
            score = np.float32(scores[did])
            if not np.isfinite(score):
                raise InputError(f"query {qid}, document {did}: the score is {score}; a run needs finite scores")
            lines.append(f"{qid} Q0 {did} {rank} {score:.9g} {system}\n")
    write_gzip(path, "".join(lines))


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run file, gzipped or plain: query id -> document id -> score, in the file's order.

    Raises:
        InputError: no such file, a damaged gzip, or a line that breaks the format; the message names file and line.
    """
    path = Path(path)
    run: dict[str, dict[str, float]] = {}
    for number, line in enumerate(read_gzip_lines(path), 1):
        where = f"{path}, line {number}"
        columns = line.split()
        if len(columns) != 6:
            raise InputError(f"{where}: expected 6 columns (qid Q0 did rank score system), found {len(columns)}")
        qid, _, did, _, text, _ = columns
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{where}: the score {text!r} is not a finite number")
        documents = run.setdefault(qid, {})
        if did in documents:
            raise InputError(f"{where}: document {did} is listed twice for query {qid}; remove one")
        documents[did] = score
    return run


def drop_identical_ids(run: Run, k: int) -> dict[str, dict[str, float]]:
    """`run` without documents that have their query's own id: the first k others of each query, in the given order.

    From a search for k + 1 documents this gives the k that a search without the document itself would have found.
    """

    def others(qid: str, scores: Mapping[str, float]) -> dict[str, float]:
        return dict(itertools.islice(((did, score) for did, score in scores.items() if did != qid), k))

    return {qid: others(qid, scores) for qid, scores in run.items()}


def write_gzip(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8, gzip, no time stamp: the same bytes every time) atomically."""
    packed = io.BytesIO()
    # GzipFile, not gzip.compress, whose header names the operating system.
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as handle:
        handle.write(text.encode("utf-8"))
    with atomic_path(path) as scratch:
        scratch.write_bytes(packed.getvalue())


def read_gzip_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, gzipped or plain, with or without a byte order mark.

    Raises:
        InputError: the file is missing, damaged or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and evaluate again") from error
    lines = decode_text(data, path).split("\n")  # not splitlines: a text may contain U+2028 or U+0085
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def write_jsonl_gzip(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, gzipped, with the same bytes for the same records."""
    write_gzip(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _check_id(what: str, value: str) -> None:
    if not value or value.split() != [value]:
        raise InputError(f"the {what} {value!r} is empty or contains white space, which a TREC run does not allow")

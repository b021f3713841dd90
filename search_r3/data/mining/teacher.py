"""Teacher rows: every query and document of a pairs file embedded once by another model, stored next to the pairs.

Training uses them for soft labels (Hinton et al. 2015, arXiv 1503.02531), mining and selection use them as a scorer,
and none of these has to load the teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.pairs import read_pairs
from search_r3.data.shard_checkpoints import ShardCheckpoints
from search_r3.errors import InputError
from search_r3.files import atomic_path

CHUNK = 1024
"""Texts whose rows are written to disk together."""
SUFFIX = ".rows.safetensors"
"""Suffix of a file of rows, so that its path can be used as the name of a scorer."""


def write_teacher_rows(
    sources: Sequence[str | Path], output: str | Path, teacher: Any, report: Any = None
) -> dict[str, Any]:
    """Embed all queries, positives and negatives of the pairs files `sources`, and write them to `output`.

    Args:
        output: NAME.rows.safetensors: "rows" (N, D) float16, and "keys" (N,) int64, which identify the texts.
        teacher: a `DenseScorer`, or anything with `name`, `identity`, `encode_query` and `encode_document`
            (lists of texts -> (n, D) float32 unit rows).
        report: called with (what, done, total).

    Returns:
        counts: queries, documents, dimensions. An interrupted run leaves OUTPUT.partial and continues from it.

    Raises:
        InputError: the name does not end in `SUFFIX`, a source cannot be read, the disk is full, or OUTPUT.partial
            belongs to other texts or another teacher.
    """
    from safetensors.numpy import save_file

    if not str(output).endswith(SUFFIX):
        raise InputError(f"{output} must end in {SUFFIX}, so that other commands recognize it")
    pairs = [pair for path in sources for pair in read_pairs(path)]
    texts = {
        "query": list(dict.fromkeys(pair.query for pair in pairs)),
        "document": list(dict.fromkeys(text for pair in pairs for text in (*pair.relevant, *pair.negatives))),
    }
    digest = hashlib.sha256("\0".join([*texts["query"], "", *texts["document"]]).encode()).hexdigest()
    record = {"teacher": teacher.name, **teacher.identity, "texts_sha256": digest}
    with closing(ShardCheckpoints(Path(f"{output}.partial"), record)) as checkpoints:
        rows: list[np.ndarray] = []
        for kind, encode in (("query", teacher.encode_query), ("document", teacher.encode_document)):
            for start in range(0, len(texts[kind]), CHUNK):
                place = checkpoints.folder / f"{kind}-{start:08d}.npy"
                if not place.is_file():
                    made = np.asarray(encode(texts[kind][start : start + CHUNK]), dtype=np.float16)
                    with atomic_path(place) as scratch, open(scratch, "wb") as handle:
                        np.save(handle, made)
                rows.append(np.load(place))
                if report:
                    done = min(start + CHUNK, len(texts[kind]))
                    report(f"{kind} texts embedded by {teacher.name}", done, len(texts[kind]))
        keys = [key_of(kind, text) for kind in ("query", "document") for text in texts[kind]]
        metadata = {"record": json.dumps(record, sort_keys=True)}
        with atomic_path(output) as scratch:
            save_file({"rows": np.concatenate(rows), "keys": np.array(keys, dtype=np.int64)}, scratch, metadata)
        checkpoints.remove()
    return {"queries": len(texts["query"]), "documents": len(texts["document"]), "dimensions": rows[0].shape[1]}


class TeacherRows:
    """Rows read from a file that `write_teacher_rows` made; also a `Scorer` (see `data.mining.scorers`).

    Raises:
        InputError: the file is missing or not such a file.
    """

    zero_is_no_match = False

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as handle:
                self.record: dict[str, Any] = json.loads((handle.metadata() or {})["record"])
                self.rows_ND = handle.get_tensor("rows")
                keys = handle.get_tensor("keys")
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} is not a file of teacher rows ({error}); create one with search-r3 data embed-teacher"
            ) from error
        self.place = {int(key): i for i, key in enumerate(keys)}
        self.name = str(self.record["teacher"])
        self._documents_ND: np.ndarray | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher that the rows come from."""
        return self.record

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), D) float32 unit rows. Raises InputError if a text was not embedded."""
        return self._find("query", texts)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), D) float32 unit rows. Raises InputError if a text was not embedded."""
        return self._find("document", texts)

    def prepare(self, documents: list[str], folder: Path, report: Any = None) -> None:
        """Use `documents` as the candidates."""
        self._documents_ND = self.documents(documents)

    def score(self, queries: list[str]) -> np.ndarray:
        """(Q, N) float32 cosines with the prepared documents."""
        assert self._documents_ND is not None, "call prepare first"
        return self.queries(queries) @ self._documents_ND.T

    def _find(self, kind: str, texts: Sequence[str]) -> np.ndarray:
        try:
            places = [self.place[key_of(kind, text)] for text in texts]
        except KeyError:
            missing = next(text for text in texts if key_of(kind, text) not in self.place)
            raise InputError(
                f"{self.path} has no row for the {kind} {missing[:60]!r}: it was made from other pairs; "
                "run search-r3 data embed-teacher on the current pairs"
            ) from None
        rows = self.rows_ND[places].astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def key_of(kind: str, text: str) -> int:
    """A text's key in the file: 63 bits of SHA-256, different for queries and documents, which models may embed
    differently."""
    return int.from_bytes(hashlib.sha256(f"{kind}\0{text}".encode()).digest()[:8], "big") >> 1

"""nDCG@10 through Milvus against LanceDB's exact search: the same vectors, the same queries, two backends.

    python benchmarks/backend_quality.py cosqa scifact    # results/benchmarks/backend_quality.json; SEARCH_R3_DATA
    python benchmarks/backend_quality.py FOLDER --tiny --json FILE   # random weights: whether it runs

Every document is one row with its whole embedding, from the cache of `search-r3 evaluate` if it is there; queries are
embedded without reasoning. Milvus is Milvus Lite in a temporary folder, searched through its own index; a search in
NumPy, which compares all vectors, is the third.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, finish, rounded, shrunk

from search_r3.data.beir import load_beir
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.systems import SearchR3System
from search_r3.index.backends.index_backend import Row
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.backends.milvus.milvus_backend import MilvusBackend
from search_r3.index.chunking.chunker import Chunk
from search_r3.index.index_info import IndexInfo
from search_r3.index.storage.location import CollectionUri
from search_r3.metrics import mean, run_ndcg
from search_r3.model.resolve import default_model
from search_r3.model.searchr3 import SearchR3

SEED, DEPTH, SAME = 0, 10, 0.001
"""The depth of nDCG, and the largest difference that counts as none."""
TOKENS = 256
"""Of a document: as in the evaluations of results/."""


def rows_of(texts: Mapping[str, str]) -> list[Row]:
    """One row for each document."""
    chunks = (Chunk(name, name, "", text, {}, "", 1, 1) for name, text in texts.items())
    return [make_row(chunk, TOKENS, "documents", "documents") for chunk in chunks]


def run_of(backend: Any, queries: Sequence[str], vectors: np.ndarray) -> dict[str, dict[str, float]]:
    found = (backend.search(vector, DEPTH, None, True) for vector in vectors)
    return {name: {row["id"]: score for row, score in hits} for name, hits in zip(queries, found, strict=True)}


def measure(folder: Path, model: Any, cache: EmbeddingCache | None, scratch: Path) -> dict[str, Any]:
    data = load_beir(folder, "test")
    documents = {name: document.full_text for name, document in data.corpus.items()}
    queries = {name: data.queries[name] for name in data.qrels}
    rows_ND, _ = SearchR3System(model, "model", "off", max_length=TOKENS).document_rows(documents, cache)
    rows_QD = model.encode_query(list(queries.values()), reasoning=False)
    info, rows = IndexInfo.of(model), rows_of(documents)
    (scratch / "lance").mkdir(parents=True)
    backends = {
        "lance": LanceBackend.create(scratch / "lance", info),
        "milvus": MilvusBackend.create(CollectionUri(f"milvus://{scratch}/lite.db/documents"), info),
    }
    runs = {}
    for name, backend in backends.items():
        backend.add(rows, rows_ND)
        runs[name] = run_of(backend, list(queries), rows_QD)
    cosines_QN = rows_QD @ rows_ND.T
    names, best_QK = list(documents), np.argsort(-cosines_QN, axis=1, kind="stable")[:, :DEPTH]
    runs["numpy"] = {query: {names[i]: float(cosines_QN[q, i]) for i in best_QK[q]} for q, query in enumerate(queries)}
    ndcg = {name: mean(run_ndcg(run, data.qrels, DEPTH)) for name, run in runs.items()}
    same = sum(runs["lance"][query].keys() == runs["milvus"][query].keys() for query in queries)
    figures = {f"ndcg_at_10_{name}": round(value, 5) for name, value in ndcg.items()}
    difference = abs(ndcg["lance"] - ndcg["milvus"])
    return figures | {
        "documents": len(documents),
        "queries": len(queries),
        "difference": rounded(difference),
        "queries_with_the_same_ten": same,
        "equal": difference <= SAME,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="names of data sets in SEARCH_R3_DATA, or folders")
    parser.add_argument("--model", help="bundled name, adapter or folder (default: the default adapter)")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    options = parser.parse_args()
    base = Path(os.environ.get("SEARCH_R3_DATA", "."))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tiny = str(shrunk(options.model or "smollm2-135m", Path(scratch) / "tiny")) if options.tiny else None
        name = tiny or str(options.model or default_model())
        model = SearchR3.from_pretrained(name, device=options.device, engine="auto" if options.tiny else options.engine)
        cache = None if options.tiny else EmbeddingCache()
        table = Table("nDCG@10", "data", "LanceDB", "Milvus", "NumPy", "same ten")
        for given in options.data:
            folder = Path(given) if Path(given).is_dir() else base / given
            found = measure(folder, model, cache, Path(scratch) / folder.name)
            figures[folder.name] = found
            numbers = [f"{found[f'ndcg_at_10_{name}']:.5f}" for name in ("lance", "milvus", "numpy")]
            table.row(folder.name, *numbers, f"{found['queries_with_the_same_ten']}/{found['queries']}")
    finish("backend_quality", {"model": "tiny" if options.tiny else Path(name).name, **figures}, options, SEED)
    return 0 if all(found["equal"] for found in figures.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""How a hybrid search should fuse its lists: by reciprocal rank, or by normalized scores with which weight.

    python benchmarks/fusion.py --data DATA           # dev queries: words, vectors and each way to fuse them
    python benchmarks/fusion.py --data DATA --test    # test queries: the weight in use, on the committed runs
    python benchmarks/fusion.py --data DATA --tiny    # random weights, a few documents; writes no result

For docs/indexing.md, "Hybrid search". **Dev**: for each data set an index by `build_index`, its chunks embedded by
their first `--length` tokens; of each query the 100 best by vector (direct, no reasoning) and by words, fused and
ordered as `run_search` does. The queries are cosqa's and nfcorpus's dev split, hotpotqa's train split, and the eighth
of the train queries of scifact, strategyqa and entailmentbank that is held out to choose by. `--work FOLDER` keeps the
indexes, so a run that was killed goes on.

**Test**: the vectors' lists are the stage 2 adapter's committed runs, the words' an index's BM25 (which needs no model)
and the committed runs of bm25s. nDCG@10 throughout, of documents.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, finish, rounded, say
from serve_bench import tiny_model

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, choose_pool, load_beir, stable_order
from search_r3.data.dev_pools import SCIFACT_DEV_MODULUS
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.sources.beir_pairs import is_held_out
from search_r3.evaluation.runs import read_run
from search_r3.hints import refuse_unknown
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.metrics import run_ndcg
from search_r3.rank_fusion import DEPTH, VECTOR_WEIGHT, fuse_scores, reciprocal_rank_fusion

SEED = 0
WEIGHTS = (0.5, 0.6, 0.65, 0.7, 0.8)
"""Of the vectors."""
TINY_QUERIES, TINY_DOCUMENTS = 8, 60
MODES = ("vector", "text")
VECTORS, WORDS = "search-r3-smollm2-135m-grpo.off", "bm25"
"""The committed runs."""
TESTS = ("cosqa", "mkqa/en", "scifact")
TEST_COLUMNS = ("vectors", "words", "rrf", str(VECTOR_WEIGHT), "bm25s", "bm25s rrf", f"bm25s {VECTOR_WEIGHT}")
Lists = tuple[dict[str, float], dict[str, float]]
"""The vectors' and the words' scores of one query, by id, best first."""
Fuse = Callable[[Lists], Iterable[str]]
"""From both lists to ids, best first."""
VECTORS_ALONE: Fuse = itemgetter(0)
WORDS_ALONE: Fuse = itemgetter(1)


def eighth(query: str) -> bool:
    """Whether a train query is held out, by its id."""
    return zlib.crc32(query.encode()) % 8 == 0


DEV: dict[str, tuple[str, Callable[[str], bool] | None]] = {
    "cosqa": ("dev", None),
    "scifact": ("train", lambda query: is_held_out(query, SCIFACT_DEV_MODULUS)),
    "hotpotqa": ("train", None),
    "nfcorpus": ("dev", None),
    "strategyqa": ("train", eighth),
    "entailmentbank": ("train", eighth),
}
"""Data set -> the split, and which of its queries; None is all."""


class FirstTokens:
    """A model that embeds the first `length` tokens of each text, as evaluations do.

    `build_index` would rather put what does not fit into more chunks, so it is told that all fits. A document of over
    320 words still is several.
    """

    def __init__(self, model: SearchR3, length: int) -> None:
        self.name, self.source, self.dimension = model.name, model.source, model.dimension
        self.contract_hash, self.encode_query, self.reason = model.contract_hash, model.encode_query, model.reason
        self._model, self._length = model, length

    def encode_document(self, texts: Sequence[str], *, batch_size: int = 32, **_: Any) -> np.ndarray:
        """The model's own, of the first tokens."""
        return self._model.encode_document(
            texts, batch_size=batch_size, show_progress_bar=False, max_length=self._length
        )

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Few enough."""
        return [1] * len(texts)


class NoModel(FirstTokens):
    """For an index that is searched by words alone: all its vectors are the same."""

    def __init__(self) -> None:
        self.name, self.source, self.dimension, self.contract_hash = "none", "", 8, "0" * 64

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """One unit vector for all."""
        return np.full((len(texts), self.dimension), self.dimension**-0.5, dtype=np.float32)


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parse()
    ending = argparse.Namespace(**vars(options) | {"tiny": bool(options.tiny or options.queries or options.datasets)})
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch) / "indexes"
        if options.test:
            figures = {name: on_test(name, work, options) for name in options.datasets or TESTS}
            print_table(figures, TEST_COLUMNS)
            finish("fusion-test", {"vectors": VECTORS, "datasets": shortened(figures)}, ending, SEED)
            return
        refuse_unknown(options.datasets, tuple(DEV), "fusion", "data set")
        name = str(tiny_model(options.model, Path(scratch) / "tiny")) if options.tiny else options.model
        model = SearchR3.from_pretrained(name, device=options.device, dtype=options.dtype)
        encoder = FirstTokens(model, options.length)
        figures = {name: on_dev(name, encoder, work, options) for name in options.datasets or DEV}
    fusions = ("rrf", *map(str, WEIGHTS))
    found = list(figures.values())
    mean = {column: statistics.fmean(one[column] for one in found) for column in ("words", "vectors", *fusions)}
    gain = {column: min(one[column] - max(one["words"], one["vectors"]) for one in found) for column in fusions}
    summary = {"mean": mean, "least gain over the better of the two": gain}
    print_table(figures | summary, tuple(mean))
    about = {"model": model.name, "contract_hash": model.contract_hash, "dtype": model.dtype, "length": options.length}
    finish("fusion", {**about, "datasets": shortened(figures), **shortened(summary)}, ending, SEED)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--model", default="search-r3-smollm2-135m-grpo", help="bundled name, adapter or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=128, help="tokens of each document that are embedded")
    parser.add_argument("--datasets", nargs="*", default=[], help="only these: a rehearsal, as with --queries")
    parser.add_argument("--queries", type=int, help="at most so many of each data set; writes no result")
    parser.add_argument("--test", action="store_true", help="test queries, from committed runs; needs no model")
    parser.add_argument("--runs", type=Path, default=RESULTS.parent / "runs", help="the committed runs")
    parser.add_argument("--work", type=Path, help="keep the indexes here (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model and a few documents")
    parser.add_argument("--json", dest="output", type=Path, help="where to write (default: results/benchmarks)")
    return parser.parse_args()


def read(name: str, split: str, taken: Callable[[str], bool] | None, options: argparse.Namespace) -> BeirDataset:
    """The whole corpus with the chosen queries; a few of both where `options` ask for less."""
    dataset = load_beir(find_dataset(name, options.data), split, name=name)
    queries = stable_order((q for q in dataset.queries if taken is None or taken(q)), SEED)[: options.queries]
    dataset.queries = {query: dataset.queries[query] for query in queries}
    dataset.qrels = {query: dataset.qrels[query] for query in queries}
    return choose_pool(dataset, TINY_QUERIES, TINY_DOCUMENTS, SEED) if options.tiny else dataset


def index_of(dataset: BeirDataset, model: Any, folder: Path) -> SearchIndex:
    """The data set's index in `folder`, made or completed; each search is exact."""
    say(f"{dataset.name}: {len(dataset.corpus)} documents, {len(dataset.queries)} queries")
    documents = (SourceDocument(one.id, one.title, one.text) for one in dataset.corpus.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    build_index(folder, documents, model, approximate_from=None, source="corpus")
    return SearchIndex.open(folder, follow=False)


def on_dev(name: str, model: FirstTokens, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """nDCG@10 of each list and each fusion on a data set's dev queries."""
    dataset = read(name, *DEV[name], options)
    index = index_of(dataset, model, work / f"{model.name}.{options.length}" / name)
    document_of: dict[str, str] = {}
    lists: dict[str, Lists] = {}
    for query, text in dataset.queries.items():
        near, words = (
            index.search(text, model, k=DEPTH, mode=mode, reasoning=False, chunks=True).hits for mode in MODES
        )
        document_of |= {hit.id: hit.document for hit in (*near, *words)}
        lists[query] = ({hit.id: hit.score for hit in near}, {hit.id: hit.score for hit in words})
    ways = {
        "words": WORDS_ALONE,
        "vectors": VECTORS_ALONE,
        "rrf": by_rank,
        **{str(one): by_scores(one) for one in WEIGHTS},
    }
    return sizes(dataset, index) | {way: quality(lists, fuse, dataset.qrels, document_of) for way, fuse in ways.items()}


def on_test(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """nDCG@10 on test queries: the committed vectors with an index's words, and with bm25s's."""
    dataset = read(name, "test", None, options)
    index = index_of(dataset, NoModel(), work / "words" / name)
    vectors, bm25s = (read_run(options.runs / name / f"{run}.trec.gz") for run in (VECTORS, WORDS))
    words: dict[str, dict[str, float]] = {}
    for query, text in dataset.queries.items():
        found = words.setdefault(query, {})
        for hit in index.search(text, None, k=DEPTH, mode="text", chunks=True).hits:
            found.setdefault(hit.document, hit.score)
    figures = sizes(dataset, index)
    for run, (plain, ranks, scores) in ((words, TEST_COLUMNS[1:4]), (bm25s, TEST_COLUMNS[4:])):
        lists = {query: (vectors.get(query, {}), run.get(query, {})) for query in dataset.queries}
        ways = {TEST_COLUMNS[0]: VECTORS_ALONE, plain: WORDS_ALONE, ranks: by_rank, scores: by_scores(VECTOR_WEIGHT)}
        themselves = {document: document for document in dataset.corpus}
        figures |= {way: quality(lists, fuse, dataset.qrels, themselves) for way, fuse in ways.items()}
    return figures


def sizes(dataset: BeirDataset, index: SearchIndex) -> dict[str, Any]:
    """What was measured on."""
    return {"queries": len(dataset.queries), "documents": len(dataset.corpus), "chunks": len(index)}


def by_scores(weight: float) -> Fuse:
    """Normalized scores with `weight` on the vectors."""
    return lambda lists: [key for key, _ in fuse_scores(*lists, weight)]


def by_rank(lists: Lists) -> Iterable[str]:
    """Reciprocal rank."""
    return [key for key, _ in reciprocal_rank_fusion([list(scores) for scores in lists])]


def quality(
    lists: Mapping[str, Lists], fuse: Fuse, qrels: dict[str, dict[str, int]], document_of: Mapping[str, str]
) -> float:
    """Mean nDCG@10 of the documents in the order that `fuse` gives; each stands where its best chunk does."""
    run = {}
    for query, found in lists.items():
        order = dict.fromkeys(document_of[key] for key in fuse(found))
        run[query] = {document: 1.0 / rank for rank, document in enumerate(order, 1)}
    return statistics.fmean(run_ndcg(run, qrels, 10).values())


def shortened(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For the JSON: four significant digits."""
    return {name: {k: v if isinstance(v, int) else rounded(v) for k, v in row.items()} for name, row in rows.items()}


def print_table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> None:
    """Markdown on standard output."""
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(f'{found[column]:.3f}' if column in found else '' for column in columns)} |")


if __name__ == "__main__":
    main()

"""Which fusion of two systems' runs is best: the methods of a hybrid search, their weights, and a weight by query.

    python benchmarks/dev_sets.py bm25 v2=models/search-r3-smollm2-135m-v2 --work WORK     # the dev runs
    python benchmarks/fusion_runs.py --runs WORK/runs --vectors v2.off                     # choose on dev
    python benchmarks/fusion_runs.py --test --vectors search-r3-smollm2-135m-v2.on         # once: committed test runs

Runs cost no model time. nDCG@10 of documents; the words' list is that of bm25s, which a hybrid search of an index has
not: its full text has stems and no stop words, and usually finds more (docs/indexing.md, "Hybrid search"). The weight
by query is learned on all sets but one and measured on that one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, finish, rounded, say

from search_r3.data.beir import BeirDataset, load_beir
from search_r3.data.dev_pools import POOLS, dev_set
from search_r3.data.io.find_dataset import find_dataset
from search_r3.evaluation.fusion_tuning import METHODS, SPANS, STEP
from search_r3.evaluation.runs import read_run
from search_r3.hybrid_fusion import query_features
from search_r3.metrics import run_ndcg
from search_r3.model.adaptive_reasoning import GainRegression
from search_r3.rank_fusion import VECTOR_WEIGHT, Fusion, fuse

WEIGHTS = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
"""Of the vectors."""
TESTS = {
    "cosqa": "test", "scifact": "test", "nfcorpus": "test", "cisi": "test", "cranfield": "test", "s2_search": "test",
    "mkqa/en": "test", "hotpotqa": "dev", "hotpotqa_more": "dev", "entailmentbank": "dev", "strategyqa": "dev",
}  # fmt: skip
"""Data set with committed runs -> the split that is its test."""
Lists = dict[str, tuple[str, dict[str, float], dict[str, float]]]
"""Query -> its text, and the scores of both lists."""


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = parse()
    names = tuple(options.sets or (TESTS if options.test else POOLS))
    lists, qrels = {}, {}
    for name in names:
        dataset = opened(name, options)
        folder = options.runs / (name if options.test else f"{name}.dev")
        near, words = (dict(read_run(folder / f"{run}.trec.gz")) for run in (options.vectors, options.words))
        lists[name] = {q: (text, near.get(q, {}), words.get(q, {})) for q, text in dataset.queries.items()}
        qrels[name] = dataset.qrels
        say(f"{name}: {len(dataset.queries)} queries")
    weights = options.weights or ([VECTOR_WEIGHT] if options.test else WEIGHTS)
    figures = {name: constants(lists[name], qrels[name], weights) for name in names}
    if not options.test:
        for method in METHODS:
            by_query(method, weights, lists, qrels, figures)
    columns = list(next(iter(figures.values())))
    summary = {
        "mean": {column: statistics.fmean(row[column] for row in figures.values()) for column in columns},
        "least gain over the better of the two": {
            column: min(row[column] - max(row["words"], row["vectors"]) for row in figures.values())
            for column in columns
        },
    }
    print_table(figures | summary, columns)
    about = {"vectors": options.vectors, "words": options.words}
    rows = {
        name: {column: rounded(value) for column, value in row.items()} for name, row in (figures | summary).items()
    }
    options.tiny = bool(options.sets)
    finish(f"fusion-runs-{'test' if options.test else 'dev'}", {**about, "datasets": rows}, options, 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--runs", type=Path, default=RESULTS.parent / "runs", help="SET/SYSTEM.trec.gz")
    parser.add_argument("--vectors", default="search-r3-smollm2-135m-v2.off", help="the system of the vectors' runs")
    parser.add_argument("--words", default="bm25", help="the system of the words' runs")
    parser.add_argument("--test", action="store_true", help="test queries, from committed runs")
    parser.add_argument("--weights", type=float, nargs="*", help="of the vectors; by default many, with --test 0.65")
    parser.add_argument("--sets", nargs="*", default=[], help="only these: a rehearsal")
    parser.add_argument("--json", dest="output", type=Path, help="where to write (default: results/benchmarks)")
    parser.set_defaults(device="cpu")
    return parser.parse_args()


def opened(name: str, options: argparse.Namespace) -> BeirDataset:
    """The queries and judgments of a set."""
    if options.test:
        return load_beir(find_dataset(name, options.data), TESTS[name], name=name)
    return dev_set(name, options.data)


def constants(lists: Lists, qrels: Mapping[str, Mapping[str, int]], weights: Sequence[float]) -> dict[str, float]:
    """nDCG@10 of each list and of each fusion with a constant weight."""
    alone = {"vectors": 1, "words": 2}
    found = {name: ndcg({q: list(one[place]) for q, one in lists.items()}, qrels) for name, place in alone.items()}
    found["rrf"] = ndcg(fused("rrf", lists, {}), qrels)
    for method in METHODS:
        for weight in weights:
            found[f"{method} {weight}"] = ndcg(fused(method, lists, dict.fromkeys(lists, weight)), qrels)
    return {name: float(value.mean()) for name, value in found.items()}


def by_query(
    method: Fusion,
    constant: Sequence[float],
    lists: Mapping[str, Lists],
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
    figures: dict[str, dict[str, float]],
) -> None:
    """Add the weight by query, learned on the other sets, to each set's figures; each set weighs the same."""
    middle = max(constant, key=lambda weight: statistics.fmean(row[f"{method} {weight}"] for row in figures.values()))
    features, gains = {}, {}
    for name, some in lists.items():
        features[name] = np.array([query_features(*some[query]) for query in qrels[name]])
        more, less = (
            ndcg(fused(method, some, dict.fromkeys(some, middle + step)), qrels[name]) for step in (STEP, -STEP)
        )
        gains[name] = more - less
    for name in lists:
        others = [other for other in lists if other != name] or [name]
        gain_Q = np.concatenate([gains[other] / len(gains[other]) for other in others])
        model = GainRegression.fit(np.vstack([features[other] for other in others]), gain_Q)
        share_Q = 1 / (1 + np.exp(-np.clip(model.logits(features[name]), -50, 50)))
        for span in SPANS:
            weight_Q = np.clip(middle + span * (2 * share_Q - 1), 0, 1)
            weights = dict(zip(qrels[name], weight_Q.tolist(), strict=True))
            figures[name][f"{method} {middle} ± {span}"] = float(
                ndcg(fused(method, lists[name], weights), qrels[name]).mean()
            )


def fused(method: Fusion, lists: Lists, weights: Mapping[str, float]) -> dict[str, list[str]]:
    """Each query's documents in the order of a fusion."""
    return {
        query: [key for key, _ in fuse(method, near, words, weights.get(query, VECTOR_WEIGHT))]
        for query, (_, near, words) in lists.items()
    }


def ndcg(orders: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, int]]) -> np.ndarray:
    """nDCG@10 of each query of `qrels`, (Q,)."""
    run = {query: {name: 1.0 / rank for rank, name in enumerate(order[:10], 1)} for query, order in orders.items()}
    found = run_ndcg(run, qrels, 10)
    return np.array([found[query] for query in qrels])


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Markdown on standard output, a row for each fusion."""
    print(f"| | {' | '.join(rows)} |\n|{'---|' * (len(rows) + 1)}")
    for column in columns:
        print(f"| {column} | {' | '.join(f'{row[column]:.4f}' for row in rows.values())} |")


if __name__ == "__main__":
    main()

"""Which adapter is best on dev: six dev sets over their whole corpora or parts, no test query.

    python benchmarks/dev_sets.py runs/a/best runs/b/best --dtype bfloat16        # 20 minutes an adapter on two cores
    python benchmarks/dev_sets.py bm25 all-minilm-l6-v2 mine=runs/a/adapter       # systems as of `search-r3 evaluate`
    python benchmarks/dev_sets.py runs/a/best runs/b/best --sets cosqa strategyqa
    python benchmarks/dev_sets.py runs/a/best runs/b/best --queries 200 --documents 1000    # fixed parts: 3 minutes
    python benchmarks/dev_sets.py runs/a/best --variants original lower typos    # and what changed queries cost

For ablations, whose runs' own figures are of small pools. The queries are those of `data.dev_pools.dev_set`: cosqa's
and nfcorpus's split dev, and the eighth of the train queries of scifact, hotpotqa_more, entailmentbank and strategyqa
that no recipe trains on. Documents are cut at 256 tokens, as all-MiniLM-L6-v2's are.

Every other system is compared with the first: the difference of the means over the sets, and p by a paired
randomization test over all queries in which each set weighs the same. Embeddings are cached and each set's run is kept
in `--work`, so an interrupted run resumes with the same command and repeats no measurement.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, rounded, say, write_report

from search_r3.data.beir import BeirDataset
from search_r3.data.dev_pools import POOLS, dev_pool, dev_set
from search_r3.data.query_variants import ORIGINAL, check_kinds
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.significance import paired, randomization_test
from search_r3.evaluation.suite import evaluate_system, paths
from search_r3.evaluation.systems import System, open_systems, split_label
from search_r3.evaluation.variant_system import VariantSystem
from search_r3.hints import refuse_unknown

SEED = 0
SETS = ("cosqa", "nfcorpus", "scifact", "hotpotqa_more", "entailmentbank", "strategyqa")
WITHIN_A_RUN = ("adapter", "best")
"""Folders of a training run that need the run's name beside their own."""
PerQuery = dict[str, dict[str, float]]
"""Set -> query -> nDCG@10."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON if one is asked for."""
    options = parse(argv)
    refuse_unknown(options.sets, tuple(POOLS), "--sets", what="dev set")
    check_kinds(options.variants)
    names = [named(spec) for spec in options.systems]
    if len(set(names)) < len(names):
        raise SystemExit(f"two systems have one name ({', '.join(names)}); name them: LABEL=SPEC")
    datasets = [opened_set(kind, options) for kind in options.sets]
    cache = EmbeddingCache(options.cache)
    found: dict[str, PerQuery] = {}
    for spec in names:
        opened_system = opened(spec, options)
        for kind in options.variants:
            system = opened_system if kind == ORIGINAL else VariantSystem(opened_system, kind)
            found[system.name] = {dataset.name: measured(dataset, system, options.work, cache) for dataset in datasets}
    figures = {name: compared(per_query, next(iter(found.values()))) for name, per_query in found.items()}
    print_table(figures, [dataset.name for dataset in datasets], options.mode)
    if options.output is not None:
        about = {"mode": options.mode, "max_length": options.max_length}
        about |= {"dtype": options.dtype, "engine": options.engine}
        about |= {"queries": {dataset.name: len(dataset.qrels) for dataset in datasets}}
        write_report(
            "dev_sets", about | {"systems": figures}, device=options.device or "cpu", seed=SEED, output=options.output
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "systems", nargs="+", help="adapters' folders, names of models, baselines; LABEL=SPEC names one"
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--data", type=Path, help="folder of BEIR data sets; by default SEARCH_R3_DATA")
    parser.add_argument(
        "--queries", type=int, help="at most this many queries of each set; see `data.dev_pools.dev_pool`"
    )
    parser.add_argument("--documents", type=int, help="at most this many documents of each set")
    parser.add_argument("--max-length", type=int, default=256, help="tokens kept of each document")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--engine", default="auto", help="as of `search-r3 evaluate`")
    parser.add_argument("--mode", default="off", help="as of `search-r3 evaluate`")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[ORIGINAL],
        metavar="KIND",
        help="how queries are written, as `search-r3 evaluate --queries`: original, lower, typos, ... Each but the "
        "original is a system of its own, SYSTEM.KIND; name the original too to compare them",
    )
    parser.add_argument("--device")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/dev-sets"), help="where runs and measures are kept")
    parser.add_argument("--cache", type=Path, help="where embeddings are kept; by default the cache folder")
    parser.add_argument("--json", dest="output", type=Path, help="write the figures there")
    return parser.parse_args(argv)


def named(spec: str) -> str:
    """The spec with a label if it is a folder that every training run has: runs/a/best is "a-best"."""
    label, source = split_label(spec)
    folder = Path(source)
    if label is None and folder.name in WITHIN_A_RUN and folder.is_dir():
        return f"{folder.resolve().parent.name}-{folder.name}={source}"
    return spec


def opened_set(kind: str, options: argparse.Namespace) -> BeirDataset:
    """A dev set or, with --queries or --documents, a fixed part of it, under a name that no test set has."""
    if options.queries is None and options.documents is None:
        dataset = dev_set(kind, options.data)
        dataset.name = f"{kind}.dev"
        return dataset
    dataset = dev_pool(kind, options.data, options.queries or 10**6, options.documents or 10**6)
    dataset.name = f"{kind}.dev.{len(dataset.queries)}.{len(dataset.corpus)}"
    return dataset


def opened(spec: str, options: argparse.Namespace) -> System:
    """The one system of a spec, in the mode that is measured."""
    return open_systems(
        spec,
        modes=(options.mode,),
        max_length=options.max_length,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        engine=options.engine,
    )[0]


def measured(dataset: BeirDataset, system: System, work: Path, cache: EmbeddingCache) -> dict[str, float]:
    """nDCG@10 of every query; the run is kept."""
    record, fresh = evaluate_system(dataset, "dev", system, work, cache, seed=SEED)
    say(f"{dataset.name} {system.name}: {record['measures'][NDCG]:.4f}" + ("" if fresh else " (already there)"))
    run = read_run(paths(work, dataset.name, system.name).run)
    return measure_run(run, dataset.qrels).per_query[NDCG]


def compared(per_query: PerQuery, first: PerQuery) -> dict[str, Any]:
    """The means, and how they differ from the first system's."""
    means = {name: statistics.fmean(values.values()) for name, values in per_query.items()}
    differences_Q = equally_weighed([paired(first[name], values) for name, values in per_query.items()])
    return {
        "ndcg@10": {name: rounded(value) for name, value in means.items()},
        "mean": rounded(statistics.fmean(means.values())),
        "difference": rounded(float(differences_Q.mean())),
        "p": rounded(randomization_test(differences_Q, seed=SEED)),
    }


def equally_weighed(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The queries' differences of all sets in one row, whose mean is the mean over the sets of each one's mean."""
    total = sum(map(len, parts))
    return np.concatenate([part * total / (len(part) * len(parts)) for part in parts])


def print_table(figures: Mapping[str, dict[str, Any]], sets: Sequence[str], mode: str) -> None:
    """One row per system, best mean first."""
    table = Table(f"nDCG@10, mode {mode}", "system" + " " * 24, *sets, "mean", "to first", "p")
    for name, row in sorted(figures.items(), key=lambda item: -item[1]["mean"]):
        cells = [f"{row['ndcg@10'][one]:.4f}" for one in sets]
        table.row(name, *cells, f"{row['mean']:.4f}", f"{row['difference']:+.4f}", f"{row['p']:.3f}")


if __name__ == "__main__":
    main()

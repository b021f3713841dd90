"""Measure the rewards of a model's sampled reasoning traces on a data set, before and after training.

`results/rollouts/DATASET.SPLIT/` holds, for each model, NAME.json (metrics, histograms, values for each query) and
NAME.rollouts.jsonl.gz (every trace with its rewards), and for two models BEFORE--AFTER.json, computed from these files.
The corpus is encoded in full by the model itself, so nothing is stale; its embeddings are those that evaluations cache.
Finished measurements are reused.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.beir import BeirDataset, available_splits, choose_pool
from search_r3.data.beir import small as small_part
from search_r3.data.dev_pools import POOLS, dev_set
from search_r3.data.io.find_dataset import find_dataset
from search_r3.environment.rewards import MISSING_TOKEN_REWARD
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.json_format import as_json
from search_r3.evaluation.provenance import provenance
from search_r3.evaluation.records import SMALL, finished_record, ignored_ids
from search_r3.evaluation.rollouts.reasoning_rewards import (
    EDGES,
    MEASURED_REWARDS,
    METRICS,
    EmbeddingRewards,
    compare,
    per_query,
    score_embeddings,
    summarize,
)
from search_r3.evaluation.runs import read_gzip_lines, write_jsonl_gzip
from search_r3.evaluation.suite import dataset_hash, load_dataset
from search_r3.evaluation.systems import SearchR3System, check_spec, model_name, open_systems, split_label
from search_r3.files import atomic_write_text, sha256_of
from search_r3.retrievers.dense import BUNDLED

FORMAT = 1
EXAMPLES = 5
HEADLINE = "penalized.dcg_scaled"
"""The metric by which examples are chosen: stage 2's default reward, with the penalty for a missing token."""
BETWEEN = "--"
"""Separates two models' names in a file name."""


@dataclass
class RolloutConfig:
    """How rollouts are sampled and scored."""

    samples: int = 6
    """Number of sampled reasoning traces for each query."""
    budget: int = 24
    """Maximum number of tokens in a trace, without the embed token."""
    temperature: float = 1.0
    """Sampling temperature; the greedy trace is always measured as well."""
    k: int = 10
    """Number of ranks that the rewards consider."""
    seed: int = 0
    """Seed of the samples and of the bootstrap."""
    batch_size: int = 32
    """Texts per forward pass. A sample depends on the seed and its batch, so this affects the results."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("budget", 0), ("k", 1), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature is {self.temperature}; expected a sampling temperature above 0, such as 1.0")


def measure_rollouts(
    dataset: str,
    split: str,
    before: str,
    after: str | None = None,
    output: str | Path = "results",
    config: RolloutConfig | None = None,
    *,
    queries: int | None = None,
    documents: int | None = None,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    data_root: str | Path | None = None,
    ignore_identical_ids: bool = False,
    cache: EmbeddingCache | None = None,
    force: bool = False,
    show_progress: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure one model or two, and compare them; returns the contents of the file that was written last.

    A model already measured with these settings and data is not measured again; only one model is loaded at a time.

    Args:
        dataset: a data set's name or BEIR folder; "NAME.small" is its fixed part.
        split: one of its splits. scifact's "dev" consists of the train claims that are never trained on.
        before, after: SearchR3 models; "LABEL=SPEC" names one. Without `after`, only `before` is measured.
        output: the folder that holds `rollouts/`.
        queries, documents: size limits of a fixed part of the data set (judged documents are always kept); None means
            all.
        max_length: tokens kept of each document (512 by default).
        ignore_identical_ids: as in MTEB, ignore documents with the query's own id.
        cache: where documents' embeddings are stored; None uses the default folder.
        force: measure again even if results exist.
        report: called with one line at each stage.

    Raises:
        InputError: a data set, split or model is unknown, a model does not reason, two models have the same name, or a
            number is invalid; raised before any computation if possible.
    """
    config, report = config or RolloutConfig(), report or (lambda line: None)
    for what, value in (("queries", queries), ("documents", documents)):
        if value is not None and value < 1:
            raise InputError(f"{what} is {value}; expected 1 or more, or all of them")
    specs = [before] if after is None else [before, after]
    names = [_name(spec) for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"{before} and {after} are both called {names[0]}; give one a name: after={after}")
    data, part_name = load_part(dataset, split, data_root, queries, documents)
    data.ignore_identical_ids = ignore_identical_ids
    folder = Path(output) / "rollouts" / part_name
    models = []
    for spec, name in zip(specs, names, strict=True):
        system = open_systems(
            spec,
            modes=("off",),
            max_length=max_length,
            batch_size=config.batch_size,
            device=device,
            dtype=dtype,
            show_progress=show_progress,
        )[0]
        assert isinstance(system, SearchR3System)  # `_name` has refused the others
        settings = json.loads(json.dumps(_settings(data, split, system, config)))
        record = None if force else _existing(folder, name, settings)
        reused = record is not None
        if record is None:
            store = cache or EmbeddingCache()
            record = _measure(data, part_name, system, name, config, settings, folder, store, report)
        means = ", ".join(f"{metric} {record['figures'][metric]['mean']:.4f}" for metric in METRICS[::2])
        report(f"{part_name} {name}: {means}" + (" (already there)" if reused else ""))
        models.append(record)
        del system
        gc.collect()  # the model, before the next one is loaded
    if len(models) == 1:
        return models[0]
    comparison = _comparison(data, models[0], models[1], folder, config)
    atomic_write_text(folder / f"{names[0]}{BETWEEN}{names[1]}.json", as_json(comparison))
    return comparison


def load_part(
    dataset: str, split: str, data_root: str | Path | None, queries: int | None = None, documents: int | None = None
) -> tuple[BeirDataset, str]:
    """The queries of a split that have a relevant document, with the corpus; and the name of this part in results.

    The part is the same for every seed of the samples. Its name is "DATASET.SPLIT", and shows a limit that cut it:
    "scifact.dev.20q.500d".

    Raises:
        InputError: no such data set or split, or no query with a relevant document.
    """
    base = dataset.removesuffix(SMALL)
    if split == "dev" and base in POOLS and split not in available_splits(find_dataset(base, data_root)):
        data = dev_set(base, data_root)  # as for scifact, which has no file of that name
        data = small_part(data) if base != dataset else data
    else:
        data = load_dataset(dataset, split, data_root)
    part = choose_pool(data, queries or len(data.queries), documents or len(data.corpus))
    if not part.queries:
        raise InputError(f"{dataset}: no query of split {split} has a relevant document; give another with --split")
    part_name = f"{data.name}.{split}"
    part_name += f".{len(part.queries)}q" if queries is not None and len(part.queries) < len(data.queries) else ""
    part_name += f".{len(part.corpus)}d" if len(part.corpus) < len(data.corpus) else ""
    return part, part_name


def _measure(
    data: BeirDataset,
    part_name: str,
    system: SearchR3System,
    name: str,
    config: RolloutConfig,
    settings: dict[str, Any],
    folder: Path,
    cache: EmbeddingCache,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Encode, sample and score with one model, and write its record."""
    texts = {did: document.full_text for did, document in data.corpus.items()}
    searchable = {did: text for did, text in texts.items() if text.strip()}
    if not searchable:
        raise InputError(f"{data.name}: every document of this part is empty; raise --documents")
    system.name = name  # for the progress bar: the mode is irrelevant here
    report(f"{part_name} {name}: {len(searchable):,} documents, from the cache or to be encoded")
    documents_ND, document_seconds = system.document_rows(searchable, cache)

    model, queries = system.model, list(data.queries.values())
    bar = sys.stderr.isatty() if system.show_progress is None else system.show_progress
    options = {"batch_size": config.batch_size, "show_progress_bar": bar}
    seconds = {"documents": document_seconds}
    started = time.perf_counter()
    direct_QD = model.encode_query(queries, reasoning=False, **options)
    seconds["direct"] = time.perf_counter() - started
    started = time.perf_counter()
    greedy = model.reason(queries, max_reasoning_tokens=config.budget, **options)
    seconds["greedy"] = time.perf_counter() - started
    report(f"{part_name} {name}: {config.samples * len(queries):,} reasoning traces to sample")
    started = time.perf_counter()
    sampled = model.reason(
        queries,
        max_reasoning_tokens=config.budget,
        temperature=config.temperature,
        seed=config.seed,
        samples=config.samples,
        **options,
    )
    seconds["sampled"] = time.perf_counter() - started

    row_of = {did: row for row, did in enumerate(searchable)}
    judged = [data.qrels[qid] for qid in data.queries]
    grades_Q = [{row_of[did]: grade for did, grade in grades.items() if did in row_of} for grades in judged]
    empty_Q = [[grade for did, grade in grades.items() if did not in row_of] for grades in judged]
    ignored_Q = [row_of.get(qid) for qid in data.queries] if data.ignore_identical_ids else None

    def score(embeddings_RD: np.ndarray, each: int) -> EmbeddingRewards:
        numbers = np.repeat(np.arange(len(queries)), each)
        return score_embeddings(
            embeddings_RD, numbers, grades_Q, documents_ND, k=config.k, unfindable_Q=empty_Q, ignored_Q=ignored_Q
        )

    by_sample = score(np.stack([r.embedding for r in sampled]), config.samples)
    by_greedy, by_direct = score(np.stack([r.embedding for r in greedy]), 1), score(direct_QD, 1)
    emitted = [not r.forced for r in sampled]
    tokens = [r.num_tokens for r in sampled]
    metrics, counts = summarize(by_sample, emitted, by_greedy, by_direct)
    lines = list(_lines(list(data.queries), sampled, by_sample, greedy, by_greedy, by_direct))
    path = _rollouts_path(folder, name)
    write_jsonl_gzip(path, lines)
    record: dict[str, Any] = {
        "dataset": part_name,
        "system": name,
        "num_queries": len(queries),
        "num_documents": len(texts),
        "num_empty_documents": len(texts) - len(searchable),
        **ignored_ids(data),
        "figures": metrics,
        "emission_rate": {
            "sampled": float(np.mean(emitted)),
            "greedy": float(np.mean([not r.forced for r in greedy])),
        },
        "mean_tokens": {
            "sampled": float(np.mean(tokens)),
            "greedy": float(np.mean([r.num_tokens for r in greedy])),
        },
        "histograms": {"edges": list(EDGES), "counts": counts},
        "queries": list(data.queries),
        "per_query": per_query(by_sample, emitted, tokens, by_greedy, by_direct),
        "examples": _best_and_worst(data, lines),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        **provenance(config.seed, system.device),
        "settings": settings,
        "rollouts": path.name,
        "rollouts_sha256": sha256_of(path),
    }
    atomic_write_text(folder / f"{name}.json", as_json(record))
    return record


def _comparison(
    data: BeirDataset, before: dict[str, Any], after: dict[str, Any], folder: Path, config: RolloutConfig
) -> dict[str, Any]:
    comparisons, differences = compare(before["per_query"], after["per_query"], config.seed)
    models = {"before": before, "after": after}
    return {
        "dataset": before["dataset"],
        "num_queries": before["num_queries"],
        "num_documents": before["num_documents"],
        "comparisons": {metric: comparison.to_dict() for metric, comparison in comparisons.items()},
        "queries": before["queries"],
        "differences": differences,
        "examples": _gains_and_losses(data, models, differences[HEADLINE], folder),
        **{name: {key: value for key, value in model.items() if key != "examples"} for name, model in models.items()},
        **provenance(config.seed),
        "hardware": after["hardware"],
        "settings": {"format": FORMAT, "interval": "percentile bootstrap over queries", "seed": config.seed},
    }


def _lines(
    qids: Sequence[str],
    sampled: Sequence[Any],
    by_sample: EmbeddingRewards,
    greedy: Sequence[Any],
    by_greedy: EmbeddingRewards,
    by_direct: EmbeddingRewards,
) -> Any:
    """One record per rollout, query by query: its samples, then the greedy trace, then the direct embedding."""
    each = len(sampled) // len(qids)
    for number, qid in enumerate(qids):
        groups = [("sampled", by_sample, i, sampled[i]) for i in range(number * each, (number + 1) * each)]
        for kind, scored, i, r in [*groups, ("greedy", by_greedy, number, greedy[number])]:
            written = {"text": r.text, "tokens": r.num_tokens, "forced": bool(r.forced)}
            yield {"qid": qid, "kind": kind, **written, **_rewards_of(scored, i)}
        yield {"qid": qid, "kind": "direct", **_rewards_of(by_direct, number)}


def _rewards_of(scored: EmbeddingRewards, i: int) -> dict[str, Any]:
    rewards = {name: round(float(scored.rewards[name][i]), 6) for name in MEASURED_REWARDS}
    return {**rewards, "rank": int(scored.rank_R[i]) or None}


def _best_and_worst(data: BeirDataset, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The sampled rollouts with the highest and lowest rewards, at most one per query."""
    rewarded = [(_penalized_reward(line), i) for i, line in enumerate(lines) if line["kind"] == "sampled"]
    examples = {}
    for name, order in (("best", sorted(rewarded, key=lambda one: (-one[0], one[1]))), ("worst", sorted(rewarded))):
        seen: dict[str, dict[str, Any]] = {}
        for _, i in order:
            if len(seen) < EXAMPLES:
                seen.setdefault(lines[i]["qid"], {"query": data.queries[lines[i]["qid"]], **lines[i]})
        examples[name] = list(seen.values())
    return examples


def _gains_and_losses(
    data: BeirDataset, models: Mapping[str, dict[str, Any]], difference_Q: Sequence[float], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """The queries whose rollouts gained and lost most, with the traces before and after."""
    written: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in models}
    for name, model in models.items():
        for line in map(json.loads, read_gzip_lines(folder / model["rollouts"])):
            written[name].setdefault(line.pop("qid"), []).append(line)
    qids = models["before"]["queries"]

    def one(i: int) -> dict[str, Any]:
        about = {"qid": qids[i], "query": data.queries[qids[i]], "difference": difference_Q[i]}
        return about | {name: written[name][qids[i]] for name in models}

    order = sorted(range(len(qids)), key=lambda i: (-difference_Q[i], i))
    return {
        "best": [one(i) for i in order[:EXAMPLES] if difference_Q[i] > 0],
        "worst": [one(i) for i in order[::-1][:EXAMPLES] if difference_Q[i] < 0],
    }


def _penalized_reward(line: Mapping[str, Any]) -> float:
    return MISSING_TOKEN_REWARD if line["forced"] else line[HEADLINE.partition(".")[2]]


def _name(spec: str) -> str:
    """The model's name in results. Raises InputError for a model that does not exist or does not reason."""
    label, source = split_label(spec)
    if source == "bm25" or source in BUNDLED or source.startswith("st:"):
        raise InputError(f"{spec} writes no reasoning, so it has no rollouts; give a SearchR3 model")
    check_spec(spec)
    name = label or model_name(source)
    if BETWEEN in name:
        raise InputError(f"{spec} is called {name}, but {BETWEEN} separates two models' names; name it: LABEL={source}")
    return name


def _settings(data: BeirDataset, split: str, system: SearchR3System, config: RolloutConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "split": split,
        "data_hash": dataset_hash(data),
        "identity": system.document_identity,
        "missing_token_reward": MISSING_TOKEN_REWARD,
        **asdict(config),
        **({"ignore_identical_ids": True} if data.ignore_identical_ids else {}),
    }


def _existing(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a model already measured with these settings, with its rollouts next to it; or None."""
    path = folder / f"{name}.json"
    record = finished_record(path, settings, _rollouts_path(folder, name), "rollouts_sha256")
    return record if record is not None and set(METRICS) <= record.get("per_query", {}).keys() else None


def _rollouts_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.rollouts.jsonl.gz"

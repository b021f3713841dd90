"""Evaluate systems on data sets: a TREC run and a metrics file for each pair, and finished work is reused.

For every pair `results/runs/DATASET/SYSTEM.trec.gz` holds the exact top 100 and `results/metrics/DATASET/SYSTEM.json`
its metrics and everything needed to reproduce them. A pair is skipped if both exist for the
same model, settings and data, so an interrupted evaluation is resumed by repeating its command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, available_splits, dataset_name, load_beir, small
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.query_variants import ORIGINAL, check_kinds
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import CostApproval
from search_r3.evaluation.embedding_cache import EmbeddingCache, content_hash
from search_r3.evaluation.measures import measure_run
from search_r3.evaluation.provenance import provenance
from search_r3.evaluation.runs import drop_identical_ids, write_jsonl_gzip, write_run
from search_r3.evaluation.systems import MODES, Answers, System, check_modes, check_spec, open_systems
from search_r3.evaluation.variant_system import VariantSystem, refuse_variant_name
from search_r3.files import atomic_write_text, sha256_of
from search_r3.hints import refuse_unknown

DEPTH = 100
"""Documents kept for each query: the depth of recall@100."""
SPLITS = {"hotpotqa": "dev"}
"""Data sets whose test split has another name (HotpotQA's test labels are not public); all others use "test"."""
SMALL = ".small"
VARIANT_RECORDS = "query_variants"
"""The folder of the records of queries written otherwise: results of the same data sets that no table may mix in."""
FORMAT = 1
MAX_LISTED = 20


@dataclass(frozen=True)
class ResultPaths:
    """The paths of the files of one data set and system."""

    run: Path
    reasoning: Path
    metrics: Path


@dataclass(frozen=True)
class Failure:
    """A system, a data set, or a pair of both that could not be evaluated, and why."""

    system: str | None
    dataset: str | None
    error: Exception

    @property
    def line(self) -> str:
        """One line: what and why."""
        what = " ".join(name for name in (self.dataset, self.system) if name)
        kind = "" if isinstance(self.error, InputError) else f"{type(self.error).__name__}: "
        return f"{what}: {kind}{' '.join(str(self.error).split())}"


def evaluate(
    datasets: Sequence[str],
    systems: Sequence[str],
    output: str | Path = "results",
    split: str | None = None,
    *,
    modes: Sequence[str] = MODES,
    queries: Sequence[str] = (ORIGINAL,),
    max_length: int | None = None,
    max_reasoning_tokens: int = 32,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str = "auto",
    data_root: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    use_cache: bool = True,
    force: bool = False,
    seed: int = 0,
    allow_missing: bool = False,
    ignore_identical_ids: bool | Sequence[str] = False,
    approval: CostApproval | None = None,
    show_progress: bool | None = None,
    report: Callable[[str], None] | None = None,
    failed: Callable[[Failure], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate every system on every data set; returns the contents of the metrics files, system by system.

    Args:
        datasets: names under the data root, or BEIR folders; "NAME.small" is the fixed sub-corpus of 500 documents.
        systems: see `systems.open_systems`.
        output: the folder that holds `runs/` and `metrics/`.
        split: judgments to use; None takes "test", or "dev" where that is the data set's public test (hotpotqa).
        modes: reasoning "off", "on" or "latent", for SearchR3 models.
        queries: how they are written, for every system: "original", or otherwise (`query_variants.VARIANTS`), which
            gives runs called SYSTEM.KIND and records under `query_variants/`, out of the tables of results.
        max_length: cut documents at this many tokens, for SearchR3 models (512 by default).
        cache: where document embeddings are stored; None uses the default folder. `use_cache=False` disables it.
        force: evaluate again even if results exist.
        seed: recorded, and passed to torch; decoding is greedy.
        allow_missing: evaluate on a data set whose judgments include documents that are not in its corpus; every
            record, table and card says so.
        ignore_identical_ids: as MTEB's: no document with a query's own id is an answer to it, on all data sets or on
            those that are named. Where it is not set and queries find themselves, every record, table and card says so.
        approval: who approves what endpoints cost; by default, nothing above a system's limit is sent.
        report: called with one line per pair, and before and after texts are sent to an endpoint.
        failed: called for each failed data set, system or pair; the others are still evaluated. Without it the first
            failure is raised.

    Raises:
        InputError: a data set, split, system, mode or kind of query is unknown; raised before any computation if
            possible.
    """
    check_modes(modes)
    check_kinds(queries)
    if not datasets or not systems:
        raise InputError("nothing to evaluate: give at least one data set and one system")
    found = [spec for spec in systems if _attempt(failed, spec, None, check_spec, spec)]
    here = [name for name in datasets if _attempt(failed, None, name, _locate, name, data_root, split)]
    report = report or (lambda line: None)
    store = None if not use_cache else cache or EmbeddingCache()
    named = () if isinstance(ignore_identical_ids, bool) else tuple(ignore_identical_ids)
    refuse_unknown(named, datasets, "ignore_identical_ids", "data set")
    loaded: dict[str, BeirDataset] = {}
    records: list[dict[str, Any]] = []
    names: dict[str, str] = {}

    def open_all(spec: str, into: list[System]) -> None:
        into += open_systems(
            spec,
            modes=modes,
            max_length=max_length,
            max_reasoning_tokens=max_reasoning_tokens,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            show_progress=show_progress,
            approval=approval or CostApproval(report=report),
        )
        for system in into:
            refuse_variant_name(system.name)
            if names.setdefault(system.name, spec) != spec:
                raise InputError(
                    f"{names[system.name]} and {spec} are both called {system.name}; give one a name: LABEL={spec}"
                )

    def read(given: str) -> None:
        ignore = ignore_identical_ids is True or given in named
        loaded[given] = load_dataset(given, split, data_root, allow_missing, ignore)

    def one(given: str, system: System) -> None:
        dataset, used_split = loaded[given], _locate(given, data_root, split)[2]
        record, fresh = evaluate_system(dataset, used_split, system, output, store, force=force, seed=seed)
        records.append(record)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in record["measures"].items())
        noted = "".join(f"; {remark}" for remark in remarks(record))
        report(f"{dataset.name} {system.name}: {shown}" + ("" if fresh else " (already there)") + noted)

    for spec in found:
        opened: list[System] = []
        if not _attempt(failed, spec, None, open_all, spec, opened):
            continue
        asked: list[System] = [
            each if kind == ORIGINAL else VariantSystem(each, kind) for each in opened for kind in queries
        ]
        for given in list(here):
            if given not in loaded and not _attempt(failed, None, given, read, given):
                here.remove(given)  # reported once, not for every system
                continue
            for system in asked:
                _attempt(failed, system.name, given, one, given, system)
    return records


def remarks(record: dict[str, Any]) -> list[str]:
    """What a reader of a metrics record must know of its data: relevant documents that are not in the corpus
    or empty cannot be found by any system, a query without an answer counts as 0, and one that is a document of the
    corpus finds itself unless documents of a query's own id are left out."""
    relevant, empty, unanswered = (
        record.get(f"num_{name}", 0) for name in ("missing_documents", "empty_documents", "missing_queries")
    )
    found = []
    if relevant:
        found.append(
            f"{relevant:,} relevant documents are not in the corpus ({', '.join(record['missing_documents'])})"
        )
    if empty:
        found.append(f"{empty:,} documents are empty and never found")
    if unanswered:
        found.append(f"{unanswered:,} of {record['num_queries']:,} queries have no answer and count as 0")
    if record.get("ignore_identical_ids"):
        found.append(f"a document with a query's own id is left out, for {record['num_identical_ids']:,} queries")
    elif inside := record.get("num_queries_in_corpus", 0):
        found.append(
            f"{inside:,} queries are documents of the corpus, by id and text, and find themselves; "
            "--ignore-identical-ids leaves these out"
        )
    return found


def evaluate_system(
    dataset: BeirDataset,
    split: str,
    system: System,
    output: str | Path,
    cache: EmbeddingCache | None,
    *,
    force: bool = False,
    seed: int = 0,
    files: ResultPaths | None = None,
) -> tuple[dict[str, Any], bool]:
    """Evaluate one system on one data set; returns its metrics record and whether it was computed just now.

    Its files stand where `paths` and, for changed queries, `variant_path` say, unless `files` names other places.
    """
    files = files or _usual_paths(output, dataset.name, system)
    settings = _settings(dataset, split, system)
    existing = None if force else _existing(files, settings)
    if existing is not None:
        return existing, False
    _seed(seed)
    documents = {did: document.full_text for did, document in dataset.corpus.items()}
    searchable = {did: text for did, text in documents.items() if text.strip()}
    queries = {qid: dataset.queries[qid] for qid in dataset.qrels if qid in dataset.queries}
    if not queries:
        raise InputError(f"{dataset.name}: split {split} judges no query that queries.jsonl holds")
    started = time.perf_counter()
    answers = system.answer(searchable, queries, DEPTH + dataset.ignore_identical_ids, cache)
    if dataset.ignore_identical_ids:
        answers.run = drop_identical_ids(answers.run, DEPTH)
    seconds = time.perf_counter() - started
    measured = measure_run(answers.run, dataset.qrels, dataset.corpus)
    write_run(files.run, answers.run, system.name, DEPTH)
    record: dict[str, Any] = {
        "dataset": dataset.name,
        "system": system.name,
        **({"queries": system.kind, "queries_of": system.of} if isinstance(system, VariantSystem) else {}),
        "measures": measured.mean,
        "num_queries": len(dataset.qrels),
        "num_documents": len(documents),
        "num_empty_documents": len(documents) - len(searchable),
        "num_missing_queries": len(measured.missing_queries),
        "missing_queries": measured.missing_queries[:MAX_LISTED],
        "num_missing_documents": len(measured.missing_documents),
        "missing_documents": measured.missing_documents[:MAX_LISTED],
        **_identical(dataset),
        "max_length": system.identity.get("max_length"),
        "dtype": system.identity.get("dtype"),
        "contract_hash": system.identity.get("contract_hash"),
        "seconds": {
            "documents": round(answers.document_seconds, 3),
            "queries": round(answers.query_seconds, 3),
            "this_run": round(seconds, 3),
        },
        **_reasoning(answers, system, files),
        **provenance(seed, system.device),
        "settings": settings,
        "run_sha256": sha256_of(files.run),
    }
    atomic_write_text(files.metrics, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record, True


def existing_record(files: ResultPaths, dataset: BeirDataset, split: str, system: System) -> dict[str, Any] | None:
    """The record of a system that is already evaluated with these settings and data, or None."""
    return _existing(files, _settings(dataset, split, system))


def load_dataset(
    name: str,
    split: str | None = None,
    data_root: str | Path | None = None,
    allow_missing: bool = False,
    ignore_identical_ids: bool = False,
) -> BeirDataset:
    """A data set with the judgments of its test split (see SPLITS); "NAME.small" is its fixed sub-corpus.

    With `ignore_identical_ids`, no document with a query's own id counts as an answer to it.

    Raises:
        InputError: no such data set or split; or its judgments name a document that it lacks, unless `allow_missing`.
    """
    folder, shown, used_split, cut = _locate(name, data_root, split)
    dataset = load_beir(folder, used_split, name=shown, allow_missing=allow_missing)
    dataset.ignore_identical_ids = ignore_identical_ids
    return small(dataset) if cut else dataset


def dataset_hash(dataset: BeirDataset) -> str:
    """A hash of all data that determine the metrics: documents, judged queries, judgments."""
    texts = [document.full_text for document in dataset.corpus.values()]
    judged = [qid for qid in dataset.qrels if qid in dataset.queries]
    lines = [f"{qid}\t{did}\t{grade}" for qid, grades in dataset.qrels.items() for did, grade in grades.items()]
    return content_hash(list(dataset.corpus), texts, judged, [dataset.queries[qid] for qid in judged], lines)


def paths(output: str | Path, dataset: str, system: str) -> ResultPaths:
    """The files of one data set and system under `output`."""
    runs = Path(output) / "runs" / dataset
    return ResultPaths(
        run=runs / f"{system}.trec.gz",
        reasoning=runs / f"{system}.reasoning.jsonl.gz",
        metrics=Path(output) / "metrics" / dataset / f"{system}.json",
    )


def variant_path(output: str | Path, dataset: str, system: str, kind: str) -> Path:
    """The record of a system that was asked the queries written as `kind`."""
    return Path(output) / VARIANT_RECORDS / dataset / system / f"{kind}.json"


def _usual_paths(output: str | Path, dataset: str, system: System) -> ResultPaths:
    usual = paths(output, dataset, system.name)
    if not isinstance(system, VariantSystem):
        return usual
    return ResultPaths(usual.run, usual.reasoning, variant_path(output, dataset, system.of, system.kind))


def read_record(path: Path) -> dict[str, Any]:
    """A metrics file. Raises InputError if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["dataset"], record["system"], record["measures"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a metrics file ({error}); delete it and evaluate again") from error
    return record


def _attempt(
    failed: Callable[[Failure], None] | None, system: str | None, dataset: str | None, action: Callable, *given: Any
) -> bool:
    """Do `action(*given)`; whether it went well. A failure is given to `failed`, or raised where that is None."""
    try:
        action(*given)
    except Exception as error:
        if failed is None:
            raise
        failed(Failure(system, dataset, error))
        return False
    return True


def _locate(name: str, data_root: str | Path | None, split: str | None) -> tuple[Path, str, str, bool]:
    """Folder, name for the results, split, and whether the small sub-corpus is meant."""
    cut = name.endswith(SMALL)
    folder = find_dataset(name.removesuffix(SMALL), data_root)
    shown = dataset_name(folder, data_root)
    used = split or SPLITS.get(shown, "test")
    splits = available_splits(folder)
    if used not in splits:
        raise InputError(f"{shown} has no split {used!r}; it has: {', '.join(splits) or 'none'}; give one with --split")
    return folder, shown, used, cut


def _settings(dataset: BeirDataset, split: str, system: System) -> dict[str, Any]:
    settings = {
        "format": FORMAT,
        "split": split,
        "depth": DEPTH,
        "data_hash": dataset_hash(dataset),
        "identity": system.identity,
    }
    if dataset.ignore_identical_ids:
        settings["ignore_identical_ids"] = True
    return json.loads(json.dumps(settings))


def _identical(dataset: BeirDataset) -> dict[str, Any]:
    """What a record says of queries that are documents: nothing, where there are none."""
    if dataset.ignore_identical_ids:
        return {"ignore_identical_ids": True, "num_identical_ids": len(dataset.identical_ids())}
    inside = len(dataset.queries_in_corpus())
    return {"num_queries_in_corpus": inside} if inside else {}


def _existing(files: ResultPaths, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a pair that is already done: same settings, and the run file that it describes."""
    if not (files.metrics.is_file() and files.run.is_file()):
        return None
    try:
        record = read_record(files.metrics)
    except InputError:
        return None
    same_run = record.get("run_sha256") == sha256_of(files.run)
    return record if same_run and record["settings"] == settings else None


def _reasoning(answers: Answers, system: System, files: ResultPaths) -> dict[str, Any]:
    """Write the reasonings beside the run and sum them up; for a run without any, remove those of an earlier one."""
    if not answers.reasoning:
        files.reasoning.unlink(missing_ok=True)
        return {}
    write_jsonl_gzip(files.reasoning, answers.reasoning)
    count = len(answers.reasoning)
    return {
        "reasoning": {
            "budget": system.identity.get("max_reasoning_tokens"),
            "emission_rate": sum(not r["forced"] for r in answers.reasoning) / count,
            "mean_tokens": sum(r["num_tokens"] for r in answers.reasoning) / count,
        }
    }


def _seed(seed: int) -> None:
    torch = sys.modules.get("torch")  # BM25 has not loaded it and does not need it
    if torch is not None:
        torch.manual_seed(seed)

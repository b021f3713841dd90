"""Evaluate systems on data sets: writes a TREC run and a metrics file for each pair, and reuses finished work.

For every pair, `results/runs/DATASET/SYSTEM.trec.gz` holds the exact top 100 and `results/metrics/DATASET/SYSTEM.json`
the metrics and everything needed to reproduce them. A pair is skipped if both exist for the same model, settings and
data, so repeating the command resumes an interrupted evaluation.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, available_splits, dataset_name, load_beir, small
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.hub_beir import with_nanobeir
from search_r3.data.query_variants import ORIGINAL, check_kinds
from search_r3.data.reasoning.reasoning_writer import ReasoningWriter
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import CostApproval
from search_r3.evaluation.embedding_cache import EmbeddingCache, content_hash
from search_r3.evaluation.given_reasoning import FILE as REASONING_FILE
from search_r3.evaluation.given_reasoning import WRITTEN, GivenReasoning, check_reasoning_files
from search_r3.evaluation.index_system import is_index_spec, open_index_systems
from search_r3.evaluation.measures import measure_run
from search_r3.evaluation.provenance import provenance
from search_r3.evaluation.records import MAX_LISTED, SMALL, finished_record, ignored_ids, unjudged_copies
from search_r3.evaluation.remarks import progress_line
from search_r3.evaluation.runs import drop_identical_ids, write_jsonl_gzip, write_run
from search_r3.evaluation.systems import (
    MODES,
    Answers,
    SearchR3System,
    System,
    check_modes,
    check_spec,
    open_systems,
    split_label,
)
from search_r3.evaluation.variant_system import VariantSystem, refuse_variant_name
from search_r3.files import atomic_write_text, sha256_of
from search_r3.hints import refuse_unknown

DEPTH = 100
"""Documents kept for each query: the depth of recall@100."""
SPLITS = dict.fromkeys(("hotpotqa", "hotpotqa_more", "strategyqa", "entailmentbank"), "dev")
"""Data sets that are tested on another split than "test" (the test labels of HotpotQA and StrategyQA are not
public)."""
VARIANT_RECORDS = "query_variants"
"""The folder for records of changed queries, which must not be mixed into the tables of results."""
CONTROL_RECORDS = "controls"
"""The folder for records of controls, which the tables of results do not include either."""
FORMAT = 1


@dataclass(frozen=True)
class ResultPaths:
    """Paths of the result files of one data set and system."""

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
        """What failed and why, in one line."""
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
    engine: str = "auto",
    data_root: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    use_cache: bool = True,
    force: bool = False,
    seed: int = 0,
    allow_missing: bool = False,
    ignore_identical_ids: bool | Sequence[str] = False,
    approval: CostApproval | None = None,
    show_progress: bool | None = None,
    writer: ReasoningWriter | None = None,
    report: Callable[[str], None] | None = None,
    failed: Callable[[Failure], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate every system on every data set; returns the contents of the metrics files, system by system.

    Args:
        datasets: names under the data root, or BEIR folders; "NAME.small" is the fixed sub-corpus of 500 documents,
            "nanobeir" all parts of NanoBEIR.
        systems: see `systems.open_systems`; also indexes (see `index_system`).
        output: the folder that holds `runs/` and `metrics/`.
        split: judgments to use; None takes "test", or "dev" where that is the data set's public test (hotpotqa).
        modes: reasoning "off", "on", "latent" or "given" (which skips data sets without `reasoning.jsonl`), or one of
            `reading_modes.READING_MODES`, for SearchR3 models. Controls ("read.shuffled", "given.shuffled") have their
            records in `controls/`, which tables of results do not include.
        queries: how queries are written, for every system: "original", or one of `query_variants.VARIANTS`. The latter
            give runs named SYSTEM.KIND and records under `query_variants/`, which tables of results do not include.
        max_length: cut documents at this many tokens, for SearchR3 models (512 by default).
        engine: what runs SearchR3 models (see `SearchR3.from_pretrained`); int8 is recorded as their dtype.
        cache: where document embeddings are stored; None uses the default folder. `use_cache=False` disables it.
        force: evaluate again even if results exist.
        seed: recorded, and used to seed torch; decoding is greedy.
        allow_missing: evaluate even if relevant documents are missing from the corpus; every record, table and card
            says so.
        ignore_identical_ids: as in MTEB, ignore documents with the query's own id, on all data sets or on the named
            ones. Where queries find themselves because this is not set, every record, table and card says so.
        approval: who approves the cost of endpoints; by default, nothing above a system's limit is sent.
        writer: writes the reasoning in mode "written".
        report: called with one line per pair, and before and after texts are sent to an endpoint.
        failed: called for each failed data set, system or pair; the others are still evaluated. Without it the first
            failure is raised.

    Raises:
        InputError: a data set, split, system, mode or kind of query is unknown; raised before any computation if
            possible.
    """
    check_modes(modes)
    check_kinds(queries)
    datasets = with_nanobeir(datasets)
    if not datasets or not systems:
        raise InputError("nothing to evaluate: give at least one data set and one system")
    specs, available = [], []
    for spec in systems:
        with _reporting(failed, spec, None):
            _check(spec)
            specs.append(spec)
    for name in datasets:
        with _reporting(failed, None, name):
            _locate(name, data_root, split)
            available.append(name)
    check_reasoning_files(modes, [_locate(name, data_root, split)[0] for name in available])
    if isinstance(ignore_identical_ids, bool):
        ignore_identical_ids = datasets if ignore_identical_ids else ()
    refuse_unknown(ignore_identical_ids, datasets, "ignore_identical_ids", "data set")
    report = report or (lambda line: None)
    store = None if not use_cache else cache or EmbeddingCache()
    loaded: dict[str, BeirDataset] = {}
    records: list[dict[str, Any]] = []
    spec_of: dict[str, str] = {}
    for spec in specs:
        opened: list[System] = []
        with _reporting(failed, spec, None):
            systems_of_spec = _open(
                spec,
                {"max_length": max_length, "batch_size": batch_size},
                approval or CostApproval(report=report),
                modes=modes,
                max_reasoning_tokens=max_reasoning_tokens,
                device=device,
                dtype=dtype,
                engine=engine,
                show_progress=show_progress,
            )
            _refuse_taken_names(systems_of_spec, spec, spec_of)
            opened = [
                system if kind == ORIGINAL else VariantSystem(system, kind)
                for system in systems_of_spec
                for kind in queries
            ]
        for name in list(available) if opened else ():
            if name not in loaded:
                with _reporting(failed, None, name):
                    loaded[name] = load_dataset(name, split, data_root, allow_missing, name in ignore_identical_ids)
            if name not in loaded:
                available.remove(name)  # reported once, not for every system
                continue
            for system in opened:
                with _reporting(failed, system.name, name):
                    folder, _, used_split, _ = _locate(name, data_root, split)
                    if (ready := _with_reasoning(system, folder, used_split, loaded[name], writer, report)) is None:
                        report(f"{name} {system.name}: skipped, as the data set has no {REASONING_FILE}")
                        continue
                    record, fresh = evaluate_system(
                        loaded[name], used_split, ready, output, store, force=force, seed=seed
                    )
                    records.append(record)
                    report(progress_line(record, fresh))
    return records


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
    """Evaluate one system on one data set; returns its metrics record and whether it was computed by this call.

    Args:
        files: where its files are written; by default the paths given by `paths`.
    """
    files = files or _usual_paths(output, dataset.name, system)
    settings = _settings(dataset, split, system)
    existing = None if force else finished_record(files.metrics, settings, files.run, "run_sha256")
    if existing is not None:
        return existing, False
    _seed(seed)
    documents = {did: document.full_text for did, document in dataset.corpus.items()}
    searchable = {did: text for did, text in documents.items() if text.strip()}
    queries = {qid: dataset.queries[qid] for qid in dataset.qrels if qid in dataset.queries}
    if not queries:
        raise InputError(f"{dataset.name}: split {split} judges no query in queries.jsonl")
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
        **_own_ids(dataset),
        **unjudged_copies(dataset),
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
    """The record of a system that was already evaluated with these settings and data, or None."""
    return finished_record(files.metrics, _settings(dataset, split, system), files.run, "run_sha256")


def load_dataset(
    name: str,
    split: str | None = None,
    data_root: str | Path | None = None,
    allow_missing: bool = False,
    ignore_identical_ids: bool = False,
) -> BeirDataset:
    """A data set with the judgments of its test split (see SPLITS); "NAME.small" is its fixed sub-corpus.

    With `ignore_identical_ids`, evaluations ignore documents with the query's own id.

    Raises:
        InputError: no such data set or split; or a relevant document is missing, unless `allow_missing`.
    """
    folder, shown_name, used_split, is_small = _locate(name, data_root, split)
    dataset = load_beir(folder, used_split, name=shown_name, allow_missing=allow_missing)
    dataset.ignore_identical_ids = ignore_identical_ids
    return small(dataset) if is_small else dataset


def dataset_hash(dataset: BeirDataset) -> str:
    """A hash of all data that determine the metrics: documents, judged queries and judgments."""
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
    """Path of the record of a system with queries changed to `kind`."""
    return Path(output) / VARIANT_RECORDS / dataset / system / f"{kind}.json"


def _usual_paths(output: str | Path, dataset: str, system: System) -> ResultPaths:
    usual = paths(output, dataset, system.name)
    if getattr(system, "is_control", False):
        usual = replace(usual, metrics=Path(output) / CONTROL_RECORDS / dataset / f"{system.name}.json")
    if not isinstance(system, VariantSystem):
        return usual
    return ResultPaths(usual.run, usual.reasoning, variant_path(output, dataset, system.of, system.kind))


def _with_reasoning(
    system: System,
    folder: Path,
    split: str,
    dataset: BeirDataset,
    writer: ReasoningWriter | None,
    report: Callable[[str], None],
) -> System | None:
    """The system with the given or written reasoning about a data set's queries, if its mode needs it; None if a data
    set has none."""
    if isinstance(system, VariantSystem):
        inner = _with_reasoning(system.system, folder, split, dataset, writer, report)
        return None if inner is None else VariantSystem(inner, system.kind)
    if not (isinstance(system, SearchR3System) and system.needs_reasoning):
        return system
    if system.mode == WRITTEN:
        if writer is None:
            raise InputError(f"mode {WRITTEN} needs a model that writes the reasoning; name one with --writer")
        queries = {qid: dataset.queries[qid] for qid in dataset.qrels if qid in dataset.queries}
        written = writer.write(list(queries.values()))
        report(f"{dataset.name}: {written.line}")
        return system.with_reasoning(GivenReasoning(dict(zip(queries, written.texts, strict=True)), writer.identity))
    given = GivenReasoning.of_split(folder, split)
    return None if given is None else system.with_reasoning(given)


@contextlib.contextmanager
def _reporting(failed: Callable[[Failure], None] | None, system: str | None, dataset: str | None) -> Iterator[None]:
    """Give an exception of the block to `failed` and go on after the block; without `failed`, raise it."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed(Failure(system, dataset, error))


def _check(spec: str) -> None:
    if not is_index_spec(split_label(spec)[1]):
        check_spec(spec)


def _open(spec: str, encoding: dict[str, Any], approval: CostApproval, **settings: Any) -> list[System]:
    """The systems of a spec. `encoding` says how documents are encoded, which those of an index were already."""
    label, source = split_label(spec)
    if is_index_spec(source):
        return open_index_systems(source, label, **settings)
    return open_systems(spec, **encoding, approval=approval, **settings)


def _refuse_taken_names(opened: Sequence[System], spec: str, spec_of: dict[str, str]) -> None:
    """Raise InputError if a name belongs to another spec or to a variant; `spec_of` gets the new names."""
    for system in opened:
        refuse_variant_name(system.name)
        if spec_of.setdefault(system.name, spec) != spec:
            raise InputError(
                f"{spec_of[system.name]} and {spec} are both called {system.name}; give one a name: LABEL={spec}"
            )


def _locate(name: str, data_root: str | Path | None, split: str | None) -> tuple[Path, str, str, bool]:
    """Folder, name in results, split, and whether the name means the small sub-corpus."""
    is_small = name.endswith(SMALL)
    folder = find_dataset(name.removesuffix(SMALL), data_root)
    shown = dataset_name(folder, data_root)
    used = split or SPLITS.get(shown, "test")
    splits = available_splits(folder)
    if used not in splits:
        raise InputError(f"{shown} has no split {used!r}; it has: {', '.join(splits) or 'none'}; give one with --split")
    return folder, shown, used, is_small


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


def _own_ids(dataset: BeirDataset) -> dict[str, Any]:
    """What a record says about queries that are documents; empty where there are none."""
    if dataset.ignore_identical_ids:
        return ignored_ids(dataset)
    inside = len(dataset.queries_in_corpus())
    return {"num_queries_in_corpus": inside} if inside else {}


def _reasoning(answers: Answers, system: System, files: ResultPaths) -> dict[str, Any]:
    """Write the reasoning traces next to the run and summarize them; without any, remove those of an earlier run."""
    if not answers.reasoning:
        files.reasoning.unlink(missing_ok=True)
        return {}
    write_jsonl_gzip(files.reasoning, answers.reasoning)
    count = len(answers.reasoning)
    mean_tokens = sum(r["num_tokens"] for r in answers.reasoning) / count
    if "reasoning_hash" in system.identity:  # the model wrote none of it
        own = system.identity.get("writer") is None and not any("from" in r for r in answers.reasoning)
        return {"given_reasoning": {"own": own, "mean_tokens": mean_tokens}}
    return {
        "reasoning": {
            "budget": system.identity.get("max_reasoning_tokens"),
            "emission_rate": sum(not r["forced"] for r in answers.reasoning) / count,
            "mean_tokens": mean_tokens,
        }
    }


def _seed(seed: int) -> None:
    torch = sys.modules.get("torch")  # not loaded for BM25, which does not need it
    if torch is not None:
        torch.manual_seed(seed)

"""A study of one model on one data set: every control, its cost, whether it makes a difference, and for which queries.

The whole study is in `results/studies/DATASET/SYSTEM.json`, computed from run files like any other result; a folder of
the same name next to it holds the records of the single modes. Finished modes are not repeated, so the same command
resumes after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, stable_order
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.examples import best_and_worst, read_traces
from search_r3.evaluation.json_format import as_json
from search_r3.evaluation.measures import NDCG, Measured, measure_run
from search_r3.evaluation.provenance import hardware, provenance
from search_r3.evaluation.records import MAX_LISTED, SMALL
from search_r3.evaluation.remarks import progress_line, remarks
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.significance import compare_family, paired
from search_r3.evaluation.study.adaptive_curve import add_adaptive
from search_r3.evaluation.study.controls import (
    MODE_DESCRIPTIONS,
    ControlConfig,
    ControlSystem,
    StudyContext,
    mode_paths,
    study_path,
)
from search_r3.evaluation.study.latency import time_mode
from search_r3.evaluation.study.reasoning_cache import ReasoningCache
from search_r3.evaluation.suite import (
    DEPTH,
    SPLITS,
    dataset_hash,
    evaluate_system,
    existing_record,
    load_dataset,
    paths,
)
from search_r3.evaluation.systems import BASELINES, SearchR3System, System, check_spec, open_systems
from search_r3.files import atomic_write_text

FORMAT = 1
EXAMPLES = 5
AGAINST_ON = ("off", "empty", "shuffled", "repeat", "off+on-mean", "off+on-rrf", "samples-mean", "samples-rrf")
"""Modes that are also compared with `on`: the claim is that what the model wrote helps, not that it wrote."""


@dataclass(frozen=True)
class StudyConfig:
    """What a study runs, and how."""

    controls: Sequence[str] | None = None
    """Modes to run besides `off` and `on`; None runs all. Modes that an earlier command finished with the same settings
    are part of the study too."""
    modes: ControlConfig = field(default_factory=ControlConfig)
    """Settings of the modes."""
    adaptive: bool = True
    """Fit the rule of `reasoning="auto"` on dev queries and run it as mode `auto`."""
    dev_queries: int = 200
    """Maximum number of these dev queries."""
    latency_queries: int = 32
    """Number of queries timed for each budget; 0 times none."""
    max_length: int | None = None
    """Tokens kept of each document (512 by default)."""
    batch_size: int = 32
    """Texts per forward pass."""
    device: str | None = None
    """See `SearchR3.from_pretrained`."""
    dtype: str = "auto"
    """See `SearchR3.from_pretrained`."""
    engine: str = "auto"
    """See `SearchR3.from_pretrained`."""
    force: bool = False
    """Run again even if results exist."""
    allow_missing: bool = False
    """As for `suite.evaluate`; the study's remarks say what is missing."""
    ignore_identical_ids: bool = False
    """As for `suite.evaluate`; the study's remarks say what is ignored."""

    def __post_init__(self) -> None:
        for mode in self.controls or ():
            if mode not in self.modes.modes:
                raise InputError(f"unknown control {mode!r}; choose from: {', '.join(self.modes.modes)}")
        for name in ("latency_queries", "dev_queries"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")

    @property
    def wanted(self) -> list[str]:
        """The modes to run."""
        return ["off", "on", *(self.modes.modes if self.controls is None else self.controls)]


@dataclass(frozen=True)
class _OpenStudy:
    """A study in progress: its data, the model in its context, and where results go."""

    data: BeirDataset
    split: str
    context: StudyContext
    config: StudyConfig
    output: Path
    cache: EmbeddingCache
    report: Callable[[str], None]

    @property
    def path(self) -> Path:
        return study_path(self.output, self.data.name, self.context.name)


def run_study(
    dataset: str,
    system: str,
    output: str | Path = "results",
    split: str | None = None,
    config: StudyConfig | None = None,
    *,
    data_root: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    reasoning_cache: ReasoningCache | None = None,
    show_progress: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the modes of a study and write it; returns what was written.

    Args:
        dataset: as for `suite.evaluate`; "NAME.small" is the fixed part of 50 queries and 500 documents.
        system: one SearchR3 model; "LABEL=SPEC" names it.
        output: the folder that holds `runs/`, `metrics/` and `studies/`.
        split: judgments to use; by default the data set's test split.
        cache, reasoning_cache: where embeddings and reasoning traces are cached; None is the default folder.
        report: called with one line per mode.

    Raises:
        InputError: an unknown data set, split or model, or a system that does not reason.
    """
    config = config or StudyConfig()
    check_spec(system)
    data = load_dataset(dataset, split, data_root, config.allow_missing, config.ignore_identical_ids)
    store = cache or EmbeddingCache()
    context = make_context(
        data, _open_model(system, config, show_progress), config.modes, store, reasoning_cache or ReasoningCache()
    )
    used_split = split or SPLITS.get(data.name.removesuffix(SMALL), "test")
    study = _OpenStudy(data, used_split, context, config, Path(output), store, report or (lambda line: None))
    finished = _run_modes(study)
    adaptive = _run_adaptive(study, finished, data_root) if config.adaptive else None
    return _write_study(study, finished, adaptive, _latency(study, finished))


def make_context(
    data: BeirDataset,
    system: SearchR3System,
    config: ControlConfig,
    cache: EmbeddingCache,
    reasoning_cache: ReasoningCache,
) -> StudyContext:
    """The context of a study over the documents and judged queries of a data set, as `evaluate_system` chooses them."""
    documents = {did: document.full_text for did, document in data.corpus.items() if document.full_text.strip()}
    queries = {qid: data.queries[qid] for qid in data.qrels if qid in data.queries}
    name = system.name.rpartition(".")[0]
    return StudyContext(
        system, name, documents, queries, config,
        depth=DEPTH, embeddings=cache, reasoning_cache=reasoning_cache, ignore_identical_ids=data.ignore_identical_ids,
    )  # fmt: skip


def read_study(path: str | Path) -> dict[str, Any]:
    """A study as `run_study` wrote it.

    Raises:
        InputError: it is missing, damaged or of another format.
    """
    try:
        study = json.loads(Path(path).read_text(encoding="utf-8"))
        if study["settings"]["format"] != FORMAT:
            raise InputError(f"{path} is a study of format {study['settings']['format']}, not {FORMAT}; run it again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a study ({error}); run search-r3 study again") from error
    return study


def summarize(
    data: BeirDataset, context: StudyContext, finished: Mapping[str, dict[str, Any]], output: str | Path
) -> dict[str, Any]:
    """Measures, per-query scores, comparisons and examples, all from the run files."""
    runs, measured = {}, {}
    for mode in finished:
        run_path = paths(output, data.name, mode if mode in BASELINES else f"{context.name}.{mode}").run
        runs[mode] = read_run(run_path)
        measured[mode] = measure_run(runs[mode], data.qrels, data.corpus)
    scores = {mode: result.per_query[NDCG] for mode, result in measured.items()}
    traces = read_traces(paths(output, data.name, f"{context.name}.on").reasoning)
    return {
        "dataset": data.name,
        "system": context.name,
        "num_queries": len(data.qrels),
        "num_documents": len(data.corpus),
        "remarks": sorted({line for record in finished.values() for line in remarks(record)}),
        "missing_documents": measured["off"].missing_documents[:MAX_LISTED],
        "modes": [_mode_row(mode, finished[mode], measured[mode]) for mode in finished],
        "families": families(scores),
        "queries": list(data.qrels),
        "per_query": {mode: [round(value, 6) for value in values.values()] for mode, values in scores.items()},
        "examples": best_and_worst(data, runs, scores, traces, EXAMPLES),
    }


def families(scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The comparisons, in families that are corrected together: every mode against `off`; the controls of reasoning
    against `on`; and each baseline with reasoning against the baseline alone.

    Args:
        scores: mode -> query id -> score, with `off` and `on`.
    """
    modes = [mode for mode in scores if mode not in BASELINES]
    plan = [
        ("off", [(mode, "off") for mode in modes if mode != "off"]),
        ("on", [(mode, "on") for mode in AGAINST_ON if mode in scores]),
        (
            "baseline",
            [(f"{baseline}+reasoning", baseline) for baseline in BASELINES if f"{baseline}+reasoning" in scores],
        ),
    ]
    compared = []
    for name, pairs in plan:
        comparisons = compare_family([paired(scores[base], scores[mode]) for mode, base in pairs])
        rows = [
            {"mode": mode, "against": base, **comparison.to_dict()}
            for (mode, base), comparison in zip(pairs, comparisons, strict=True)
        ]
        compared.append({"against": name, "measure": NDCG, "comparisons": rows})
    return [family for family in compared if family["comparisons"]]


def _open_model(system: str, config: StudyConfig, show_progress: bool | None) -> SearchR3System:
    opened = open_systems(
        system,
        modes=("off",),
        max_length=config.max_length,
        max_reasoning_tokens=config.modes.budget,
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        engine=config.engine,
        show_progress=show_progress,
    )[0]
    if not isinstance(opened, SearchR3System):
        raise InputError(f"{system} does not reason, so there is nothing to control; give a SearchR3 model")
    return opened


def _run_modes(study: _OpenStudy) -> dict[str, dict[str, Any]]:
    """The record of every mode that is wanted or was finished earlier, and of the baselines that these need."""
    finished: dict[str, dict[str, Any]] = {}
    for mode in study.config.modes.modes:
        if mode in study.config.wanted or _finished_earlier(study, mode):
            needed = [baseline for baseline in BASELINES if baseline in mode.split("+")]
            for name in (*needed, mode):
                if name not in finished:
                    finished[name] = _run_mode(study, name)
    return finished


def _run_mode(study: _OpenStudy, mode: str) -> dict[str, Any]:
    context = study.context
    is_baseline = mode in BASELINES
    system: System = context.baseline(mode) if is_baseline else ControlSystem(context, mode)
    files = None if is_baseline else mode_paths(study.output, study.data.name, context.name, mode)
    record, fresh = evaluate_system(
        study.data,
        study.split,
        system,
        study.output,
        study.cache,
        force=study.config.force,
        seed=study.config.modes.seed,
        files=files,
    )
    study.report(progress_line(record, fresh))
    return record


def _finished_earlier(study: _OpenStudy, mode: str) -> bool:
    """Whether an earlier command finished this mode with the same settings."""
    files = mode_paths(study.output, study.data.name, study.context.name, mode)
    if not files.metrics.is_file():
        return False
    return existing_record(files, study.data, study.split, ControlSystem(study.context, mode)) is not None


def _run_adaptive(
    study: _OpenStudy, finished: dict[str, dict[str, Any]], data_root: str | Path | None
) -> dict[str, Any]:
    """What the study says about the rule of mode `auto`, whose record is added to `finished` if it could be run."""
    record, described = add_adaptive(
        study.data,
        study.split,
        study.context,
        study.output,
        data_root=data_root,
        dev_queries=study.config.dev_queries,
        force=study.config.force,
    )
    if record is not None:
        finished["auto"] = record
    study.report(f"{study.data.name} {study.context.name}.auto: {described['summary']}")
    return described


def _write_study(
    study: _OpenStudy,
    finished: Mapping[str, dict[str, Any]],
    adaptive: dict[str, Any] | None,
    latency: dict[str, Any],
) -> dict[str, Any]:
    config, system = study.config.modes, study.context.system
    record = {
        **summarize(study.data, study.context, finished, study.output),
        **({} if adaptive is None else {"adaptive": adaptive}),
        "budgets": _budget_curve(config, finished, latency),
        "latency": latency,
        **provenance(config.seed, system.device),
        "settings": {
            "format": FORMAT,
            "split": study.split,
            "data_hash": dataset_hash(study.data),
            "identity": system.document_identity,
            "budget": config.budget,
            "budgets": sorted(config.budgets),
            "samples": config.samples,
            "temperature": config.temperature,
            "seed": config.seed,
            **({"ignore_identical_ids": True} if study.config.ignore_identical_ids else {}),
        },
    }
    atomic_write_text(study.path, as_json(record))
    return record


def _mode_row(mode: str, record: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    reasoning = record.get("reasoning") or {}
    return {
        "mode": mode,
        "description": MODE_DESCRIPTIONS.get(mode) or _described(mode),
        "system": record["system"],
        "measures": measured.mean,
        "num_missing_queries": len(measured.missing_queries),
        "mean_tokens": reasoning.get("mean_tokens"),
        "emission_rate": reasoning.get("emission_rate"),
        "query_seconds": record["seconds"]["queries"],
    }


def _described(mode: str) -> str:
    if mode == "auto":
        return "reasons where the rule on the direct search's scores says so"
    return f"at most {mode[3:]} tokens of reasoning" if mode.startswith("on-") else "the baseline alone"


def _budget_curve(
    config: ControlConfig, finished: Mapping[str, dict[str, Any]], latency: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One point for each budget that was run, with its cost; the direct embedding is the point without a budget."""
    points: list[tuple[int | None, str]] = [(None, "off")]
    points += [(budget, config.mode_of_budget(budget)) for budget in sorted(config.budgets)]
    return [
        {
            "budget": budget,
            "mode": mode,
            "measures": finished[mode]["measures"],
            "mean_tokens": (finished[mode].get("reasoning") or {"mean_tokens": 0.0})["mean_tokens"],
            "emission_rate": (finished[mode].get("reasoning") or {}).get("emission_rate"),
            "latency": latency.get("modes", {}).get(mode),
        }
        for budget, mode in points
        if mode in finished
    ]


def _latency(study: _OpenStudy, finished: Mapping[str, Any]) -> dict[str, Any]:
    """Timings of `off` and each finished budget, stored in their own file so that none is measured twice."""
    context, config, count = study.context, study.config.modes, study.config.latency_queries
    path = study.path.with_suffix("") / "latency.json"
    chosen = stable_order(context.queries, 0)[:count]
    about: dict[str, Any] = {
        "identity": context.system.document_identity,
        "hardware": hardware(context.system.device),
        "queries": chosen,
    }
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        earlier = earlier if {name: earlier[name] for name in about} == about else {}
    except (OSError, ValueError, KeyError, TypeError):
        earlier = {}
    timings: dict[str, Any] = {**about, "modes": dict(earlier.get("modes", {}))}
    budgets: dict[str, int | None] = {"off": None} | {config.mode_of_budget(b): b for b in sorted(config.budgets)}
    for mode, budget in budgets.items() if count else ():
        if mode in finished and mode not in timings["modes"]:
            timings["modes"][mode] = time_mode(context.model, [context.queries[qid] for qid in chosen], budget)
            atomic_write_text(path, json.dumps(timings, indent=2) + "\n")
            timed = timings["modes"][mode]["batch_1"]
            study.report(
                f"{study.data.name} {context.name}.{mode}: {timed['median_ms']:.0f} ms per query, "
                f"p95 {timed['p95_ms']:.0f} ms"
            )
    return timings

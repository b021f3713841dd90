"""A study of one model on one data set: every control, what it costs, whether it differs, and on which queries.

`results/studies/DATASET/SYSTEM.json` holds it all, made from run files like any result; the records of the single modes
stand in a folder beside it. Finished modes are not repeated, so the same command resumes after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, stable_order
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.json_format import as_json
from search_r3.evaluation.measures import NDCG, Measured, measure_run
from search_r3.evaluation.provenance import hardware, provenance
from search_r3.evaluation.runs import read_gzip_lines, read_run
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
    MAX_LISTED,
    SMALL,
    SPLITS,
    dataset_hash,
    evaluate_system,
    existing_record,
    load_dataset,
    paths,
    remarks,
)
from search_r3.evaluation.systems import BASELINES, SearchR3System, check_spec, open_systems
from search_r3.files import atomic_write_text
from search_r3.metrics import rank_documents

FORMAT = 1
EXAMPLES = 5
SNIPPET = 240
"""Characters of a document that an example shows."""
AGAINST_ON = ("off", "empty", "shuffled", "repeat", "off+on-mean", "off+on-rrf", "samples-mean", "samples-rrf")
"""Modes that are also compared with `on`: the claim is that what the model wrote helps, not that it wrote."""


def study(
    dataset: str,
    system: str,
    output: str | Path = "results",
    split: str | None = None,
    *,
    controls: Sequence[str] | None = None,
    config: ControlConfig | None = None,
    adaptive: bool = True,
    dev_queries: int = 200,
    latency_queries: int = 32,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str = "auto",
    data_root: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    reasoning_cache: ReasoningCache | None = None,
    force: bool = False,
    allow_missing: bool = False,
    ignore_identical_ids: bool = False,
    show_progress: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the modes of a study and write it; returns what was written.

    Args:
        dataset: as for `suite.evaluate`; "NAME.small" is the fixed part of 50 queries and 500 documents.
        system: one SearchR3 model; "LABEL=SPEC" names it.
        output: the folder that holds `runs/`, `metrics/` and `studies/`.
        controls: modes to run; all of `config.modes` if None. `off` and `on` always are. Modes that an earlier command
            finished with the same settings are part of the study too.
        adaptive: fit the rule of `reasoning="auto"` on dev queries and run it as mode `auto`.
        dev_queries: how many of them at most.
        latency_queries: how many queries are timed for each budget; 0 times none.
        cache, reasoning_cache: where embeddings and reasoning traces are kept; None is the default folder.
        force: run again even if results exist.
        allow_missing, ignore_identical_ids: as for `suite.evaluate`; the study's remarks say what is left out.
        report: called with one line per mode.

    Raises:
        InputError: an unknown data set, split, mode or model, or a system that does not reason.
    """
    config = config or ControlConfig()
    wanted = ["off", "on", *(controls if controls is not None else config.modes)]
    _check(wanted, config, latency_queries, dev_queries)
    check_spec(system)
    report = report or (lambda line: None)
    data = load_dataset(dataset, split, data_root, allow_missing, ignore_identical_ids)
    used_split = split or SPLITS.get(data.name.removesuffix(SMALL), "test")
    opened = open_systems(
        system,
        modes=("off",),
        max_length=max_length,
        max_reasoning_tokens=config.budget,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        show_progress=show_progress,
    )[0]
    if not isinstance(opened, SearchR3System):
        raise InputError(f"{system} does not reason, so there is nothing to control; give a SearchR3 model")
    store = cache or EmbeddingCache()
    context = make_context(data, opened, config, store, reasoning_cache or ReasoningCache())
    finished: dict[str, dict[str, Any]] = {}

    def run_mode(mode: str) -> None:
        baseline = mode in BASELINES
        one = context.baseline(mode) if baseline else ControlSystem(context, mode)
        files = None if baseline else mode_paths(output, data.name, context.name, mode)
        record, fresh = evaluate_system(
            data, used_split, one, output, store, force=force, seed=config.seed, files=files
        )
        finished[mode] = record
        shown = ", ".join(f"{name} {value:.4f}" for name, value in record["measures"].items())
        report(
            "; ".join([f"{data.name} {one.name}: {shown}" + ("" if fresh else " (already there)"), *remarks(record)])
        )

    for mode in config.modes:
        needed = [baseline for baseline in BASELINES if baseline in mode.split("+")]
        if mode in wanted or _is_there(data, used_split, context, mode, output):
            for baseline in needed:
                if baseline not in finished:
                    run_mode(baseline)
            run_mode(mode)
    extra: dict[str, Any] = {}
    if adaptive:
        record, extra["adaptive"] = add_adaptive(
            data, used_split, context, output, data_root=data_root, dev_queries=dev_queries, force=force
        )
        if record is not None:
            finished["auto"] = record
        report(f"{data.name} {context.name}.auto: {extra['adaptive']['summary']}")
    latency = _latency(data.name, context, finished, output, latency_queries, report)
    found = summarize(data, context, finished, output) | extra
    found["budgets"] = _budget_curve(config, finished, latency)
    found["latency"] = latency
    found |= {
        **provenance(config.seed, opened.device),
        "settings": {
            "format": FORMAT,
            "split": used_split,
            "data_hash": dataset_hash(data),
            "identity": opened.document_identity,
            "budget": config.budget,
            "budgets": sorted(config.budgets),
            "samples": config.samples,
            "temperature": config.temperature,
            "seed": config.seed,
            **({"ignore_identical_ids": True} if ignore_identical_ids else {}),
        },
    }
    atomic_write_text(study_path(output, data.name, context.name), as_json(found))
    return found


def _check(modes: Sequence[str], config: ControlConfig, latency_queries: int, dev_queries: int) -> None:
    for mode in modes:
        if mode not in config.modes:
            raise InputError(f"unknown control {mode!r}; choose from: {', '.join(config.modes)}")
    for name, value in (("latency_queries", latency_queries), ("dev_queries", dev_queries)):
        if value < 0:
            raise InputError(f"{name} is {value}; expected 0 or more")


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
    """A study as `study` wrote it.

    Raises:
        InputError: it is missing, damaged or of another format.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["settings"]["format"] != FORMAT:
            raise InputError(f"{path} is a study of format {found['settings']['format']}, not {FORMAT}; run it again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a study ({error}); run search-r3 study again") from error
    return found


def summarize(
    data: BeirDataset, context: StudyContext, finished: Mapping[str, dict[str, Any]], output: str | Path
) -> dict[str, Any]:
    """Measures, per-query scores, comparisons and examples, all from the run files."""
    runs, measured = {}, {}
    for mode in finished:
        usual = paths(output, data.name, mode if mode in BASELINES else f"{context.name}.{mode}")
        runs[mode] = read_run(usual.run)
        measured[mode] = measure_run(runs[mode], data.qrels, data.corpus)
    scores = {mode: found.per_query[NDCG] for mode, found in measured.items()}
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
        "per_query": {mode: [round(value, 6) for value in found.values()] for mode, found in scores.items()},
        "examples": _examples(data, context, runs, scores, output),
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
    found = []
    for name, pairs in plan:
        compared = compare_family([paired(scores[base], scores[mode]) for mode, base in pairs])
        rows = [
            {"mode": mode, "against": base, **comparison.to_dict()}
            for (mode, base), comparison in zip(pairs, compared, strict=True)
        ]
        found.append({"against": name, "measure": NDCG, "comparisons": rows})
    return [family for family in found if family["comparisons"]]


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


def _is_there(data: BeirDataset, split: str, context: StudyContext, mode: str, output: str | Path) -> bool:
    """Whether an earlier command finished this mode with the settings of this one."""
    files = mode_paths(output, data.name, context.name, mode)
    if not files.metrics.is_file():
        return False
    return existing_record(files, data, split, ControlSystem(context, mode)) is not None


def _examples(
    data: BeirDataset,
    context: StudyContext,
    runs: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
    output: str | Path,
) -> dict[str, list[dict[str, Any]]]:
    """The queries that reasoning helped most and harmed most, with what was written and found, side by side."""
    path = paths(output, data.name, f"{context.name}.on").reasoning
    written = {record["qid"]: record for record in map(json.loads, read_gzip_lines(path))}
    gain = {qid: scores["on"][qid] - scores["off"][qid] for qid in data.qrels}

    def one(qid: str) -> dict[str, Any]:
        sides = {mode: _found(data, qid, runs[mode].get(qid, {})) for mode in ("off", "on")}
        return {
            "qid": qid,
            "query": data.queries.get(qid, ""),
            "reasoning": written.get(qid, {}).get("text", ""),
            "forced": written.get(qid, {}).get("forced"),
            **{mode: {NDCG: round(scores[mode][qid], 6), **side} for mode, side in sides.items()},
        }

    order = sorted(gain, key=lambda qid: (-gain[qid], qid))
    return {
        "best": [one(qid) for qid in order[:EXAMPLES] if gain[qid] > 0],
        "worst": [one(qid) for qid in order[::-1][:EXAMPLES] if gain[qid] < 0],
    }


def _found(data: BeirDataset, qid: str, scores: Mapping[str, float]) -> dict[str, Any]:
    ranked, grades = rank_documents(scores), data.qrels[qid]
    first = next((rank for rank, did in enumerate(ranked, 1) if grades.get(did, 0) > 0), None)
    top = [{"id": did, "grade": grades.get(did), "text": data.corpus[did].full_text[:SNIPPET]} for did in ranked[:3]]
    return {"first_relevant": first, "top": top}


def _budget_curve(
    config: ControlConfig, finished: Mapping[str, dict[str, Any]], latency: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One point a budget that was run, with what it costs; the direct embedding is the point without a budget."""
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


def _latency(
    dataset: str,
    context: StudyContext,
    finished: Mapping[str, Any],
    output: str | Path,
    count: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Timings of `off` and each finished budget, kept in a file of their own so that none is measured twice."""
    path = study_path(output, dataset, context.name).with_suffix("") / "latency.json"
    chosen = stable_order(context.queries, 0)[:count]
    about: dict[str, Any] = {
        "identity": context.system.document_identity,
        "hardware": hardware(context.system.device),
        "queries": chosen,
    }
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known = known if {name: known[name] for name in about} == about else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    found: dict[str, Any] = {**about, "modes": dict(known.get("modes", {}))}
    config = context.config
    modes: dict[str, int | None] = {"off": None} | {config.mode_of_budget(b): b for b in sorted(config.budgets)}
    for mode, budget in modes.items() if count else ():
        if mode in finished and mode not in found["modes"]:
            found["modes"][mode] = time_mode(context.model, [context.queries[qid] for qid in chosen], budget)
            atomic_write_text(path, json.dumps(found, indent=2) + "\n")
            timed = found["modes"][mode]["batch_1"]
            report(
                f"{dataset} {context.name}.{mode}: {timed['median_ms']:.0f} ms a query, p95 {timed['p95_ms']:.0f} ms"
            )
    return found

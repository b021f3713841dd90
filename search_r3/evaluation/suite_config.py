"""A suite: one YAML file that names systems, data sets, modes and studies, run by one command that can be repeated.

Finished work is not repeated, and a failure is reported without affecting the rest: every pair and every mode of a
study has its own files (see `suite` and `study`), so an interrupted suite resumes where it stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from search_r3.data.io.hub_beir import with_nanobeir
from search_r3.data.query_variants import ORIGINAL, check_kinds
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import FILE_ENDINGS
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.publish.tables import records_markdown
from search_r3.evaluation.study.controls import BUDGETS, ControlConfig
from search_r3.evaluation.study.reasoning_cache import ReasoningCache
from search_r3.evaluation.study.study import StudyConfig, run_study
from search_r3.evaluation.study.study_table import study_markdown
from search_r3.evaluation.suite import Failure, evaluate
from search_r3.evaluation.systems import MODES, split_label
from search_r3.hints import refuse_unknown
from search_r3.retrievers.dense import BUNDLED


@dataclass
class StudyPlan:
    """The studies of a suite: every control of reasoning, on some of its data sets."""

    datasets: list[str] | None = None
    """Data sets to study; all of the suite's by default."""
    systems: list[str] | None = None
    """SearchR3 models to study; all of the suite's by default."""
    controls: list[str] | None = None
    """Modes to run besides off and on ("empty", "shuffled", "on-8", ...); all by default."""
    budgets: list[int] = field(default_factory=lambda: list(BUDGETS))
    """The points of the budget curve, in tokens."""
    samples: int = 4
    """Sampled reasoning traces for each query, for the modes that fuse them."""
    temperature: float = 1.0
    """Sampling temperature of these traces."""
    adaptive: bool = True
    """Fit the rule that decides when to reason, and run mode auto."""
    dev_queries: int = 200
    """Maximum number of dev queries that the rule is fitted on, where a data set has some (cosqa, scifact)."""
    latency_queries: int = 32
    """Queries timed for each budget; 0 times none."""

    def __post_init__(self) -> None:
        for name in ("dev_queries", "latency_queries"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")

    def config(self, budget: int, seed: int) -> ControlConfig:
        """The settings of the modes. Raises InputError for an invalid value."""
        return ControlConfig(budget, tuple(self.budgets), self.samples, self.temperature, seed)


@dataclass
class SuitePlan:
    """A suite. Every system is run on every data set, SearchR3 models in every mode."""

    systems: list[str]
    """bm25, all-minilm-l6-v2, st:MODEL, or a SearchR3 model by name or folder; LABEL=SPEC names it in the results."""
    datasets: list[str]
    """Names below the data root, or BEIR folders; NAME.small is the fixed part of 50 queries and 500 documents, and
    nanobeir all parts of NanoBEIR."""
    modes: list[
        Literal[
            "off",
            "on",
            "latent",
            "given",
            "given.shuffled",
            "read",
            "read+on",
            "read-2",
            "read.shuffled",
            "read.empty",
            "read.rocchio",
        ]
    ] = field(default_factory=lambda: list(MODES))  # type: ignore[arg-type]
    """Reasoning off, on or latent; given, that of the data sets with a `reasoning.jsonl`, and its control
    given.shuffled (another query's); or reading the first hits of the direct search: read, read+on (then reasoning),
    read-2 (two hops), and the controls read.shuffled, read.empty and read.rocchio. off and on by default."""
    queries: list[str] = field(default_factory=lambda: [ORIGINAL])
    """How queries are written, for every system: original, upper, lower, title, typos, keywords, no_punctuation."""
    split: str | None = None
    """Split of the judgments; each data set's test split by default."""
    budget: int = 32
    """Maximum number of tokens in a reasoning trace, in mode on."""
    max_length: int | None = None
    """Tokens kept of a document by SearchR3 models (512 by default); others keep their own length."""
    batch_size: int = 32
    """Texts per forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of SearchR3 models: auto is float32 on a CPU, bfloat16 on a GPU."""
    engine: str = "auto"
    """What runs SearchR3 models: auto, torch, int8 (which has a data type of its own), vllm, or that of a package."""
    seed: int = 0
    """Seed of the samples and of the assignment of other queries' reasoning."""
    output: Path = Path("results")
    """Output folder for runs/, metrics/ and studies/."""
    allow_missing: bool = False
    """Evaluate on data sets whose judgments include missing documents; every table then says so."""
    ignore_identical_ids: bool | list[str] = False
    """As in MTEB, ignore documents with the query's own id (ArguAna, Quora): true for all data sets, or a list of data
    sets."""
    studies: StudyPlan | None = None
    """The studies to run; none by default."""

    def __post_init__(self) -> None:
        check_kinds(self.queries)
        self.datasets = with_nanobeir(self.datasets)
        for name in ("systems", "datasets", "modes", "queries"):
            given = getattr(self, name)
            twice = [item for i, item in enumerate(given) if item in given[:i]]
            if not given or twice:
                problem = f"names {twice[0]} twice" if twice else "is empty"
                raise InputError(f"{name} {problem}; expected at least one, each once")
        for name, least in (("budget", 0), ("batch_size", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected {least} or more")
        if isinstance(self.ignore_identical_ids, list):
            refuse_unknown(self.ignore_identical_ids, self.datasets, "ignore_identical_ids", "data set")
        if self.studies is not None:
            known = self.studies.config(self.budget, self.seed).modes
            refuse_unknown(self.studies.controls or (), known, "studies.controls", "mode")

    def ignores_identical_ids(self, dataset: str) -> bool:
        """Whether documents with the query's own id are ignored on one of the data sets."""
        chosen = self.ignore_identical_ids
        return chosen if isinstance(chosen, bool) else dataset in chosen

    def study_config(self, dataset: str, *, device: str | None = None, force: bool = False) -> StudyConfig:
        """How a study on one of the data sets is run."""
        plan = self.studies or StudyPlan()
        return StudyConfig(
            controls=plan.controls,
            modes=plan.config(self.budget, self.seed),
            adaptive=plan.adaptive,
            dev_queries=plan.dev_queries,
            latency_queries=plan.latency_queries,
            max_length=self.max_length,
            batch_size=self.batch_size,
            device=device,
            dtype=self.dtype,
            engine=self.engine,
            force=force,
            allow_missing=self.allow_missing,
            ignore_identical_ids=self.ignores_identical_ids(dataset),
        )

    @property
    def studied(self) -> list[tuple[str, str]]:
        """(system, data set) of every study."""
        if self.studies is None:
            return []
        systems = self.studies.systems
        datasets = self.datasets if self.studies.datasets is None else self.studies.datasets
        reasoning = [spec for spec in self.systems if _reasons(spec)] if systems is None else systems
        return [(system, dataset) for system in reasoning for dataset in datasets]


@dataclass
class Outcome:
    """The results of a suite.

    Attributes:
        records: the metrics records, system by system.
        studies: the contents of the studies' files.
        failures: what failed.
        seconds: duration of this run.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    studies: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a study is given by data set and system, which name its file."""
        return {
            "records": self.records,
            "studies": [{name: study[name] for name in ("dataset", "system")} for study in self.studies],
            "failures": [
                {"dataset": failure.dataset, "system": failure.system, "error": failure.line}
                for failure in self.failures
            ],
            "seconds": round(self.seconds, 3),
        }

    def summary(self) -> str:
        """All tables, then one line with counts and one line for each failure."""
        counts = f"{len(self.records)} results, {len(self.studies)} studies, {len(self.failures)} failed"
        pages = [records_markdown(self.records)] if self.records else []
        pages += [study_markdown(study) for study in self.studies]
        last = [f"{counts}; {self.seconds:.0f} s", *(f"failed: {failure.line}" for failure in self.failures)]
        return "\n\n".join([*pages, "\n".join(last)])


def run_suite(
    plan: SuitePlan,
    *,
    device: str | None = None,
    data_root: str | Path | None = None,
    cache: EmbeddingCache | None = None,
    reasoning_cache: ReasoningCache | None = None,
    force: bool = False,
    show_progress: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> Outcome:
    """Run the unfinished parts of `plan`; a system, data set or study that fails is reported, not raised.

    Args:
        cache, reasoning_cache: where embeddings and reasoning traces are cached; None is the default folder.
        force: run finished parts again too.
        report: called with one line per pair, mode and failure.
    """
    started = time.perf_counter()
    report = report or (lambda line: None)
    outcome = Outcome()

    def failed(failure: Failure) -> None:
        outcome.failures.append(failure)
        report(f"failed: {failure.line}")

    shared: dict[str, Any] = {
        "split": plan.split,
        "data_root": data_root,
        "cache": cache,
        "show_progress": show_progress,
        "report": report,
    }
    outcome.records = evaluate(
        plan.datasets,
        plan.systems,
        plan.output,
        modes=plan.modes,
        queries=plan.queries,
        max_length=plan.max_length,
        max_reasoning_tokens=plan.budget,
        batch_size=plan.batch_size,
        device=device,
        dtype=plan.dtype,
        engine=plan.engine,
        force=force,
        seed=plan.seed,
        allow_missing=plan.allow_missing,
        ignore_identical_ids=plan.ignore_identical_ids,
        failed=failed,
        **shared,
    )
    lost = {
        failure.system or failure.dataset for failure in outcome.failures if not (failure.system and failure.dataset)
    }
    for system, dataset in plan.studied:
        if system in lost or dataset in lost:  # reported already
            continue
        try:
            study = run_study(
                dataset,
                system,
                plan.output,
                config=plan.study_config(dataset, device=device, force=force),
                reasoning_cache=reasoning_cache,
                **shared,
            )
        except Exception as error:
            failed(Failure(system, dataset, error))
        else:
            outcome.studies.append(study)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _reasons(spec: str) -> bool:
    """Whether a system is a SearchR3 model, rather than BM25 or an external model (by name, KIND:NAME or file)."""
    source = split_label(spec)[1]
    other = source == "bm25" or source in BUNDLED or source.endswith(FILE_ENDINGS)
    return not other and re.match(r"[a-z-]+:", source) is None

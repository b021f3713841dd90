"""nDCG@10, MRR@10 and recall@100 of a run, by ir_measures over pytrec_eval, the field's reference.

MRR@10 is pytrec_eval's reciprocal rank, set to 0 beyond rank 10: ir_measures' own `RR@10` comes from another provider
that breaks ties differently, and all measures must use the same order. `search_r3.metrics` gives the same numbers.

Grades below 0 (TREC's junk) are passed on as 0: none of these measures distinguishes them, and pytrec_eval 0.5.11
crashes the process on some data sets that contain them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from search_r3.errors import InputError
from search_r3.metrics import Qrels, Run, mean
from search_r3.optional import require

NDCG, MRR, RECALL = "nDCG@10", "MRR@10", "recall@100"
MEASURES = (NDCG, MRR, RECALL)
MAX_GRADE = 1_000_000
"""pytrec_eval counts the documents of every grade up to the highest, and returns 0 if that exceeds its memory."""


@dataclass(frozen=True)
class Measured:
    """The metrics of a run.

    Attributes:
        mean: measure -> mean over all queries of the qrels.
        per_query: measure -> query id -> value, in the order of the qrels.
        missing_queries: judged queries that the run lacks; each counts as 0.
        missing_documents: judged relevant documents that are not in the corpus and so cannot be retrieved.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    missing_queries: list[str] = field(default_factory=list)
    missing_documents: list[str] = field(default_factory=list)


def measure_run(run: Run, qrels: Qrels, corpus_ids: Collection[str] | None = None) -> Measured:
    """Evaluate `run` against `qrels`; queries of the run without judgments are ignored.

    Args:
        corpus_ids: ids of the corpus, to report relevant documents that are not in it.

    Raises:
        InputError: there are no judgments, a grade is above MAX_GRADE, or ir_measures is not installed.
    """
    if not qrels:
        raise InputError("there are no judgments to evaluate with; check the split's qrels file")
    ir_measures = require("ir_measures", "evaluation", "measuring")
    measures = {ir_measures.nDCG @ 10: NDCG, ir_measures.RR: MRR, ir_measures.R @ 100: RECALL}
    per_query = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}
    judged = {qid: dict(run[qid]) for qid in qrels if run.get(qid)}
    provider = ir_measures.providers.registry["pytrec_eval"]
    for metric in provider.iter_calc(list(measures), _grades(qrels), judged) if judged else ():
        per_query[measures[metric.measure]][metric.query_id] = float(metric.value)
    per_query[MRR] = {qid: value if value > 1 / 10.5 else 0.0 for qid, value in per_query[MRR].items()}
    known = set(corpus_ids) if corpus_ids is not None else None
    relevant = {did for documents in qrels.values() for did, grade in documents.items() if grade > 0}
    return Measured(
        mean={name: mean(values) for name, values in per_query.items()},
        per_query=per_query,
        missing_queries=[qid for qid in qrels if qid not in judged],
        missing_documents=sorted(relevant - known) if known is not None else [],
    )


def _grades(qrels: Qrels) -> dict[str, dict[str, int]]:
    """The judgments in the form that pytrec_eval requires."""
    for qid, documents in qrels.items():
        for did, grade in documents.items():
            if grade > MAX_GRADE:
                raise InputError(
                    f"query {qid} gives document {did} the grade {grade}; grades up to {MAX_GRADE:,} can be measured"
                )
    return {qid: {did: max(grade, 0) for did, grade in documents.items()} for qid, documents in qrels.items()}

"""The metrics equal trec_eval's, ties and graded judgments included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3 import metrics
from search_r3.evaluation.measures import MRR, NDCG, RECALL, measure_run

DOCUMENTS = [f"d{i:02d}" for i in range(12)]
# Few distinct scores, so that most rankings hold ties; two of them differ in float64 only.
SCORES = st.sampled_from([0.0, 0.25, 0.25 + 1e-12, 0.5, -1.0, 3.0])
RUNS = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(DOCUMENTS), SCORES, min_size=1), max_size=4
)
QRELS = st.dictionaries(
    st.sampled_from("abcde"),
    st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1),
    min_size=1,
)


def trec_eval(run, qrels, k):
    """Per-query nDCG@k, RR@k and R@k by pytrec_eval; RR@k from uncut RR, which alone follows trec_eval's tie order.

    Grades below 0 are handed on as 0: pytrec_eval 0.5.11 ends the whole process on some sets that hold them.
    """
    ir_measures = pytest.importorskip("ir_measures")
    ndcg, rr, recall = ir_measures.nDCG @ k, ir_measures.RR, ir_measures.R @ k
    provider = ir_measures.providers.registry["pytrec_eval"]
    found = {str(m): dict.fromkeys(qrels, 0.0) for m in (ndcg, rr, recall)}
    judged = {qid: {did: max(grade, 0) for did, grade in grades.items()} for qid, grades in qrels.items()}
    for metric in provider.iter_calc([ndcg, rr, recall], judged, run):
        found[str(metric.measure)][metric.query_id] = metric.value
    found[str(rr)] = {qid: v if v > 1 / (k + 0.5) else 0.0 for qid, v in found[str(rr)].items()}
    return found[str(ndcg)], found[str(rr)], found[str(recall)]


@settings(max_examples=150, deadline=None)
@given(run=RUNS, qrels=QRELS, k=st.integers(1, 14))
def test_runs_score_as_trec_eval_scores_them(run, qrels, k):
    ndcg, _, recall = trec_eval(run, qrels, k)
    assert metrics.run_ndcg(run, qrels, k) == pytest.approx(ndcg, abs=1e-9)
    assert metrics.run_recall(run, qrels, k) == pytest.approx(recall, abs=1e-9)


def test_a_thousand_random_cases_score_as_trec_eval_scores_them():
    """Larger than the cases above: up to 150 ranked documents, graded, with ties, missing and unjudged queries, judged
    documents that no run can hold; both forms, ours in numpy and the one that results are measured with."""
    pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    tied, missing, incomplete = 0, 0, 0
    for _ in range(1000):
        documents = [f"d{i}" for i in rng.permutation(int(rng.integers(3, 160)))]
        queries = [f"q{i}" for i in range(int(rng.integers(1, 6)))]
        levels = int(rng.choice([2, 5, 1000]))  # few levels: nearly everything is tied

        def some(share, documents=documents):
            return [did for did in documents if rng.random() < share] or documents[:1]

        run = {q: {d: float(rng.integers(levels)) / 7 for d in some(0.9)} for q in queries if rng.random() < 0.8}
        run["unjudged"] = {documents[0]: 1.0}
        qrels = {q: {d: int(rng.integers(-1, 4)) for d in some(rng.random() / 4)} for q in queries}
        for grades in qrels.values():
            if rng.random() < 0.3:
                grades["gone"] = int(rng.integers(0, 4))
        tied += sum(len(set(scores.values())) < len(scores) for scores in run.values())
        missing += len(qrels.keys() - run.keys())
        ndcg, rr, _ = trec_eval(run, qrels, 10)
        recall = trec_eval(run, qrels, 100)[2]
        assert metrics.run_ndcg(run, qrels, 10) == pytest.approx(ndcg, abs=1e-9)
        assert metrics.run_recall(run, qrels, 100) == pytest.approx(recall, abs=1e-9)
        measured = measure_run(run, qrels, documents)
        assert measured.per_query == {NDCG: ndcg, MRR: rr, RECALL: recall}
        assert measured.mean[NDCG] == pytest.approx(np.mean(list(ndcg.values())))
        assert set(measured.missing_queries) == qrels.keys() - run.keys()
        lost = any(grades.get("gone", 0) > 0 for grades in qrels.values())
        assert measured.missing_documents == ["gone"] * lost
        incomplete += lost
    assert tied > 1000
    assert missing > 300
    assert incomplete > 300


@settings(max_examples=100, deadline=None)
@given(data=st.data(), k=st.integers(1, 14))
def test_matrices_score_as_the_runs_they_stand_for(data, k):
    rows = data.draw(st.integers(1, 3))
    row = st.lists(SCORES, min_size=len(DOCUMENTS), max_size=len(DOCUMENTS))
    grades = st.lists(st.integers(0, 3), min_size=len(DOCUMENTS), max_size=len(DOCUMENTS))
    scores = data.draw(st.lists(row, min_size=rows, max_size=rows))
    relevance = data.draw(st.lists(grades, min_size=rows, max_size=rows))
    run, qrels = {}, {}
    for q, (row, grades) in enumerate(zip(scores, relevance, strict=True)):
        places = sorted(range(len(grades)), key=grades.__getitem__)
        # The greater id wins a tie of a run, the lower grade one of a matrix.
        ids = dict(zip(places, sorted(DOCUMENTS)[::-1], strict=True))
        run[str(q)] = {ids[column]: score for column, score in enumerate(row)}
        qrels[str(q)] = {ids[column]: grade for column, grade in enumerate(grades)}
    assert metrics.ndcg(scores, relevance, k) == pytest.approx(list(metrics.run_ndcg(run, qrels, k).values()))


def test_worked_example_uses_linear_gain():
    # Ranked grades 0, 3, 2; ideal 3, 2, 0.
    got = 3 / np.log2(3) + 2 / np.log2(4)
    ideal = 3 + 2 / np.log2(3)
    assert metrics.ndcg([[0.9, 0.8, 0.7]], [[0, 3, 2]])[0] == pytest.approx(got / ideal)


def test_a_collapsed_model_finds_nothing():
    scores, relevance = np.ones((50, 50)), np.eye(50, dtype=int)
    assert metrics.ndcg(scores, relevance).tolist() == [0.0] * 50


def test_a_query_missing_from_the_run_counts_as_zero():
    values = metrics.run_ndcg({"a": {"d1": 1.0}}, {"a": {"d1": 1}, "b": {"d1": 1}})
    assert values == {"a": 1.0, "b": 0.0}
    assert metrics.mean(values) == 0.5
    assert metrics.mean([]) == 0.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.ndcg([[float("nan"), 1.0]], [[1, 0]])
    with pytest.raises(ValueError, match="must be equal"):
        metrics.ndcg([[1.0, 2.0]], [[1, 0, 0]])
    with pytest.raises(ValueError, match="k must be"):
        metrics.ndcg([[1.0, 2.0]], [[1, 0]], k=0)

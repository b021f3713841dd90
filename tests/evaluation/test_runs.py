"""Run files come back as they were written, in one order, with the same bytes, and a broken one is named."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3 import metrics
from search_r3.errors import InputError
from search_r3.evaluation.measures import MEASURES, MRR, NDCG, RECALL, measure_run
from search_r3.evaluation.runs import read_gzip_lines, read_run, write_run

FLOATS = st.floats(-1e6, 1e6, width=64)
RUNS = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3"]),
    st.dictionaries(st.sampled_from([f"d{i}" for i in range(8)]), FLOATS, min_size=1),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(run=RUNS)
def test_a_run_read_back_ranks_and_measures_the_same(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "nested" / "run.trec.gz"
    write_run(path, run, "system-a", k=5)
    back = read_run(path)
    for qid, scores in run.items():
        assert metrics.rank_documents(back[qid]) == metrics.rank_documents(scores, 5) == list(back[qid])
        assert {did: np.float32(score) for did, score in back[qid].items()} == {
            did: np.float32(scores[did]) for did in back[qid]
        }
    qrels = {qid: {"d1": 2, "d5": 1} for qid in ("q1", "q2", "q3", "q4")}
    cut = {qid: {did: scores[did] for did in metrics.rank_documents(scores, 5)} for qid, scores in run.items()}
    assert measure_run(back, qrels).mean == pytest.approx(measure_run(cut, qrels).mean)


def test_lines_have_six_columns_ranks_from_one_and_descending_scores(tmp_path):
    path = tmp_path / "a.trec.gz"
    write_run(path, {"q1": {"a": 0.1, "b": 0.5, "c": 0.5}}, "bm25")
    assert read_gzip_lines(path) == [
        "q1 Q0 c 1 0.5 bm25",
        "q1 Q0 b 2 0.5 bm25",
        "q1 Q0 a 3 0.100000001 bm25",
    ]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_run(tmp_path / name, {"q1": {"a": 0.1}}, "bm25")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q1 Q0 d1 2 0.5", "line 2: expected 6 columns"),
        ("q1 Q0 d1 2 high bm25", "line 2: the score 'high'"),
        ("q1 Q0 d1 2 nan bm25", "line 2: the score 'nan'"),
        ("q1 Q0 d0 2 0.5 bm25", "line 2: document d0 is listed twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    path = tmp_path / "run.trec"
    path.write_text(f"q1 Q0 d0 1 0.9 bm25\n{line}\n")
    with pytest.raises(InputError, match=said):
        read_run(path)


def test_a_truncated_or_missing_file_is_named(tmp_path):
    path = tmp_path / "run.trec.gz"
    path.write_bytes(gzip.compress(b"q1 Q0 d0 1 0.9 bm25\n" * 50)[:-12])
    with pytest.raises(InputError, match=r"run\.trec\.gz is damaged"):
        read_run(path)
    with pytest.raises(InputError, match="cannot read"):
        read_run(tmp_path / "none.gz")


@pytest.mark.parametrize(
    ("run", "system", "said"),
    [
        ({"q 1": {"d": 1.0}}, "bm25", "query id 'q 1'"),
        ({"q1": {"": 1.0}}, "bm25", "document id ''"),
        ({"q1": {"d": float("nan")}}, "bm25", "finite"),
        ({"q1": {"d": 1.0}}, "my system", "system name"),
    ],
)
def test_what_a_run_cannot_hold_is_refused_and_nothing_is_written(tmp_path, run, system, said):
    with pytest.raises(InputError, match=said):
        write_run(tmp_path / "run.gz", run, system)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(run=RUNS)
def test_measures_agree_with_our_own_metrics(run):
    qrels = {"q1": {"d1": 2, "d5": 1}, "q2": {"d3": 1, "d4": 0}, "q4": {"d1": 1}, "q3": {"d0": 0}}
    measured = measure_run(run, qrels)
    assert measured.per_query[NDCG] == pytest.approx(metrics.run_ndcg(run, qrels, 10))
    assert measured.per_query[RECALL] == pytest.approx(metrics.run_recall(run, qrels, 100))
    assert all(list(measured.per_query[name]) == list(qrels) for name in MEASURES)


def test_missing_queries_count_as_zero_and_missing_documents_are_reported():
    qrels = {"q1": {"d1": 1}, "q2": {"d2": 1, "gone": 1, "judged-0": 0}}
    measured = measure_run({"q1": {"d1": 1.0}, "unjudged": {"d1": 1.0}}, qrels, ["d1", "d2"])
    assert measured.mean == {NDCG: 0.5, MRR: 0.5, RECALL: 0.5}
    assert measured.missing_queries == ["q2"]
    assert measured.missing_documents == ["gone"]
    with pytest.raises(InputError, match="no judgments"):
        measure_run({}, {})
    assert measure_run({}, qrels).mean[NDCG] == 0.0


def test_mrr_is_zero_beyond_rank_ten():
    run = {"q1": {f"d{i:02d}": -float(i) for i in range(1, 20)}}
    assert measure_run(run, {"q1": {"d10": 1}}).mean[MRR] == pytest.approx(0.1)
    assert measure_run(run, {"q1": {"d11": 1}}).mean[MRR] == 0.0


NEGATIVES = {
    "all of them": {"q1": {"d1": -1, "d2": -1}, "q2": {"d1": -1, "d3": -2, "d4": -1}},
    "all of one query's": {"q1": {"d1": -1, "d2": -2, "d3": -1}, "q2": {"d1": 1, "d2": 0}},
    "beside others": {"q1": {"d1": -1, "d2": 2, "d3": 0, "d4": 1}, "q2": {"d0": 1, "d2": -1, "d5": -3}},
    "one alone": {"q1": {"d1": -1}},
    "beside high ones": {"q1": {"d1": 100, "d2": -100, "d3": 3}, "q2": {"d9": -1, "gone": 2}},
}


@pytest.mark.parametrize("qrels", NEGATIVES.values(), ids=NEGATIVES.keys())
def test_a_grade_below_0_counts_as_0_and_never_reaches_pytrec_eval(monkeypatch, qrels):
    import ir_measures

    provider = ir_measures.providers.registry["pytrec_eval"]
    handed: list[int] = []
    really = provider.iter_calc

    def watched(measures, grades, run):  # what it would do with a grade below 0 is to end this process
        handed.extend(grade for documents in grades.values() for grade in documents.values())
        assert min(handed) >= 0
        return really(measures, grades, run)

    monkeypatch.setattr(provider, "iter_calc", watched)
    run = {qid: {f"d{i}": float(i) for i in range(6)} for qid in ("q1", "q2")}
    measured = measure_run(run, qrels)
    assert handed
    assert measured.per_query[NDCG] == pytest.approx(metrics.run_ndcg(run, qrels, 10))
    assert measured.per_query[RECALL] == pytest.approx(metrics.run_recall(run, qrels, 100))
    assert measured.missing_documents == []
    as_zero = {qid: {did: max(grade, 0) for did, grade in documents.items()} for qid, documents in qrels.items()}
    assert measured == measure_run(run, as_zero)


def test_a_grade_that_pytrec_eval_would_count_as_nothing_is_refused():
    run = {"q1": {"d1": 1.0}}
    assert measure_run(run, {"q1": {"d1": 1_000_000}}).mean[NDCG] == 1.0
    with pytest.raises(InputError, match=r"query q1 .* d1 .* 2147483648; grades up to 1,000,000"):
        measure_run(run, {"q1": {"d1": 2**31}})
